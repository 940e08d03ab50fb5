"""Structure of TIFF and JPEG files, checked before a library reads them.

Libraries get the pixels, and the tags that describe how these are stored and shown. Everything else (EXIF, OME-XML,
headers of microscopes and scanners, previews, profiles) is removed. Whatever a TIFF claims about its pages, tags and
strips is compared with the size of the file.
"""

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pixmim.data.dataset import BadImage, TiffPages
from pixmim.data.decode.limits import check_bytes, check_size

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First bytes of a TIFF and of a BigTIFF."""

JPEG_MAGIC = b"\xff\xd8\xff"

MAX_PAGES = 10_000
_MAX_TAGS = 4096  # of a page
_MAX_STRIPS = 2**20  # or tiles, of a page
_MAX_SEGMENTS = 10_000  # of a JPEG before its pixels
_MAX_SCANS = 100  # each is a pass over all pixels; common progressive files have about ten
_MAX_SCANNED_PIXELS = _MAX_SCANS * 24_000_000

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, _PLANAR, _DEPTH = 256, 257, 258, 259, 277, 284, 32997
_STRIPS, _ROWS, _STRIP_BYTES, _TILE_WIDTH, _TILE_HEIGHT, _TILES, _TILE_BYTES = 273, 278, 279, 322, 323, 324, 325
_ORIENTATION, _SUBFILE, _OLD_SUBFILE = 274, 254, 255

KEPT_TAGS = frozenset((
    254, 255, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320, 322, 323, 324, 325, 332,
    338, 339, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532, 32997, 32998, 42113, 50674,
))  # fmt: skip
"""Tags that describe how pixels are stored and shown: baseline, tiles, JPEG, depth, GDAL's "no data", LERC."""

_SINGLE_TAGS = (256, 257, 259, 262, 277, 284, 317, 322, 323, 32997, 32998)
"""Tags with one value. If there were more, two decoders might use different ones."""

_COMPRESSIONS = {
    1: "none", 2: "CCITT RLE", 3: "CCITT fax 3", 4: "CCITT fax 4", 5: "LZW", 6: "old JPEG", 7: "JPEG", 8: "deflate",
    32773: "PackBits", 32946: "deflate", 34887: "LERC", 34925: "LZMA", 50000: "Zstandard",
}  # fmt: skip
"""Compressions whose decoders write no more than the tags claim, or whose streams state their decoded size."""

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_INTEGERS = {1: "u1", 3: "u2", 4: "u4", 13: "u4", 16: "u8", 18: "u8"}


class Tag(NamedTuple):
    """A TIFF tag: data type, number of values, offset of the first value, and the entry's bytes in the page."""

    dtype: int
    length: int
    offset: int
    entry: bytes


Page = dict[int, Tag]


