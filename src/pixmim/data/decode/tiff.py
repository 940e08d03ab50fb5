"""What Pillow does not read of TIFF: many channels, deep color, measured values, and pages as channels; by tifffile.

- The samples of a page are its channels, chunky or planar. A further sample is transparency only if it is tagged so.
- As channels count all pages of the first one's size and kind, but for reduced copies (overviews).
- Packed values, such as of 12 bits, are shares of their greatest one; 12 bits stored in 16 are shares of 65535.
- Where black is the greatest value (MinIsWhite), unsigned values are turned round.
- A measured value that GDAL's tag declares as "no data" is treated as what it is: a missing one.
"""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from pixmim.data.dataset import BadImage, TiffPages
from pixmim.data.decode import jpeg
from pixmim.data.decode.channels import apply_exif_orientation, composite_on_white
from pixmim.data.decode.limits import check_bytes, check_size
from pixmim.transforms.crops import Array

_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2
_ASSOCIATED, _UNASSOCIATED = 1, 2
_ORIENTATION, _NO_DATA = 274, 42113
_OLD_JPEG, _JPEG, _LERC = 6, 7, 34887


def read_tiff(data: bytes, pages: TiffPages) -> Array:
    """The first page, or all pages one after another, as (h w c). The TIFF is one of `ifd.checked`. Raises BadImage."""
    with _opened(data) as file:
        first = file.pages.first
        chosen = [first] if pages == "first" else [page for page in file.pages if _alike(page, first)]
        _check(first, len(chosen))
        parts = [_pixels(page, data) for page in chosen]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)


@contextmanager
def _opened(data: bytes) -> Iterator[Any]:
    try:
        import tifffile
    except ImportError:
        raise BadImage("Pillow does not read this TIFF; tifffile may: pip install 'pixmim[tiff]'") from None
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            yield file
    except BadImage:
        raise
    except Exception as error:  # damage shows in many ways
        more = ": pip install 'pixmim[tiff]'" if "imagecodecs" in str(error) else ""
        raise BadImage(f"{type(error).__name__}: {error}{more}") from None


def _alike(page: Any, first: Any) -> bool:
    return page.shape == first.shape and page.dtype == first.dtype and not page.is_reduced


def _check(page: Any, count: int) -> None:
    """Refuse a page, or `count` pages like it, before memory is taken for what it claims."""
    check_size(page.imagewidth, page.imagelength)
    if page.compression == _OLD_JPEG:
        raise BadImage("a TIFF of old JPEG: save it with JPEG, deflate or LZW")
    if page.axes not in ("YX", "YXS", "SYX"):
        raise BadImage(f"axes {page.axes}, and not one picture")
    if page.photometric is not None and int(page.photometric) not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB):
        raise BadImage(f"{page.photometric.name} of {page.bitspersample} bits: save it as grey or RGB")
    packed = page.dtype is not None and page.dtype.kind == "u" and page.bitspersample in range(2, 17)
    if page.dtype is None or page.dtype.kind not in "buif" or not (packed or page.bitspersample in (1, 8, 16, 32, 64)):
        raise BadImage(f"{page.bitspersample} bits a value: save it with 8, 16 or 32")
    check_bytes(page.nbytes * count)


def _pixels(page: Any, data: bytes) -> Array:
    """One page of a file as (h w c), upright and on white."""
    per_segment = page.tilewidth * page.tilelength if page.is_tiled else page.imagewidth * page.rowsperstrip
    for at, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        if count and page.compression in (_JPEG, _LERC):
            _check_segment(data[at : at + count], page.compression, per_segment * page.samplesperpixel)
    pixels: Array = page.asarray(maxworkers=1)  # the loader has threads of its own
    if page.axes == "YX":
        pixels = pixels[..., None]
    elif page.axes == "SYX":
        pixels = pixels.transpose(1, 2, 0)
    unsigned = pixels.dtype in (np.bool_, np.uint8, np.uint16)
    if unsigned and page.photometric is not None and int(page.photometric) == _WHITE_IS_ZERO:
        pixels = ~pixels if page.bitspersample in (1, 8, 16) else 2**page.bitspersample - 1 - pixels
    if unsigned and page.bitspersample not in (1, 8, 16):  # packed: its greatest value is white
        white = np.iinfo(pixels.dtype).max
        pixels = np.rint(pixels * (white / (2**page.bitspersample - 1))).astype(pixels.dtype)
    if not unsigned and _NO_DATA in page.tags:
        missing = int((pixels == page.nodata).sum())
        if missing:
            raise BadImage(
                f"{missing:,} of its values are missing (no data: {page.nodata}): fill or cut them out first"
            )
    kinds = [int(kind) for kind in page.extrasamples]
    alpha = next((i for i, kind in enumerate(kinds) if kind in (_ASSOCIATED, _UNASSOCIATED)), None)
    if alpha is not None:
        if not unsigned:
            raise BadImage("measured values with transparency: leave it out")
        at = pixels.shape[2] - len(kinds) + alpha
        pixels = composite_on_white(np.delete(pixels, at, axis=2), pixels[..., at], kinds[alpha] == _ASSOCIATED)
    orientation = page.tags.get(_ORIENTATION)
    return apply_exif_orientation(pixels, int(orientation.value)) if orientation is not None else pixels


def _check_segment(data: bytes, compression: int, values: int) -> None:
    """Refuse a strip or tile of JPEG or LERC whose own header states many more values than the TIFF's tags."""
    if compression == _JPEG:
        width, height, channels = jpeg.look(data)[:3]
    elif data[:6] == b"Lerc2 " and len(data) >= 26 and int.from_bytes(data[6:10], "little") >= 4:
        height, width, channels = struct.unpack_from("<III", data, 14)
    else:
        raise BadImage("LERC of an old version: save it with deflate or LZW")
    if width * height * channels > 2 * values + 2**16:
        raise BadImage(f"a TIFF with a strip or tile of {width}x{height} pixels, {channels} channels: far too many")
