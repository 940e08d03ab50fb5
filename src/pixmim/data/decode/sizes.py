"""Sizes that compressed images state in their headers: what their decoders take memory for."""

import struct

from pixmim.data.dataset import BadImage
from pixmim.data.decode import jpeg

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


def lerc(data: bytes) -> tuple[int, int, int]:
    """Return width, height and channels of a LERC block. Raises BadImage for old versions of the format."""
    if data[:6] != b"Lerc2 " or len(data) < 26 or _number(data, 6, 4) < 4:
        raise BadImage("LERC of an old version: save it with deflate or LZW")
    height, width, channels = struct.unpack_from("<III", data, 14)
    return width, height, channels


def check_segment(data: bytes, compression: int, values: int) -> None:
    """Refuse a strip or tile of a TIFF, of a compression in CHECKED, that states many more values than it should have.

    Raises:
        BadImage: If it does.
    """
    width, height, channels = jpeg.look(data)[:3] if compression == _JPEG else lerc(data)
    if width * height * channels > 2 * values + 2**16:
        raise BadImage(f"a TIFF with a strip or tile of {width}x{height} pixels, {channels} channels: far too many")


def _number(data: bytes, at: int, count: int) -> int:
    return int.from_bytes(data[at : at + count], "little")
