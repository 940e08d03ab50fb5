"""The structure of a JPEG up to its pixels, read before a decoder does."""

from typing import NamedTuple

from pixmim.data.dataset import BadImage
from pixmim.data.decode.ifd import orientation
from pixmim.data.decode.limits import MAX_SCANS

_MAX_SEGMENTS = 10_000
_MAX_WORK = MAX_SCANS * 24_000_000  # scans times pixels


class Head(NamedTuple):
    """What a JPEG states before its pixels.

    orientation  EXIF's, 1 to 8
    plain        the file without EXIF, profiles, previews and comments, as parts
    """

    width: int
    height: int
    channels: int
    orientation: int
    plain: list[tuple[int, int]]

    def stripped(self, data: bytes) -> bytes:
        """The file without metadata, which decoders would read."""
        return b"".join(data[start:stop] for start, stop in self.plain)


def look(data: bytes) -> Head:
    """Read the segments before the pixels.

    Raises:
        BadImage: If there are none, or more scans than are allowed.
    """
    frame, components, turned = (0, 0, 0), b"", 0
    at, kept, several = 2, 0, False
    plain: list[tuple[int, int]] = []
    for _ in range(_MAX_SEGMENTS):
        head = data[at : at + 10]
        if head[:2] == b"\xff\xff":  # a fill byte
            at += 1
            continue
        if len(head) < 5 or head[0] != 0xFF:
            break
        marker, length = head[1], head[2] << 8 | head[3]
        if marker == 0xDA:  # here the pixels begin
            if several or head[4:5] != components:
                _check_scans(data.count(b"\xff\xda", at), frame[0] * frame[1])
            plain.append((kept, len(data)))
            return Head(*frame, turned or 1, plain)
        if length < 2 or marker < 2 or 0xD0 <= marker <= 0xD9:
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            several, components = marker not in (0xC0, 0xC1), head[9:10]
            frame = int.from_bytes(head[7:9], "big"), int.from_bytes(head[5:7], "big"), ord(components or b"\0")
        elif marker == 0xE1 and not turned and head[4:] == b"Exif\0\0":
            turned = orientation(data[at + 10 : at + 2 + length])
        if (0xE1 <= marker <= 0xEF and marker != 0xEE) or marker == 0xFE:  # Adobe's, EE, says how colors are stored
            plain.append((kept, at))
            kept = at + 2 + length
        at += 2 + length
    if at + 10 > len(data):
        raise BadImage("a JPEG that is truncated before its pixels")
    raise BadImage("not a picture in a known format: a damaged JPEG")


def _check_scans(count: int, pixels: int) -> None:
    if count > MAX_SCANS or count * pixels > _MAX_WORK:
        raise BadImage(f"a JPEG of {count} scans over {pixels:,} pixels")
