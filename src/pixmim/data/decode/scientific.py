"""Read what Pillow does not: TIFF through tifffile, 16-bit color PNG through imagecodecs, and NumPy's .npy.

Rules for TIFF:
- The samples of a page are its channels, chunky or planar. An extra sample is transparency only if it is tagged so.
- As channels, all pages of the first one's size and dtype are used, except reduced copies (overviews).
- Packed values, such as of 12 bits, are fractions of their largest value; 12 bits stored in 16 are fractions of 65535.
- Unsigned values are inverted if zero is white (MinIsWhite).
- GDAL's tag names the value of pixels without data: see `no_data`.
"""

import io
import math
import struct
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.lib import format as npy_format

from pixmim.data.dataset import BadImage, TiffPages
from pixmim.data.decode.channels import apply_exif_orientation, composite_on_white
from pixmim.data.decode.headers import read_jpeg_header
from pixmim.data.decode.limits import check_bytes, check_size, library_errors
from pixmim.data.decode.no_data import TAG, NoData, parse_no_data
from pixmim.transforms.crops import Array
from pixmim.utils.errors import first_line

NPY_MAGIC = npy_format.MAGIC_PREFIX
_MAX_SIDE = 2**40

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2
_ASSOCIATED, _UNASSOCIATED = 1, 2
_ORIENTATION = 274
_OLD_JPEG, _JPEG, _LERC = 6, 7, 34887


def read_tiff(data: bytes, pages: TiffPages) -> tuple[Array, NoData]:
    """Read the first page of a TIFF, or all pages one after another, as (h w c), and where it has no data.

    `data` was sanitized. Raises BadImage.
    """
    try:
        import tifffile
    except ImportError:
        raise BadImage("Pillow cannot read this TIFF; tifffile may: pip install 'pixmim[tiff]'") from None
    with library_errors(imagecodecs="pip install 'pixmim[tiff]'"), tifffile.TiffFile(io.BytesIO(data)) as file:
        first: Any = file.pages.first
        chosen: list[Any] = [first] if pages == "first" else list(file.pages)
        if pages == "channels":
            same = [page for page in chosen if page.shape == first.shape and page.dtype == first.dtype]
            chosen = [page for page in same if not page.is_reduced]
        _check_page(first, len(chosen))
        value = parse_no_data(first.tags[TAG].value) if TAG in first.tags else None  # tifffile's is 0 for some
        parts = [_read_page(page, data, value) for page in chosen]
        if len(parts) == 1:
            return parts[0]
        missing = np.concatenate([no_data.missing for _, no_data in parts], axis=2)
        return np.concatenate([pixels for pixels, _ in parts], axis=2), NoData(missing, parts[0][1].value)


def _check_page(page: Any, count: int) -> None:
    """Check `count` pages like this one before memory is allocated for them."""
    check_size(page.imagewidth, page.imagelength)
    if page.compression == _OLD_JPEG:
        raise BadImage("a TIFF of old JPEG: save it with JPEG, deflate or LZW")
    if page.axes not in ("YX", "YXS", "SYX"):
        raise BadImage(f"axes {page.axes} instead of one image")
    if page.photometric is not None and int(page.photometric) not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB):
        raise BadImage(f"{page.photometric.name} of {page.bitspersample} bits: save it as grey or RGB")
    packed = page.dtype is not None and page.dtype.kind == "u" and page.bitspersample in range(2, 17)
    if page.dtype is None or page.dtype.kind not in "buif" or not (packed or page.bitspersample in (1, 8, 16, 32, 64)):
        raise BadImage(f"{page.bitspersample} bits per value: save it with 8, 16 or 32")
    check_bytes(page.nbytes * count)


