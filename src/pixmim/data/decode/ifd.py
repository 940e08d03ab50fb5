"""The structure of a TIFF, checked before a library reads the file.

Libraries get the pixels, and the tags that say how these are stored and shown. Everything else (EXIF, OME-XML, the
headers of microscopes and scanners, lists of further images) is left out. What the tags claim is bounded by what the
file holds: pages, tags, strips and tiles, and their bytes.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pixmim.data.dataset import BadImage, TiffPages
from pixmim.data.decode.limits import check_bytes, check_size

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""How a TIFF, or a BigTIFF, begins."""

MAX_PAGES = 10_000
_MAX_TAGS = 4096
_MAX_SEGMENTS = 2**20

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, _PLANAR, _DEPTH = 256, 257, 258, 259, 277, 284, 32997
_STRIPS, _ROWS, _STRIP_BYTES, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES = 273, 278, 279, 322, 323, 324, 325
_ORIENTATION, _SUBFILE, _OLD_SUBFILE = 274, 254, 255

_TAGS = frozenset((
    254, 255, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332,
    338, 339, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532, 32997, 32998, 42113, 50674,
))  # fmt: skip
"""Tags that say how pixels are stored and shown: baseline, tiles, JPEG's, depth, GDAL's "no data", LERC's."""

_SINGLE = (256, 257, 259, 262, 277, 284, 317, 322, 323, 32997, 32998)
"""Tags of one value, of which decoders might each take another one if there were more."""

