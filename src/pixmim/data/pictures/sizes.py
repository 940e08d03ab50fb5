"""Sizes that compressed images state in their headers: what their decoders take memory for."""

import struct

from pixmim.data.pictures import jpeg
from pixmim.data.source import BadImage

_JPEG, _LERC = 7, 34887
CHECKED = (_JPEG, _LERC)
"""Compressions of TIFF whose strips and tiles state their size themselves."""


def webp(data: bytes) -> tuple[int, int]:
    """Return width and height of a WebP; of an animation, those of its canvas."""
    if data[12:16] == b"VP8X":
        return _number(data, 24, 3) + 1, _number(data, 27, 3) + 1
    if data[12:16] == b"VP8L":
        bits = _number(data, 21, 4)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return _number(data, 26, 2) & 0x3FFF, _number(data, 28, 2) & 0x3FFF


def lerc(data: bytes) -> tuple[int, int]:
    """Return width and height of a LERC block. Raises BadImage for the first version of the format."""
    if data[:6] != b"Lerc2 " or len(data) < 22:
        raise BadImage("LERC of an old version: save it with deflate or LZW")
    (version,) = struct.unpack_from("<i", data, 6)
    height, width = struct.unpack_from("<II", data, 14 if version > 2 else 10)
    return width, height


def check_segment(data: bytes, compression: int, pixels: int) -> None:
    """Refuse a strip or tile of a TIFF, of a compression in CHECKED, that states many more pixels than it should have.

    Raises:
        BadImage: If it does.
    """
    width, height = jpeg.look(data)[:2] if compression == _JPEG else lerc(data)
    if width * height > 2 * pixels + 2**16:
        raise BadImage(f"a TIFF with a strip or tile of {width}x{height} pixels instead of {pixels:,}")


def _number(data: bytes, at: int, count: int) -> int:
    return int.from_bytes(data[at : at + count], "little")