def _read_page(page: Any, data: bytes, no_data_value: float | None) -> tuple[Array, NoData]:
    """Return one page as (h w c), with its orientation applied and without transparency, and where it has no data."""
    strip_pixels = page.tilewidth * page.tilelength if page.is_tiled else page.imagewidth * page.rowsperstrip
    if page.compression in (_JPEG, _LERC):
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            if count:
                _check_strip(data[offset : offset + count], page.compression, strip_pixels * page.samplesperpixel)
    pixels: Array = page.asarray(maxworkers=1)  # the loader has its own threads
    if page.axes == "YX":
        pixels = pixels[..., None]
    elif page.axes == "SYX":
        pixels = pixels.transpose(1, 2, 0)
    no_data = NoData.find(pixels, no_data_value)
    unsigned, bits = pixels.dtype in (np.bool_, np.uint8, np.uint16), page.bitspersample
    if unsigned and page.photometric is not None and int(page.photometric) == _WHITE_IS_ZERO:
        pixels = ~pixels if bits in (1, 8, 16) else 2**bits - 1 - pixels
    if unsigned and bits not in (1, 8, 16):  # packed: its largest value is white
        white = np.iinfo(pixels.dtype).max
        pixels = np.rint(pixels * (white / (2**bits - 1))).astype(pixels.dtype)
    extra = [int(kind) for kind in page.extrasamples]
    alpha = next((i for i, kind in enumerate(extra) if kind in (_ASSOCIATED, _UNASSOCIATED)), None)
    if alpha is not None:
        if not unsigned:
            raise BadImage("measurements with transparency: remove the transparency")
        channel = pixels.shape[2] - len(extra) + alpha
        color = np.delete(pixels, channel, axis=2)
        pixels = composite_on_white(color, pixels[..., channel], premultiplied=extra[alpha] == _ASSOCIATED)
        if no_data.missing.shape[2] > 1:
            no_data = replace(no_data, missing=np.delete(no_data.missing, channel, axis=2))
    if (orientation := page.tags.get(_ORIENTATION)) is None:
        return pixels, no_data
    missing = apply_exif_orientation(no_data.missing, int(orientation.value))
    return apply_exif_orientation(pixels, int(orientation.value)), replace(no_data, missing=missing)


def _check_strip(data: bytes, compression: int, values: int) -> None:
    """Refuse a strip or tile of JPEG or LERC whose own header claims many more values than the TIFF's tags."""
    if compression == _JPEG:
        width, height, channels = read_jpeg_header(data)[:3]
    elif data[:6] == b"Lerc2 " and len(data) >= 26 and int.from_bytes(data[6:10], "little") >= 4:
        height, width, channels = struct.unpack_from("<III", data, 14)
    else:
        raise BadImage("LERC of an old version: save it with deflate or LZW")
    if width * height * channels > 2 * values + 2**16:
        raise BadImage(f"a TIFF with a strip or tile of {width}x{height} pixels, {channels} channels: too large")


def read_png16(data: bytes, width: int, height: int, orientation: int) -> Array:
    """Read a 16-bit color PNG as (h w c) without transparency. Raises BadImage."""
    try:
        import imagecodecs
    except ImportError:
        raise BadImage("16-bit color PNG needs imagecodecs: pip install 'pixmim[tiff]'") from None
    check_bytes(width * height * 8)
    with library_errors():
        pixels: Array = imagecodecs.png_decode(data)
    if pixels.shape[2] in (2, 4):
        pixels = composite_on_white(pixels[..., :-1], pixels[..., -1], premultiplied=False)
    return apply_exif_orientation(pixels, orientation)


def read_npy(data: bytes) -> Array:
    """Read an .npy file of numbers, (h w), (h w c) or (c h w), as (h w c): a view of `data` where possible.

    In three dimensions, the shorter of the first and the last holds the channels; the last if they are equal. Nothing
    is unpickled, and no memory is allocated for what the header claims.

    Raises:
        BadImage: If it is damaged, or has another shape or dtype.
    """
    stream = io.BytesIO(data)
    try:
        version = npy_format.read_magic(stream)
        read_header = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(stream)
    except Exception as error:  # the header is a Python literal: damage causes many kinds of errors
        raise BadImage(f"a damaged .npy: {first_line(error)[:200]}") from None
    if dtype.kind not in "buif":
        raise BadImage(f"an array of {dtype} instead of numbers")
    if len(shape) not in (2, 3):
        raise BadImage(f"an array of {len(shape)} dimensions instead of (h w), (h w c) or (c h w)")
    if max(shape) > _MAX_SIDE:
        raise BadImage("an array with a dimension of more than 2^40")
    channels_first = len(shape) == 3 and shape[0] < shape[2]
    height, width = shape[1:] if channels_first else shape[:2]
    check_size(width, height)
    if min(shape) < 1:
        raise BadImage("an array without channels")
    check_bytes(math.prod(shape) * dtype.itemsize)
    if len(data) - stream.tell() < math.prod(shape) * dtype.itemsize:
        raise BadImage("a truncated .npy")
    values = np.frombuffer(data, dtype, math.prod(shape), stream.tell())
    values = values.reshape(shape, order="F" if fortran_order else "C").astype(dtype.newbyteorder("="), copy=False)
    if values.ndim == 2:
        return values[..., None]
    return values.transpose(1, 2, 0) if channels_first else values
