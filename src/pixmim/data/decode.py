"""Bytes to pixels: any picture file a folder may hold, as uint8 in one or three channels.

simplejpeg decodes ordinary JPEGs (the same pixels as Pillow's, faster); Pillow decodes everything else. Rules:
- EXIF orientation is applied; ICC profiles are not (values are taken as sRGB, as in ImageNet training).
- Transparent pixels lie on white. Of an animation, the first frame counts.
- 16-bit images are scaled to 8 bits (65535 -> 255).
"""

import io
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from pixmim.data.source import BadImage

MAX_PIXELS = 120_000_000
"""A picture that claims more pixels is refused before it is decoded: a decompression bomb, or a mistake."""

MAX_ASPECT = 100
"""A picture longer than this many times its width is refused: resizing its short edge would fill the memory."""

Pixels = npt.NDArray[np.uint8]

_ORIENTATION = 0x0112


def decode(data: bytes, channels: int = 3) -> Pixels:
    """Decode a picture file to uint8 (h w channels). Raises BadImage with the reason if that is impossible."""
    if not data:
        raise BadImage("the file is empty")
    if data[:3] == b"\xff\xd8\xff":
        fast = _decode_jpeg(data, channels)
        if fast is not None:
            return fast
    return _decode_other(data, channels)


def _decode_jpeg(data: bytes, channels: int) -> Pixels | None:
    """The pixels of a plain JPEG, or None if Pillow should have a look at it."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(width, height)
    # A rotated picture is left to Pillow; the search costs microseconds, reading all EXIF a tenth of the decoding.
    if colours in ("CMYK", "YCCK") or (b"Exif\0\0" in data[:4096] and _orientation(data) != 1):
        return None
    try:
        return simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY")
    except ValueError:  # damaged, or unusual: Pillow decides which, and words the reason
        return None


def _orientation(data: bytes) -> int:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a broken EXIF block says nothing about the pixels
        return 1


def _decode_other(data: bytes, channels: int) -> Pixels:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of bombs; the check below refuses them
            with Image.open(io.BytesIO(data)) as image:
                _check_size(*image.size)
                image.load()
                return _to_uint8(ImageOps.exif_transpose(image), channels)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("not a picture in a known format") from None
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise BadImage(f"{type(error).__name__}: {error}") from None


def _to_uint8(image: Image.Image, channels: int) -> Pixels:
    if image.mode == "F":
        raise BadImage("a floating-point picture: convert it to 8 or 16 bits first")
    if image.mode.startswith("I"):
        values: npt.NDArray[Any] = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage("a 32-bit picture: convert it to 8 or 16 bits first")
        image = Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        picture = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    return pixels.reshape(*pixels.shape[:2], channels)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}x{height} pixels are more than the {MAX_PIXELS:,} allowed")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(f"{width}x{height} pixels: more than {MAX_ASPECT} times as long as wide")