class TiffHeader:
    """The pages and tags of a TIFF file.

    Args:
        data: The file's content.
        strict: Refuse a page whose tags are truncated, instead of using those that are complete.

    Raises:
        BadImage: If it is not a TIFF.
    """

    def __init__(self, data: bytes, strict: bool = True) -> None:
        if data[:4] not in TIFF_MAGIC or len(data) < 16:
            raise BadImage("a truncated TIFF")
        self.data, self._strict = data, strict
        self.is_big, self.order = data[2:4] in (b"+\0", b"\0+"), "<" if data[:2] == b"II" else ">"
        if self.is_big and struct.unpack(f"{self.order}HH", data[4:8]) != (8, 0):
            raise BadImage("a BigTIFF whose offsets do not have 8 bytes")
        self._offset = struct.Struct(f"{self.order}{'Q' if self.is_big else 'I'}")
        self._count = struct.Struct(f"{self.order}{'Q' if self.is_big else 'H'}")
        self._entry = struct.Struct(f"{self.order}HH{'Q' if self.is_big else 'I'}")

    def pages(self, limit: int = MAX_PAGES) -> list[Page]:
        """Return the first `limit` pages with their KEPT_TAGS. Raises BadImage if the list is truncated or circular."""
        pages: list[Page] = []
        seen: set[int] = set()
        remaining = len(self.data) + 4096
        offset = self._read_offset(self._offset.size)
        while offset and len(pages) < limit:
            if offset in seen:
                raise BadImage("a TIFF whose list of pages is circular")
            seen.add(offset)
            page, end = self._read_page(offset)
            remaining -= sum(_SIZES[tag.dtype] * tag.length for tag in page.values())
            if remaining < 0:
                raise BadImage("a TIFF whose tags claim more bytes than the file has")
            pages.append(page)
            offset = self._read_offset(end)
        if offset and limit == MAX_PAGES:
            raise BadImage(f"a TIFF of more than {MAX_PAGES:,} pages")
        return pages

    def full_pages(self, pages: Sequence[Page]) -> list[Page]:
        """Return the pages that are neither masks nor reduced copies (thumbnails, overviews) of another page."""
        return [p for p in pages if not self.value(p, _SUBFILE, 0) & 5 and self.value(p, _OLD_SUBFILE, 1) != 2]

    def values(self, page: Page, code: int) -> npt.NDArray[np.unsignedinteger]:
        """Return the values of an integer tag; empty if the page has no such tag."""
        tag = page.get(code)
        if tag is None or tag.dtype not in _INTEGERS:
            return np.zeros(0, np.uint8)
        return np.frombuffer(self.data, f"{self.order}{_INTEGERS[tag.dtype]}", tag.length, tag.offset)

    def value(self, page: Page, code: int, default: int) -> int:
        """Return the first value of an integer tag."""
        values = self.values(page, code)
        return int(values[0]) if len(values) else default

    def check(self, page: Page) -> None:
        """Raise BadImage if a page claims more than is allowed, or more than the file has."""
        integers = (*_SINGLE_TAGS, _BITS, _STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES)
        if any(code in page and page[code].dtype not in _INTEGERS for code in integers) or any(
            code in page and page[code].length > 1 for code in _SINGLE_TAGS
        ):
            raise BadImage("a TIFF whose tags for size or layout do not hold one integer each")
        width, height = self.value(page, _WIDTH, 0), self.value(page, _HEIGHT, 0)
        check_size(width, height)
        samples, depth = self.value(page, _SAMPLES, 1), self.value(page, _DEPTH, 1)
        bits = self.values(page, _BITS)
        max_bits = max(8, int(bits.max(initial=0)))
        if len(bits) > max(samples, 8) or max_bits > 128 or not 0 < samples < 2**16:
            raise BadImage(f"a TIFF of {samples:,} samples of {max_bits} bits")
        compression = self.value(page, _COMPRESSION, 1)
        if compression not in _COMPRESSIONS:
            supported = ", ".join(dict.fromkeys(_COMPRESSIONS.values()))
            raise BadImage(
                f"a TIFF with compression {compression}; supported are {supported}: save it with one of them"
            )
        if _TILE_WIDTH in page:
            across, down = self.value(page, _TILE_WIDTH, 0), self.value(page, _TILE_HEIGHT, 0)
            if not (across and down):
                raise BadImage("a TIFF with tiles without a size")
        else:
            across, down = width, min(self.value(page, _ROWS, height), height) or height
        columns, rows = -(-width // across), -(-height // down)
        decoded_bytes = columns * across * rows * down * depth * samples * max_bits // 8
        check_bytes(decoded_bytes)
        planes = samples if self.value(page, _PLANAR, 1) == 2 else 1
        lists = [self.values(page, code) for code in (_STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES)]
        strips = max(columns * rows * planes * depth, *map(len, lists))
        if strips > _MAX_STRIPS:
            raise BadImage(f"a TIFF of {strips:,} strips or tiles")
        for offsets, counts in (lists[:2], lists[2:]):
            common = min(len(offsets), len(counts))
            ends = offsets[:common].astype(np.float64) + counts[:common]
            missing = (counts[:common] == 0) & (offsets[:common] > 0)  # in sparse files both are zero
            if ends.max(initial=0) > len(self.data) or missing.any():
                raise BadImage("a truncated TIFF")
        claimed = sum(int(counts.sum(dtype=np.float64)) for counts in lists[1::2])
        if claimed > len(self.data) + 2 * decoded_bytes:
            raise BadImage("a TIFF whose strips or tiles claim more bytes than the file has")

    def rebuild(self, pages: Sequence[Page]) -> bytes:
        """Return a TIFF of these pages and their KEPT_TAGS only. Pixels keep their offsets."""
        padding = b"\0" * (len(self.data) % 2)
        start = end = len(self.data) + len(padding)
        if not self.is_big and end + sum(12 * len(page) + 6 for page in pages) >= 2**32:
            raise BadImage("a TIFF of more than 4 GiB")
        parts = [padding]
        for i, page in enumerate(pages):
            body = b"".join(page[code].entry for code in sorted(page))
            end += self._count.size + len(body) + self._offset.size
            parts += [self._count.pack(len(page)), body, self._offset.pack(end if i + 1 < len(pages) else 0)]
        header = self.data[: self._offset.size] + self._offset.pack(start)
        return b"".join([header, memoryview(self.data)[len(header) :], *parts])

    def _read_page(self, offset: int) -> tuple[Page, int]:
        """Return a page, and the position of the next page's offset."""
        first, length, inline = offset + self._count.size, 20 if self.is_big else 12, self._offset.size
        if first > len(self.data):
            raise BadImage("a truncated TIFF")
        (count,) = self._count.unpack_from(self.data, offset)
        if count > _MAX_TAGS:
            raise BadImage(f"a TIFF of {count:,} tags in one page")
        complete = (len(self.data) - first) // length
        if count > complete and self._strict:
            raise BadImage("a truncated TIFF")
        page: Page = {}
        for start in range(first, first + min(count, complete) * length, length):
            code, dtype, values = self._entry.unpack_from(self.data, start)
            if code not in KEPT_TAGS or code in page or dtype not in _SIZES or not values:
                continue
            position = start + length - inline
            if values * _SIZES[dtype] > inline:
                position = self._read_offset(position)
                if position + values * _SIZES[dtype] > len(self.data):
                    continue
            page[code] = Tag(dtype, values, position, self.data[start : start + length])
        return page, first + count * length

    def _read_offset(self, position: int) -> int:
        """Return the offset stored at a position, or 0 beyond the end of the file."""
        if position + self._offset.size > len(self.data):
            return 0
        return int(self._offset.unpack_from(self.data, position)[0])


def sanitize_tiff(data: bytes, pages: TiffPages = "first") -> bytes:
    """Return a TIFF of the first page or of all pages, checked and reduced to KEPT_TAGS. Raises BadImage."""
    header = TiffHeader(data)
    chosen = header.pages(1 if pages == "first" else MAX_PAGES)
    if pages == "first" and not header.full_pages(chosen):
        chosen = header.full_pages(header.pages())[:1] or chosen  # a thumbnail precedes the image
    elif pages == "channels":
        chosen = header.full_pages(chosen) or chosen
    if not chosen:
        raise BadImage("a TIFF without a page")
    for page in chosen:
        header.check(page)
    return header.rebuild(chosen)


def count_pages(data: bytes) -> int:
    """Return the number of pages of a TIFF, without masks and reduced copies. Raises BadImage."""
    header = TiffHeader(data)
    return len(header.full_pages(header.pages()))


def exif_orientation(exif: bytes) -> int:
    """Return the orientation (1 to 8) in an EXIF block, which is a TIFF without pixels; 1 if it has none."""
    try:
        header = TiffHeader(exif.removeprefix(b"Exif\0\0"), strict=False)
        return next((header.value(page, _ORIENTATION, 1) for page in header.pages(1)), 1)
    except BadImage:
        return 1


class JpegHeader(NamedTuple):
    """Facts about a JPEG, and the (start, stop) offsets of its parts that are not metadata."""

    width: int
    height: int
    channels: int
    orientation: int
    parts: list[tuple[int, int]]

    def without_metadata(self, data: bytes) -> bytes:
        """Return the file without EXIF, profiles, previews and comments."""
        return b"".join(data[start:stop] for start, stop in self.parts)


def read_jpeg_header(data: bytes) -> JpegHeader:
    """Read the segments of a JPEG before its pixels. Raises BadImage if it is damaged, or has too many scans."""
    width, height, components, orientation = 0, 0, b"", 0
    offset, part_start, multi_scan = 2, 0, False
    parts: list[tuple[int, int]] = []
    for _ in range(_MAX_SEGMENTS):
        head = data[offset : offset + 10]
        if head[:2] == b"\xff\xff":  # a fill byte
            offset += 1
            continue
        if len(head) < 5 or head[0] != 0xFF:
            break
        marker, length = head[1], head[2] << 8 | head[3]
        if marker == 0xDA:  # start of the pixels
            if multi_scan or head[4:5] != components:
                _check_scans(data.count(b"\xff\xda", offset), width * height)
            parts.append((part_start, len(data)))
            return JpegHeader(width, height, ord(components or b"\0"), orientation or 1, parts)
        if length < 2 or marker < 2 or 0xD0 <= marker <= 0xD9:
            break
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:  # F7 is JPEG-LS
            multi_scan, components = marker not in (0xC0, 0xC1), head[9:10]
            width, height = int.from_bytes(head[7:9], "big"), int.from_bytes(head[5:7], "big")
        elif marker == 0xE1 and not orientation and head[4:] == b"Exif\0\0":
            orientation = exif_orientation(data[offset + 10 : offset + 2 + length])
        if (0xE1 <= marker <= 0xEF and marker != 0xEE) or marker == 0xFE:  # EE is Adobe's color transform: keep it
            parts.append((part_start, offset))
            part_start = offset + 2 + length
        offset += 2 + length
    if offset + 10 > len(data):
        raise BadImage("a JPEG that is truncated before its pixels")
    raise BadImage("not an image in a known format: a damaged JPEG")


def _check_scans(scans: int, pixels: int) -> None:
    if scans > _MAX_SCANS or scans * pixels > _MAX_SCANNED_PIXELS:
        raise BadImage(f"a JPEG of {scans} scans over {pixels:,} pixels")


def webp_size(data: bytes) -> tuple[int, int]:
    """Return width and height of a WebP file; of an animation, those of its canvas."""

    def integer(offset: int, count: int) -> int:
        return int.from_bytes(data[offset : offset + count], "little")

    if data[12:16] == b"VP8X":
        return integer(24, 3) + 1, integer(27, 3) + 1
    if data[12:16] == b"VP8L":
        return (integer(21, 4) & 0x3FFF) + 1, (integer(21, 4) >> 14 & 0x3FFF) + 1
    return integer(26, 2) & 0x3FFF, integer(28, 2) & 0x3FFF
