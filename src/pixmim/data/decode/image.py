"""Decode image files.

simplejpeg decodes common JPEGs (the same pixels as Pillow, faster), `scientific` and `dicom` what Pillow does not read,
and Pillow everything else. Rules:
- EXIF orientation is applied. ICC profiles are ignored: values are taken as sRGB, as in ImageNet training.
- Transparency is composited on white, and is never a channel. Of an animation, the first frame is read.
- The format is decided by content, whatever a file's extension is.
- `channels.convert` converts to the run's channels and dtype. 16-bit color keeps its bits in a run of uint16 or
  float32; for uint8, Pillow takes the upper byte. 16-bit grey is rounded to 8 bits.
"""

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, ImageCms, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin

from pixmim.data.dataset import RGB, BadImage, ImageSpec, TiffPages
from pixmim.data.decode import headers
from pixmim.data.decode.channels import ChannelMismatch, apply_exif_orientation, convert, stretch
from pixmim.data.decode.dicom import is_dicom, read_dicom
from pixmim.data.decode.kinds import HEAD_BYTES, identify
from pixmim.data.decode.limits import MAX_PIXELS_VARIABLE, check_size, library_errors, max_pixels, run_with_time_limit
from pixmim.data.decode.no_data import TAG, NoData, fill_no_data, parse_no_data
from pixmim.data.decode.scientific import NPY_MAGIC, read_npy, read_png16, read_tiff
from pixmim.transforms.crops import Array

_PLUGINS = (TiffImagePlugin, WebPImagePlugin)  # imported to register them; `Image.open` registers the others

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM")
"""Pillow's names of the formats that are read. No other format is ever opened."""

ALL_BITS = ImageSpec(dtype="uint16")
"""For `read`: no bit of color is dropped."""

_BLOCK = 2**20  # pixels that Pillow converts at a time
_BITS, _PHOTOMETRIC, _SAMPLES, _PLANAR, _EXTRA_SAMPLES, _SAMPLE_FORMAT, _DEPTH = 258, 262, 277, 284, 338, 339, 32997


def decode(data: bytes, image_spec: ImageSpec = RGB) -> Array:
    """Decode an image file to pixels (h w c), with the channels and dtype of `image_spec`. Raises BadImage."""
    if data.startswith(headers.JPEG_MAGIC) and image_spec.channels in (1, 3):
        pixels = _decode_jpeg(data, 3 if image_spec.stretch else image_spec.channels)  # stretched first, then gray
        if pixels is not None:
            return convert(stretch(pixels, image_spec), image_spec)
    pixels = read(data, image_spec)
    try:
        return np.ascontiguousarray(convert(pixels, image_spec))
    except ChannelMismatch as error:
        is_tiff = data[:4] in headers.TIFF_MAGIC and not is_dicom(data)
        pages = headers.count_pages(data) if is_tiff and image_spec.tiff_pages == "first" else 1
        hint = f"; or --tiff-pages channels, for its {pages} pages" if pages > 1 else ""
        raise BadImage(f"{error}{hint}") from None


def read(data: bytes, image_spec: ImageSpec = ALL_BITS) -> Array:
    """Decode an image file to pixels (h w c) with its own channels and dtype, ready for `convert` to `image_spec`.

    Pages of TIFF and DICOM, percentiles to stretch, which give pixels of its dtype, and the largest share without data
    are those of `image_spec`. For uint8 without stretching, Pillow reads the upper 8 of 16 bits of color, and no other
    library is needed. For float32, DICOM is read as measurements.

    Raises:
        BadImage: If that is not possible.
    """
    return run_with_time_limit(lambda: _read(data, image_spec))


def read_numbers(data: bytes, *, color: bool = False) -> Array:
    """Read the values (h w) of a mask: grey values or palette indices; or with `color`, 0 where there is no object.

    With `color`, pixels without an object are black. A palette that does not use black has index 0 there.

    Raises:
        BadImage: If that is not possible, or the image has neither grey values nor a palette and `color` is False.
    """
    return run_with_time_limit(lambda: _read_numbers(data, color))