_COMPRESSIONS = {
    1: "none", 2: "CCITT RLE", 3: "CCITT fax 3", 4: "CCITT fax 4", 5: "LZW", 6: "old JPEG", 7: "JPEG", 8: "deflate",
    32773: "PackBits", 32946: "deflate", 34887: "LERC", 34925: "LZMA", 50000: "Zstandard",
}  # fmt: skip
"""Compressions whose decoders write no more than the tags say, or state the size of what they write."""

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_NUMBERS = {1: "u1", 3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tag of a page: the kind of its values, how many, where the first one is, and its bytes in the page's list."""

    kind: int
    count: int
    at: int
    raw: bytes


Page = dict[int, Entry]


class Tiff:
    """A TIFF file's header.

    Args:
        data: The file's content.
        strict: Refuse a page whose list of tags is cut off, instead of taking the tags that are there.

    Raises:
        BadImage: If it is not one.
    """

    def __init__(self, data: bytes, strict: bool = True) -> None:
        if data[:4] not in MAGIC or len(data) < 16:
            raise BadImage("a TIFF that is cut off")
        self.data, self._strict = data, strict
        self.big, self.order = data[2:4] in (b"+\0", b"\0+"), "<" if data[:2] == b"II" else ">"
        if self.big and struct.unpack(f"{self.order}HH", data[4:8]) != (8, 0):
            raise BadImage("a BigTIFF whose offsets do not have 8 bytes")
        self._start = 8 if self.big else 4
        self._offset = f"{self.order}{'Q' if self.big else 'I'}"
        self._entry = struct.Struct(f"{self.order}HH{'Q' if self.big else 'I'}")
        self._counted = 8 if self.big else 2

    def pages(self, most: int = MAX_PAGES) -> list[Page]:
        """Return the first `most` pages, each with the tags that count.

        Raises:
            BadImage: If their list is cut off, points back at itself, or is longer than MAX_PAGES.
        """
        found: list[Page] = []
        seen: set[int] = set()
        left = len(self.data) + 4096
        (at,) = struct.unpack_from(self._offset, self.data, self._start)
        while at and len(found) < most:
            if at in seen:
                raise BadImage("a TIFF whose list of pages points back at itself")
            seen.add(at)
            page, end = self._page(at)
            left -= sum(_SIZES[entry.kind] * entry.count for entry in page.values())
            if left < 0:
                raise BadImage("a TIFF whose tags claim more bytes than the file has")
            found.append(page)
            at = self._number(end)
        if at and most == MAX_PAGES:
            raise BadImage(f"a TIFF of more than {MAX_PAGES:,} pages")
        return found

    def whole(self, pages: Sequence[Page]) -> list[Page]:
        """The pages that are neither reduced copies (thumbnails, overviews) nor masks of another one."""
        return [
            page for page in pages if not self.number(page, _SUBFILE, 0) & 5 and self.number(page, _OLD_SUBFILE, 1) != 2
        ]

    def _page(self, at: int) -> tuple[Page, int]:
        """One page, and where the offset of the next one is."""
        if at + self._counted > len(self.data):
            raise BadImage("a TIFF that is cut off")
        count = int.from_bytes(self.data[at : at + self._counted], "little" if self.order == "<" else "big")
        first, length, inside = at + self._counted, 20 if self.big else 12, 8 if self.big else 4
        if count > _MAX_TAGS:
            raise BadImage(f"a TIFF of {count:,} tags in one page")
        whole = (len(self.data) - first) // length
        if count > whole and self._strict:
            raise BadImage("a TIFF that is cut off")
        page: Page = {}
        for here in range(first, first + min(count, whole) * length, length):
            code, kind, values = self._entry.unpack_from(self.data, here)
            if code not in _TAGS or code in page or kind not in _SIZES or not values:
                continue
            value = here + length - inside
            if values * _SIZES[kind] > inside:
                value = self._number(value)
                if value + values * _SIZES[kind] > len(self.data):
                    continue
            page[code] = Entry(kind, values, value, self.data[here : here + length])
        return page, first + count * length

    def _number(self, at: int) -> int:
        """An offset that is stored at `at`; none where the file ends before."""
        if at + struct.calcsize(self._offset) > len(self.data):
            return 0
        (number,) = struct.unpack_from(self._offset, self.data, at)
        return int(number)

    def numbers(self, page: Page, code: int) -> npt.NDArray[np.unsignedinteger]:
        """The values of a tag of whole numbers; none where the page does not have it so."""
        entry = page.get(code)
        if entry is None or entry.kind not in _NUMBERS:
            return np.zeros(0, np.uint8)
        return np.frombuffer(self.data, f"{self.order}{_NUMBERS[entry.kind]}", entry.count, entry.at)

    def number(self, page: Page, code: int, default: int) -> int:
        """The first value of a tag."""
        found = self.numbers(page, code)
        return int(found[0]) if len(found) else default

    def check(self, page: Page) -> None:
        """Refuse a page before memory or time is spent on what it claims. Raises BadImage."""
        lists = (_BITS, _STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES)
        if any(code in page and page[code].kind not in _NUMBERS for code in (*_SINGLE, *lists)) or any(
            code in page and page[code].count > 1 for code in _SINGLE
        ):
            raise BadImage("a TIFF whose tags for size or layout do not hold one number each")
        width, height = (self.number(page, code, 0) for code in (_WIDTH, _HEIGHT))
        check_size(width, height)
        samples, depth = self.number(page, _SAMPLES, 1), self.number(page, _DEPTH, 1)
        bits = self.numbers(page, _BITS)
        most = max(8, int(bits.max())) if len(bits) else 8
        planes = samples if self.number(page, _PLANAR, 1) == 2 else 1
        if len(bits) > max(samples, 8) or most > 128 or not 0 < samples < 2**16:
            raise BadImage(f"a TIFF of {samples:,} samples of {most} bits")
        compression = self.number(page, _COMPRESSION, 1)
        if compression not in _COMPRESSIONS:
            known = ", ".join(dict.fromkeys(_COMPRESSIONS.values()))
            raise BadImage(f"a TIFF of compression {compression}; read are {known}: save it so")
        if _TILE_WIDTH in page:
            across, down = (self.number(page, code, 0) for code in (_TILE_WIDTH, _TILE_HEIGHT))
            if not (across and down):
                raise BadImage("a TIFF of tiles without a size")
            columns, rows = -(-width // across), -(-height // down)
        else:
            across, down = width, min(self.number(page, _ROWS, height), height) or height
            columns, rows = 1, -(-height // down)
        check_bytes(columns * across * rows * down * depth * samples * most // 8)
        expected = columns * rows * planes * depth
        found = [self.numbers(page, code) for code in (_STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES)]
        segments = max(expected, *map(len, found))
        if segments > _MAX_SEGMENTS:
            raise BadImage(f"a TIFF of {segments:,} strips or tiles")
        for offsets, counts in (found[:2], found[2:]):
            shared = min(len(offsets), len(counts))
            ends = offsets[:shared].astype(np.float64) + counts[:shared]
            lost = (counts[:shared] == 0) & (offsets[:shared] > 0)  # sparse files have neither
            if ends.max(initial=0) > len(self.data) or lost.any():
                raise BadImage("a TIFF that is cut off")
        claimed = sum(int(counts.sum(dtype=np.float64)) for counts in found[1::2])
        if claimed > len(self.data) + 2 * columns * across * rows * down * depth * samples * most // 8:
            raise BadImage("a TIFF whose strips or tiles claim more bytes than the file has")

    def only(self, pages: Sequence[Page]) -> bytes:
        """Return a file of these pages alone, with the tags that count; pixels stay where they are."""
        end = len(self.data) + len(self.data) % 2
        tail = [b"\0" * (len(self.data) % 2)]
        number = struct.Struct(self._offset)
        start = end
        if not self.big and end + sum(12 * len(page) + 6 for page in pages) >= 2**32:
            raise BadImage("a TIFF of more than 4 GiB")
        for i, page in enumerate(pages):
            body = b"".join(page[code].raw for code in sorted(page))
            end += self._counted + len(body) + number.size
            after = end if i + 1 < len(pages) else 0
            count = len(page).to_bytes(self._counted, "little" if self.order == "<" else "big")
            tail += [count, body, number.pack(after)]
        header = self.data[: self._start] + number.pack(start)
        return b"".join([header, memoryview(self.data)[len(header) :], *tail])


def checked(data: bytes, pages: TiffPages = "first") -> bytes:
    """Return a TIFF of the first page, or of all pages, with the tags that count, after they were checked.

    Raises:
        BadImage: If a page is damaged, or claims more than is allowed.
    """
    tiff = Tiff(data)
    found = tiff.pages(1 if pages == "first" else MAX_PAGES)
    if pages == "first" and not tiff.whole(found):
        found = tiff.whole(tiff.pages())[:1] or found  # a thumbnail comes first
    elif pages == "channels":
        found = tiff.whole(found) or found
    if not found:
        raise BadImage("a TIFF without a page")
    for page in found:
        tiff.check(page)
    return tiff.only(found)


def count_pages(data: bytes) -> int:
    """Return the number of pages of a TIFF, without reduced copies and masks. Raises BadImage as `Tiff.pages` does."""
    tiff = Tiff(data)
    return len(tiff.whole(tiff.pages()))


def orientation(exif: bytes) -> int:
    """Return the orientation in a block of EXIF, which is a TIFF without pixels, or 1 if there is none to be read."""
    try:
        tiff = Tiff(exif.removeprefix(b"Exif\0\0"), strict=False)
        return next((tiff.number(page, _ORIENTATION, 1) for page in tiff.pages(1)), 1)
    except BadImage:
        return 1
