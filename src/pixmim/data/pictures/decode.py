"""Bytes to pixels: any picture file a folder may hold, in the form of a run.

simplejpeg decodes ordinary JPEGs (the same pixels as Pillow's, faster); `npy` and `tiff` what they are named after;
imagecodecs 16-bit colour PNG; Pillow everything else. Rules:
- EXIF orientation is applied; ICC profiles are not (values are taken as sRGB, as in ImageNet training).
- Transparent pixels lie on white, and transparency is never a channel. Of an animation, the first frame counts.
- Files say by their content what they are, whatever their names end with.
- Channels and depths become the run's by the rules of `convert`. Colour of 16 bits keeps them in a run of uint16 or
  float32; in a run of uint8, Pillow takes their upper byte. Grey of 16 bits is rounded to 8.
"""

import io
import logging
import warnings
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from pixmim.data.pictures import npy, tiff
from pixmim.data.pictures.convert import OtherChannels, bring, on_white, turned
from pixmim.data.pictures.limits import check_bytes, check_size
from pixmim.data.source import COLOUR, BadImage, Form, Pages
from pixmim.transforms import Array

for _name in ("PIL", "tifffile"):  # what they say of damage belongs into skipped.csv, not onto the screen
    logging.getLogger(_name).addHandler(logging.NullHandler())

_ORIENTATION = 0x0112
_BITS, _SAMPLES, _EXTRA, _KIND, _PHOTOMETRIC, _DEPTH = 258, 277, 338, 339, 262, 32997


def decode(data: bytes, form: Form = COLOUR) -> Array:
    """Decode a picture file to (h w form.channels) of form.pixels. Raises BadImage with the reason if that fails."""
    if data[:3] == b"\xff\xd8\xff" and form.channels in (1, 3):
        fast = _decode_jpeg(data, form.channels)
        if fast is not None:
            return bring(fast, form)
    pixels = read(data, form.pages, deep=form.pixels != "uint8")
    try:
        return np.ascontiguousarray(bring(pixels, form))
    except OtherChannels as error:
        count = tiff.count_pages(data) if data[:4] in tiff.MAGIC and form.pages == "first" else 1
        more = f"; or --pages channels, for its {count} pages" if count > 1 else ""
        raise BadImage(f"{error}{more}") from None


def read(data: bytes, pages: Pages = "first", *, deep: bool = True) -> Array:
    """The pixels of a file (h w c), with the channels and numbers that it has itself. Raises BadImage.

    deep  keep the 16 bits of colour; otherwise Pillow gives 8 of them, and nothing else is needed to read them
    """
    if not data:
        raise BadImage("the file is empty")
    if data[:6] == npy.MAGIC:
        return npy.read_npy(data)
    # The header comes first in a PNG; bit depth and colour type are bytes 24 and 25, and type 0 is grey.
    if deep and data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10" and data[25:26] != b"\0":
        return _read_deep_png(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of bombs; the check below refuses them
            with Image.open(io.BytesIO(data)) as image:
                check_size(*image.size)
                if image.format == "TIFF" and not _pillow_reads(image, pages, deep):
                    return tiff.read_tiff(data, pages)
                if image.format == "PPM" and deep and image.mode == "RGB" and _most(image) > 255:
                    raise BadImage("Pillow reads 8 bits of 16-bit colour PPM: save it as PNG or TIFF")
                image.load()
                if image.format == "PPM" and image.mode == "I":  # 16-bit grey, which Pillow holds in 32 bits
                    return np.asarray(image).astype(np.uint16)[..., None]
                return _to_array(ImageOps.exif_transpose(image))
    except BadImage:
        raise
    except UnidentifiedImageError:
        if data[:4] in tiff.MAGIC:
            return tiff.read_tiff(data, pages)
        raise BadImage("not a picture in a known format") from None
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise BadImage(f"{type(error).__name__}: {error}") from None


def _decode_jpeg(data: bytes, channels: int) -> Array | None:
    """The pixels of a plain JPEG, or None if Pillow should have a look at it."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    check_size(width, height)
    # A rotated picture is left to Pillow; the search costs a microsecond, reading all EXIF a tenth of the decoding.
    if colours in ("CMYK", "YCCK") or (_has_exif(data) and _orientation(data) != 1):
        return None
    try:
        return simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY")
    except ValueError:  # damaged, or unusual: Pillow decides which, and words the reason
        return None


def _has_exif(data: bytes) -> bool:
    """Whether EXIF stands before the pixels of a JPEG, or something that is not understood."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        if data[at + 1] == 0xDA:  # here the pixels begin
            return False
        if data[at + 1] == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            return True
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return True


def _orientation(data: bytes) -> int:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # a broken EXIF block says nothing about the pixels
        return 1


def _to_array(image: Image.Image) -> Array:
    """What Pillow has loaded, as (h w c) without transparency: uint8, uint16, or measured values as they are."""
    if image.mode.startswith("I") or image.mode == "F":
        values: Array = np.asarray(image)
        if "transparency" in image.info:
            values = np.where(values == image.info["transparency"], np.iinfo(values.dtype).max, values)
        return values[..., None]
    bands = image.getbands()
    if "A" in bands or "a" in bands or "transparency" in image.info:
        picture = image.convert("RGBA")
        grey = bands[0] == "L"
        image = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        image = image.convert("L" if grey else "RGB")
    pixels = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _pillow_reads(image: Image.Image, pages: Pages, deep: bool) -> bool:
    """Whether Pillow gives all of the samples of a TIFF, and of their bits, and understands them as they are meant."""
    tags: Any = image.tag_v2  # type: ignore[attr-defined]
    samples, extra = tags.get(_SAMPLES, 1), tags.get(_EXTRA, ())
    if tags.get(_DEPTH, 1) != 1 or (pages == "channels" and getattr(image, "n_frames", 1) > 1):
        return False
    if any(kind != 1 for kind in tags.get(_KIND, (1,))) or samples != len(image.getbands()):
        return False
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") and extra[:1] not in ((1,), (2,)):
        return False  # a fourth channel that nothing calls transparency
    if max(tags.get(_BITS, (1,))) <= 8:
        return True
    if image.mode.startswith("I;16"):
        return tags[_BITS] == (16,) and tags.get(_PHOTOMETRIC) == 1
    return not deep and image.mode not in ("I", "F")


def _most(image: Any) -> int:
    """The greatest value that a PPM may hold."""
    arguments = image.tile[0].args
    most = arguments[-1] if isinstance(arguments, tuple) else 255
    return most if isinstance(most, int) else 255


def _read_deep_png(data: bytes) -> Array:
    try:
        import imagecodecs
    except ImportError:
        raise BadImage("16-bit colour PNG needs imagecodecs: pip install 'pixmim[tiff]'") from None
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    check_size(width, height)
    check_bytes(width * height * 8)
    try:
        pixels: Array = imagecodecs.png_decode(data)
    except Exception as error:
        raise BadImage(f"{type(error).__name__}: {error}") from None
    if pixels.shape[2] in (2, 4):
        pixels = on_white(pixels[..., :-1], pixels[..., -1], multiplied=False)
    return turned(pixels, _orientation(data))