def open_image(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Open an image file with Pillow. Only the header is read; load the pixels under `limits.run_with_time_limit`.

    Raises:
        BadImage: If it has none of `formats`, is damaged, or claims more than is allowed.
    """
    if data.startswith(headers.JPEG_MAGIC):
        data = headers.read_jpeg_header(data).without_metadata(data)
    elif data[:4] in headers.TIFF_MAGIC and "TIFF" in formats:
        return _open_checked(headers.sanitize_tiff(data), ("TIFF",))
    return _open_checked(data, tuple(name for name in formats if name != "TIFF"))


def _open_checked(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """Open a file with Pillow; a TIFF or a JPEG must have passed the checks of `headers`.

    Raises:
        BadImage: As `open_image`. Its cause is Pillow's UnidentifiedImageError if no format was recognized.
    """
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        check_size(*headers.webp_size(data))  # Pillow allocates memory for it on opening
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels() > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels()  # Pillow refuses above twice this number
    with library_errors():
        try:
            image = Image.open(io.BytesIO(data), formats=formats)
        except UnidentifiedImageError as error:
            kind = identify(data[:HEAD_BYTES])
            raise BadImage("not an image in a known format" + f", but {kind}" * bool(kind)) from error
        except Image.DecompressionBombError:
            raise BadImage(
                f"more than the {max_pixels():,} pixels allowed on this machine (see {MAX_PIXELS_VARIABLE})"
            ) from None
    check_size(*image.size)
    return image


def _decode_jpeg(data: bytes, channels: int) -> Array | None:
    """Decode a common JPEG; None leaves it to Pillow."""
    header = headers.read_jpeg_header(data)
    check_size(header.width, header.height)
    if header.channels == 4:
        return None
    try:
        pixels: Array = simplejpeg.decode_jpeg(data, "RGB" if channels == 3 else "GRAY")
    except ValueError:  # damaged or unusual: Pillow decides which, and reports it
        return None
    return apply_exif_orientation(pixels, header.orientation)


def _read(data: bytes, image_spec: ImageSpec) -> Array:
    pixels, no_data = _read_stored(data, image_spec)
    no_data = no_data.of_channels(pixels.shape[2])
    return fill_no_data(stretch(pixels, image_spec, no_data.missing), no_data, image_spec.max_no_data)


def _read_stored(data: bytes, image_spec: ImageSpec) -> tuple[Array, NoData]:
    """Decode an image file; also return where it has no data, as the values in it say."""
    deep = image_spec.dtype != "uint8" or bool(image_spec.stretch)
    if not data:
        raise BadImage("the file is empty")
    if data.startswith(NPY_MAGIC):
        return read_npy(data), NoData()
    # Bytes 24 and 25 of a PNG are the bit depth and the color type; type 0 is grey.
    if deep and data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10" and data[25:26] != b"\0":
        with open_image(data, ("PNG",)) as image:  # reads the chunks before the pixels
            width, height = image.size
            orientation = _orientation(image)
        return read_png16(data, width, height, orientation), NoData()
    if is_dicom(data):  # before TIFF, whose header some files have in their preamble
        dtype = "uint16" if deep and image_spec.dtype == "uint8" else image_spec.dtype
        return read_dicom(data, image_spec.tiff_pages, dtype), NoData()
    if data[:4] in headers.TIFF_MAGIC:
        tiff = headers.sanitize_tiff(data, image_spec.tiff_pages)
        return _read_tiff(tiff, image_spec.tiff_pages, deep)
    with open_image(data) as image:
        if image.format == "PPM" and deep and image.mode == "RGB" and _ppm_max_value(image) > 255:
            raise BadImage("Pillow reads only 8 bits of 16-bit color PPM: save it as PNG or TIFF")
        with library_errors():
            image.load()
            if image.format == "PPM" and image.mode == "I":  # 16-bit grey, which Pillow holds in 32 bits
                return _map_blocks(lambda block: np.asarray(block, np.uint16)[..., None], image), NoData()
            return apply_exif_orientation(_to_array(image), _orientation(image)), NoData()


def _read_tiff(data: bytes, pages: TiffPages, deep: bool) -> tuple[Array, NoData]:
    """Read a sanitized TIFF, with Pillow if it supports all of it; also return where it has no data."""
    header = headers.TiffHeader(data)
    if header.value(header.pages(1)[0], _SAMPLES, 1) > TiffImagePlugin.MAX_SAMPLESPERPIXEL:
        return read_tiff(data, pages)  # Pillow would log an error for each such file
    try:
        image = _open_checked(data, ("TIFF",))
    except BadImage as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            return read_tiff(data, pages)
        raise
    with image:
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        value = parse_no_data(tags.get(TAG))
        if not _pillow_supports(image, tags, deep or value is not None):
            return read_tiff(data, pages)
        if pages == "channels" and headers.count_pages(data) > 1:
            return read_tiff(data, pages)
        with library_errors():
            image.load()  # applies the orientation, too
            return _to_array(image), NoData.find(_stored_values(image, tags) if value is not None else None, value)


def _read_numbers(data: bytes, color: bool) -> Array:
    with open_image(data) as image, library_errors():
        image.load()
        is_grey = image.mode in ("1", "L") or image.mode.startswith("I") or (color and image.mode == "F")
        if not color and not is_grey and image.mode != "P":
            raise BadImage(f"an image of mode {image.mode} instead of class numbers: save it as grey or palette PNG")
        if color and not is_grey:
            brightness = _map_blocks(lambda block: np.asarray(block.convert("RGB")).max(axis=2), image)
            if image.mode != "P" or not brightness.all():  # programs order the colors of a palette as they like
                return brightness
        return _map_blocks(np.asarray, image)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an open image. A damaged EXIF block is ignored."""
    exif = image.info.get("exif")
    if not exif and "Raw profile type exif" in image.info:  # ImageMagick in PNG: hexadecimal, after three lines
        try:
            exif = bytes.fromhex("".join(image.info["Raw profile type exif"].split("\n")[3:]))
        except (AttributeError, ValueError):
            return 1
    return headers.exif_orientation(exif) if isinstance(exif, bytes) else 1


def _map_blocks(function: Callable[[Image.Image], Array], image: Image.Image) -> Array:
    """Apply a function to blocks of rows of an image, since Pillow makes several copies of its input."""
    step = max(1, _BLOCK // image.width)
    if image.height <= step:
        return function(image)
    result: Array | None = None
    for top in range(0, image.height, step):
        block = function(image.crop((0, top, image.width, min(top + step, image.height))))
        if result is None:
            result = np.empty((image.height, *block.shape[1:]), block.dtype)
        result[top : top + len(block)] = block
    assert result is not None
    return result


def _to_array(image: Image.Image) -> Array:
    """Return a loaded image as (h w c) without transparency: uint8, uint16, or measurements."""
    if image.mode.startswith("I") or image.mode == "F":
        return _map_blocks(_values, image)
    return _map_blocks(_colors, image)


def _values(image: Image.Image) -> Array:
    values: Array = np.asarray(image)
    values = values.astype(values.dtype.newbyteorder("="), copy=False)  # Pillow keeps a TIFF's byte order
    if "transparency" in image.info:
        values = np.where(values == image.info["transparency"], np.iinfo(values.dtype).max, values)
    return values[..., None]


def _stored_values(image: Image.Image, tags: Any) -> Array:
    """Return the values (h w c) in a TIFF that Pillow has loaded, from which it made its pixels: without opacity."""
    values: Array = np.asarray(image)
    if image.mode in ("1", "L"):
        largest = 2 ** tags.get(_BITS, (1,))[0] - 1
        values = np.rint(values * (largest / (1 if image.mode == "1" else 255))).astype(np.uint8)
        if tags.get(_PHOTOMETRIC) == 0:  # white is zero
            values = largest - values
    if values.ndim == 2:
        return values[..., None]
    return values[..., :-1] if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") else values


def _colors(image: Image.Image) -> Array:
    if image.mode == "La":  # premultiplied: Pillow converts it to LA only
        image = image.convert("LA")
    if image.mode == "LAB":
        lab, srgb = (ImageCms.ImageCmsProfile(ImageCms.createProfile(name)) for name in ("LAB", "sRGB"))
        image = ImageCms.ImageCmsTransform(lab, srgb, "LAB", "RGB", ImageCms.Intent.PERCEPTUAL).apply(image)
    bands = image.getbands()
    if "A" in bands or "a" in bands or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
        image = image.convert("L" if bands[0] == "L" else "RGB")
    mode = "L" if image.mode in ("1", "L") else "RGB"
    pixels = np.asarray(image if image.mode == mode else image.convert(mode))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _pillow_supports(image: Image.Image, tags: Any, deep: bool) -> bool:
    """Return True if Pillow reads all samples and bits of a TIFF, with the meaning that its tags give them.

    Of planes, it reads the first bytes of 16-bit values, and some with opacity in the wrong order.
    """
    planar = tags.get(_PLANAR) == 2 and tags.get(_SAMPLES, 1) > 1
    if tags.get(_DEPTH, 1) != 1 or (planar and (image.mode != "RGB" or max(tags.get(_BITS, (1,))) > 8)):
        return False
    if any(kind != 1 for kind in tags.get(_SAMPLE_FORMAT, (1,))) or tags.get(_SAMPLES, 1) != len(image.getbands()):
        return False
    if image.mode in ("LA", "La", "RGBA", "RGBa", "PA") and tags.get(_EXTRA_SAMPLES, ())[:1] not in ((1,), (2,)):
        return False  # a fourth channel that is not tagged as transparency
    if max(tags.get(_BITS, (1,))) <= 8:
        return True
    if image.mode.startswith("I;16"):
        return tags[_BITS] == (16,) and tags.get(_PHOTOMETRIC) == 1
    return not deep and image.mode not in ("I", "F")


def _ppm_max_value(image: Any) -> int:
    arguments = image.tile[0].args
    value = arguments[-1] if isinstance(arguments, tuple) else 255
    return value if isinstance(value, int) else 255
