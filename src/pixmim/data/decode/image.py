"""Bytes to pixels: any picture file a folder may hold, in the form of a run.

simplejpeg decodes ordinary JPEGs (the same pixels as Pillow's, faster); `npy` and `tiff` what they are named after;
imagecodecs 16-bit color PNG; Pillow everything else. Rules:
- EXIF orientation is applied; ICC profiles are not (values are taken as sRGB, as in ImageNet training).
- Transparent pixels lie on white, and transparency is never a channel. Of an animation, the first frame counts.
- Files say by their content what they are, whatever their names end with.
- Channels and depths become the run's by the rules of `convert`. Color of 16 bits keeps them in a run of uint16 or
  float32; in a run of uint8, Pillow takes their upper byte. Grey of 16 bits is rounded to 8.
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import simplejpeg
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageCms,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from pixmim.data.dataset import RGB, BadImage, ImageSpec, TiffPages
from pixmim.data.decode import ifd, jpeg, npy, tiff
from pixmim.data.decode.channels import ChannelMismatch, apply_exif_orientation, composite_on_white, convert
from pixmim.data.decode.kinds import HEAD, about
from pixmim.data.decode.limits import VARIABLE, check_bytes, check_size, max_pixels
from pixmim.data.decode.timing import limited
from pixmim.transforms.crops import Array

_PLUGINS = (  # imported, so that Pillow need not look for them among all the others
    BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, PpmImagePlugin, TiffImagePlugin, WebPImagePlugin,
)  # fmt: skip

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM")
"""Every format that an image may have. Nothing else is ever opened, whatever a file is called or begins with."""

_BLOCK = 2**20  # pixels that Pillow converts at a time
_BITS, _SAMPLES, _EXTRA, _KIND, _PHOTOMETRIC, _DEPTH, _PLANAR = 258, 277, 338, 339, 262, 32997, 284
_APART = 2  # a plane for each channel


def decode(data: bytes, form: ImageSpec = RGB) -> Array:
    """Decode a picture file to (h w form.channels) of form.dtype. Raises BadImage with the reason if that fails."""
    if data[:3] == b"\xff\xd8\xff" and form.channels in (1, 3):
        fast = _decode_jpeg(data, form.channels)
        if fast is not None:
            return convert(fast, form)
    pixels = read(data, form.tiff_pages, deep=form.dtype != "uint8")
    try:
        return np.ascontiguousarray(convert(pixels, form))
    except ChannelMismatch as error:
        count = ifd.count_pages(data) if data[:4] in ifd.MAGIC and form.tiff_pages == "first" else 1
        more = f"; or --tiff-pages channels, for its {count} pages" if count > 1 else ""
        raise BadImage(f"{error}{more}") from None


def read(data: bytes, pages: TiffPages = "first", *, deep: bool = True) -> Array:
    """The pixels of a file (h w c), with the channels and numbers that it has itself. Raises BadImage.

    deep  keep the 16 bits of color; otherwise Pillow gives 8 of them, and nothing else is needed to read them
    """
    return limited(lambda: _read(data, pages, deep))


def read_numbers(data: bytes, *, color: bool = False) -> Array:
    """Return the numbers (h w) that a mask holds: of a palette image the indices.

    Args:
        data: The file's content.
        color: Take the luma of a color image, instead of refusing it.

    Raises:
        BadImage: If it cannot be read.
    """
    return limited(lambda: _read_numbers(data, color))


def open_image(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Open an image file as `Image.open` does: only its header is read, the caller loads the pixels.

    The format is decided by content, among `formats`. Decode pixels under `timing.limited`.

    Args:
        data: The file's content.
        formats: Some of FORMATS.

    Raises:
        BadImage: If it has none of these formats, is damaged, or claims more than is allowed.
    """
    if data[:3] == b"\xff\xd8\xff":
        data = jpeg.look(data).stripped(data)
    elif data[:4] in ifd.MAGIC and "TIFF" in formats:
        return _open_checked(ifd.checked(data), ("TIFF",))
    return _open_checked(data, tuple(name for name in formats if name != "TIFF"))


