"""Convert pixels of any kind to the channels and dtype of a run.

Channels: grey is repeated to three channels, and color becomes grey by its luma. Any other difference is an error.

Dtypes: unsigned 8-bit and 16-bit values are fractions of their largest value, so 255, 65535 and 1.0 are equal. All
others (floating point, signed, 32 bits) are measurements, such as metres or Hounsfield units, without a value that
means white: only float32 takes them, unchanged, unless `stretch` was applied first. Values that are not finite are an
error.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pixmim.data.dataset import BadImage, DType, ImageSpec
from pixmim.data.decode.limits import check_bytes
from pixmim.transforms.crops import Array
from pixmim.utils.validation import parse_stretch

_LUMA = np.asarray((19595, 38470, 7471), np.uint32)
"""ITU-R 601's weights of red, green and blue in units of 1/65536, rounded as in Pillow."""

_BLOCK = 2**20  # values converted at a time

NOT_MISSING = np.zeros((1, 1, 1), np.bool_)
"""Mask of the missing values of an image without any."""


class ChannelMismatch(BadImage):
    """The file has another number of channels than the run."""


def convert(pixels: Array, image_spec: ImageSpec) -> Array:
    """Convert pixels (h w c) of any dtype to the channels and dtype of `image_spec`. `stretch` is another function.

    Raises:
        ChannelMismatch: If the number of channels differs, and is not 1 for 3 or 3 for 1.
        BadImage: If there is no conversion, or a value is not finite.
    """
    channels = pixels.shape[2]
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * np.uint8(255)
    if channels != image_spec.channels and (channels, image_spec.channels) not in ((3, 1), (1, 3)):
        raise ChannelMismatch(
            f"{channels} channel{'s' * (channels > 1)} instead of {image_spec.channels}: pass --channels {channels}"
        )
    if channels == image_spec.channels and pixels.dtype == image_spec.dtype and image_spec.dtype != "float32":
        return pixels
    if pixels.dtype not in (np.uint8, np.uint16) and image_spec.dtype != "float32":
        raise BadImage(
            f"{pixels.dtype} values are measurements, without a value that means white: pass --dtype float32, and "
            "measure mean and std with `pixmim stats`"
        )
    check_bytes(pixels[..., 0].size * image_spec.channels * image_spec.itemsize)
    result, invalid = np.empty((*pixels.shape[:2], image_spec.channels), image_spec.dtype), 0
    for rows in _row_blocks(pixels):
        block = _cast(_luma(pixels[rows]) if channels > image_spec.channels else pixels[rows], image_spec.dtype)
        if block.dtype == np.float32:
            invalid += block.size - int(np.isfinite(block).sum())
        result[rows] = block
    if invalid:
        raise BadImage(f"{invalid:,} of its values are not finite numbers: fill or crop them first")
    return result


def stretch(pixels: Array, image_spec: ImageSpec, missing: npt.NDArray[np.bool_] = NOT_MISSING) -> Array:
    """Map percentiles of each channel (h w c) to the full range of image_spec.dtype; values beyond them are clipped.

    Where both percentiles are one value, minimum and maximum take their place. A flat channel becomes zero. Values that
    are `missing` (h w c) count for nothing and become zero. Without a stretch, the pixels are returned unchanged.

    Raises:
        BadImage: If a value that is not missing is not finite.
    """
    if not image_spec.stretch:
        return pixels
    percentiles = np.asarray(parse_stretch(image_spec.stretch))
    check_bytes(pixels.size * image_spec.itemsize)
    result = np.empty(pixels.shape, image_spec.dtype)
    white = 1.0 if image_spec.dtype == "float32" else float(np.iinfo(image_spec.dtype).max)
    for k in range(pixels.shape[2]):
        channel: Array = pixels[..., k].astype(np.uint8) if pixels.dtype == bool else pixels[..., k]
        hidden = missing[..., min(k, missing.shape[2] - 1)]
        valid = channel[~hidden] if hidden.any() else channel
        if invalid := valid.size - int(np.isfinite(valid).sum()):
            raise BadImage(f"{invalid:,} of its values are not finite numbers: fill or crop them first")
        low, high = np.percentile(valid, percentiles) if valid.size else (0.0, 0.0)
        if low == high and valid.size:
            low, high = float(valid.min()), float(valid.max())
        if valid is not channel:
            channel = np.where(hidden, low, channel)
        scale = 1 / (high - low) if high > low else 0.0
        for rows in _row_blocks(pixels):
            values = np.clip((channel[rows].astype(np.float64) - low) * scale, 0, 1) * white
            result[rows, :, k] = values if image_spec.dtype == "float32" else np.rint(values)
    return result


def apply_exif_orientation(pixels: Array, orientation: int) -> Array:
    """Rotate and flip pixels (h w c) by EXIF's orientation, 2 to 8; other numbers change nothing."""
    if orientation not in range(2, 9):
        return pixels
    channels, dtype = pixels.shape[2], pixels.dtype
    turned = np.ascontiguousarray(pixels).view(f"V{channels * dtype.itemsize}")[..., 0]  # copies pixel by pixel
    if orientation in (5, 6, 7, 8):
        turned = turned.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        turned = turned[:, ::-1]
    if orientation in (3, 4, 7, 8):
        turned = turned[::-1]
    return np.ascontiguousarray(turned)[..., None].view(dtype)


def composite_on_white(pixels: Array, alpha: Array, premultiplied: bool) -> Array:
    """Composite unsigned pixels (h w c) on white by their opacity (h w) of the same dtype."""
    white, result = np.iinfo(pixels.dtype).max, np.empty(pixels.shape, pixels.dtype)
    for rows in _row_blocks(pixels):
        opacity = (alpha[rows].astype(np.float64) / white)[..., None]
        color = pixels[rows] if premultiplied else pixels[rows] * opacity
        result[rows] = np.minimum(np.rint(color + (1 - opacity) * white), white)
    return result


def _row_blocks(pixels: Array) -> Iterator[slice]:
    """Yield slices of rows, so that intermediate values take little memory."""
    height, step = len(pixels), max(1, _BLOCK * len(pixels) // pixels.size)
    return (slice(first, first + step) for first in range(0, height, step))


def _luma(pixels: Array) -> Array:
    if pixels.dtype in (np.uint8, np.uint16):
        weighted = pixels @ _LUMA  # at most 65535 * 65536, which fits 32 bits
        return ((weighted + np.uint32(32768)) >> np.uint32(16)).astype(pixels.dtype)[..., None]
    return (pixels.astype(np.float64) @ (_LUMA / 65536))[..., None]


def _cast(values: Array, dtype: DType) -> Array:
    if values.dtype == dtype and dtype != "float32":
        return values
    if values.dtype in (np.uint8, np.uint16):
        if dtype == "uint8":
            return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
        if dtype == "uint16":
            return values.astype(np.uint16) * np.uint16(257)
        return values.astype(np.float32) / np.float32(np.iinfo(values.dtype).max)
    with np.errstate(over="ignore"):  # overflow becomes infinity, which `convert` refuses
        return values.astype(np.float32)