def _open_checked(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """Open an image file that was looked at before: a TIFF by `ifd.checked`, a JPEG by `jpeg.look`.

    Raises:
        BadImage: As `open_image`. UnidentifiedImageError, which is Pillow's, is its cause if no format was recognized.
    """
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        check_size(*_webp_size(data))  # Pillow takes memory for it when it opens the file
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels() > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels()  # Pillow refuses twice as many
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError as error:
        kind = about(data[:HEAD])
        raise BadImage("not a picture in a known format" + f", but {kind}" * bool(kind)) from error
    except Image.DecompressionBombError:
        raise BadImage(f"more than the {max_pixels():,} pixels allowed on this machine (see {VARIABLE})") from None
    except Exception as error:  # Pillow raises almost anything on damaged files
        raise BadImage(f"{type(error).__name__}: {error}") from None
    check_size(*image.size)
    return image


def _webp_size(data: bytes) -> tuple[int, int]:
    """Return width and height of a WebP; of an animation, those of its canvas."""

    def number(at: int, count: int) -> int:
        return int.from_bytes(data[at : at + count], "little")

    if data[12:16] == b"VP8X":
        return number(24, 3) + 1, number(27, 3) + 1
    if data[12:16] == b"VP8L":
        return (number(21, 4) & 0x3FFF) + 1, (number(21, 4) >> 14 & 0x3FFF) + 1
    return number(26, 2) & 0x3FFF, number(28, 2) & 0x3FFF


def _read(data: bytes, pages: TiffPages, deep: bool) -> Array:
    if not data:
        raise BadImage("the file is empty")
    if data[:6] == npy.MAGIC:
        return npy.read_npy(data)
    # The header comes first in a PNG; bit depth and color type are bytes 24 and 25, and type 0 is grey.
    if deep and data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10" and data[25:26] != b"\0":
        return _read_deep_png(data)
    if data[:4] in ifd.MAGIC:
        return _read_tiff(ifd.checked(data, pages), pages, deep)
    with open_image(data, FORMATS) as image:
        if image.format == "PPM" and deep and image.mode == "RGB" and _most(image) > 255:
            raise BadImage("Pillow reads 8 bits of 16-bit color PPM: save it as PNG or TIFF")
        _load(image)
        if image.format == "PPM" and image.mode == "I":  # 16-bit grey, which Pillow holds in 32 bits
            return _in_blocks(lambda rows: np.asarray(rows, np.uint16)[..., None], image)
        return apply_exif_orientation(_to_array(image), _orientation(image))


def _read_tiff(data: bytes, pages: TiffPages, deep: bool) -> Array:
    """The pixels of a TIFF that was checked: by Pillow, where that gives all of them as they are meant."""
    try:
        image = _open_checked(data, ("TIFF",))
    except BadImage as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            return tiff.read_tiff(data, pages)
        raise
    with image:
        if not _pillow_reads(image, deep) or (pages == "channels" and ifd.count_pages(data) > 1):
            return tiff.read_tiff(data, pages)
        _load(image)
        return _to_array(image)  # Pillow has turned it already


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:  # Pillow's decoders raise almost anything on damaged files
        raise BadImage(f"{type(error).__name__}: {error}") from None


def _read_numbers(data: bytes, color: bool) -> Array:
    with open_image(data) as image:
        _load(image)
        if image.mode in ("1", "L", "P") or image.mode.startswith("I"):
            return _in_blocks(np.asarray, image)
        if not color:
            raise BadImage(f"it holds no class numbers but a picture in mode {image.mode}")
        return _in_blocks(lambda rows: np.asarray(rows.convert("L")), image)


def _decode_jpeg(data: bytes, channels: int) -> Array | None:
    """The pixels of a plain JPEG, or None if Pillow should have a look at it."""
    head = jpeg.look(data)
    check_size(head.width, head.height)
    if head.channels == 4:
        return None
    try:
        pixels: Array = simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY")
    except ValueError:  # damaged, or unusual: Pillow decides which, and words the reason
        return None
    return apply_exif_orientation(pixels, head.orientation)


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation of an image that is open: a broken block says nothing about the pixels."""
    exif = image.info.get("exif")
    if not exif and "Raw profile type exif" in image.info:  # ImageMagick's way in PNG: hexadecimal, after three lines
        try:
            exif = bytes.fromhex("".join(image.info["Raw profile type exif"].split("\n")[3:]))
        except (AttributeError, ValueError):
            return 1
    return ifd.orientation(exif) if isinstance(exif, bytes) else 1


def _in_blocks(convert: Callable[[Image.Image], Array], image: Image.Image) -> Array:
    """Return what `convert` makes of an image. It gets some rows at a time, since Pillow makes several copies."""
    step = max(1, _BLOCK // image.width)
    if image.height <= step:
        return convert(image)
    result: Array | None = None
    for top in range(0, image.height, step):
        part = convert(image.crop((0, top, image.width, min(top + step, image.height))))
        if result is None:
            result = np.empty((image.height, *part.shape[1:]), part.dtype)
        result[top : top + len(part)] = part
    assert result is not None
    return result


def _to_array(image: Image.Image) -> Array:
    """What Pillow has loaded, as (h w c) without transparency: uint8, uint16, or measured values as they are."""
    if image.mode.startswith("I") or image.mode == "F":
        return _in_blocks(_values, image)
    return _in_blocks(_colors, image)


def _values(image: Image.Image) -> Array:
    values: Array = np.asarray(image)
    values = values.astype(values.dtype.newbyteorder("="), copy=False)  # of a TIFF, Pillow keeps the file's order
    if "transparency" in image.info:
        values = np.where(values == image.info["transparency"], np.iinfo(values.dtype).max, values)
    return values[..., None]


def _colors(image: Image.Image) -> Array:
    if image.mode == "LAB":
        lab, srgb = (ImageCms.ImageCmsProfile(ImageCms.createProfile(name)) for name in ("LAB", "sRGB"))
        image = ImageCms.ImageCmsTransform(lab, srgb, "LAB", "RGB", ImageCms.Intent.PERCEPTUAL).apply(image)
    bands = image.getbands()
    if "A" in bands or "a" in bands or "transparency" in image.info:
        picture = image.convert("RGBA")
        grey = bands[0] == "L"
        image = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        image = image.convert("L" if grey else "RGB")
    mode = "L" if image.mode in ("1", "L") else "RGB"
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _pillow_reads(image: Image.Image, deep: bool) -> bool:
    """Whether Pillow gives all of the samples of a TIFF, and of their bits, and understands them as they are meant."""
    tags: Any = image.tag_v2  # type: ignore[attr-defined]
    samples, extra = tags.get(_SAMPLES, 1), tags.get(_EXTRA, ())
    if tags.get(_DEPTH, 1) != 1 or (tags.get(_PLANAR) == _APART and image.mode in ("YCbCr", "LAB")):
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
        raise BadImage("16-bit color PNG needs imagecodecs: pip install 'pixmim[tiff]'") from None
    with open_image(data, ("PNG",)) as image:  # its chunks before the pixels: size and EXIF
        width, height = image.size
        orientation = _orientation(image)
    check_bytes(width * height * 8)
    try:
        pixels: Array = imagecodecs.png_decode(data)
    except Exception as error:
        raise BadImage(f"{type(error).__name__}: {error}") from None
    if pixels.shape[2] in (2, 4):
        pixels = composite_on_white(pixels[..., :-1], pixels[..., -1], multiplied=False)
    return apply_exif_orientation(pixels, orientation)
