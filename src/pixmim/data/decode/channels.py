"""Pixels of any kind into the form of a run: its channels, and its kind of number.

Channels. Grey (1) stands for color (3) repeated, and color for grey by its luma. Nothing else is guessed: a file of
other channels than the run's is a BadImage.

Numbers. Unsigned 8 and 16 bits are shares of their largest value, so they turn into each other: 255 is 65535 is 1.0.
All other kinds (floating point, signed, 32 bits) are measurements, such as metres or Hounsfield units, of which no
number stands for one: only float32 takes them, as they are. In 8 or 16 bits they are a BadImage, and so are values
that are not finite.
"""

from collections.abc import Iterator

import numpy as np

from pixmim.data.dataset import BadImage, DType, ImageSpec
from pixmim.data.decode.limits import check_bytes
from pixmim.transforms.crops import Array

_LUMA = np.asarray((19595, 38470, 7471), np.uint32)
"""ITU-R 601's weights of red, green and blue in parts of 65536, as Pillow rounds them."""


_BLOCK = 2**20  # values that are converted at a time


class ChannelMismatch(BadImage):
    """A file of another number of channels than the run's."""


def convert(pixels: Array, form: ImageSpec) -> Array:
    """Pixels (h w c) of any kind as (h w form.channels) of form.dtype.

    Raises BadImage where no rule says how, and ChannelMismatch for a number of channels that the run has not.
    """
    found, wanted = pixels.shape[2], form.channels
    if found != wanted and (found, wanted) not in ((3, 1), (1, 3)):
        raise ChannelMismatch(
            f"{found} {'channel' if found == 1 else 'channels'}, and not {wanted}: --channels {found}"
        )
    if found == wanted and pixels.dtype == form.dtype and form.dtype != "float32":
        return pixels
    check_bytes(pixels[..., 0].size * wanted * form.itemsize)
    result, wrong = np.empty((*pixels.shape[:2], wanted), form.dtype), 0
    for rows in _blocks(pixels):
        part = _as(_luma(pixels[rows]) if found > wanted else pixels[rows], form.dtype)
        if part.dtype == np.float32:
            wrong += part.size - int(np.isfinite(part).sum())
        result[rows] = part
    if wrong:
        raise BadImage(f"{wrong:,} of its values are not finite numbers: fill or cut them out first")
    return result


def apply_exif_orientation(pixels: Array, orientation: int) -> Array:
    """Pixels (h w c) as EXIF's orientation, 1 to 8, wants them shown; any other number changes nothing."""
    if orientation not in range(2, 9):
        return pixels
    channels, kind = pixels.shape[2], pixels.dtype
    whole = np.ascontiguousarray(pixels).view(f"V{channels * kind.itemsize}")[..., 0]  # a pixel is copied as one piece
    if orientation in (5, 6, 7, 8):
        whole = whole.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        whole = whole[:, ::-1]
    if orientation in (3, 4, 7, 8):
        whole = whole[::-1]
    return np.ascontiguousarray(whole)[..., None].view(kind)


def composite_on_white(pixels: Array, alpha: Array, multiplied: bool) -> Array:
    """Pixels (h w c) of an unsigned kind laid on white by their opacity (h w) of the same kind.

    multiplied  whether the pixels hold their own share of the sum already (associated alpha)
    """
    most, result = np.iinfo(pixels.dtype).max, np.empty(pixels.shape, pixels.dtype)
    for rows in _blocks(pixels):
        share = (alpha[rows].astype(np.float64) / most)[..., None]
        own = pixels[rows] if multiplied else pixels[rows] * share
        result[rows] = np.minimum(np.rint(own + (1 - share) * most), most)
    return result


def _blocks(pixels: Array) -> Iterator[slice]:
    """Rows of (h w c), some at a time, so that what is made in between takes little memory."""
    height, step = len(pixels), max(1, _BLOCK * len(pixels) // pixels.size)
    return (slice(first, first + step) for first in range(0, height, step))


def _luma(pixels: Array) -> Array:
    if pixels.dtype in (np.uint8, np.uint16):
        weighed = pixels @ _LUMA  # the largest sum is 65535 x 65536, which 32 bits hold
        return ((weighed + np.uint32(32768)) >> np.uint32(16)).astype(pixels.dtype)[..., None]
    return (pixels.astype(np.float64) @ (_LUMA / 65536))[..., None]


def _as(values: Array, pixels: DType) -> Array:
    if values.dtype == bool:
        values = values.astype(np.uint8) * np.uint8(255)
    if values.dtype == pixels and pixels != "float32":
        return values
    if values.dtype in (np.uint8, np.uint16):
        if pixels == "uint8":
            return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
        if pixels == "uint16":
            return values.astype(np.uint16) * np.uint16(257)
        return values.astype(np.float32) / np.float32(np.iinfo(values.dtype).max)
    if pixels != "float32":
        raise BadImage(
            f"{values.dtype} values are measurements, and none of them stands for white: --dtype float32 takes them "
            "as they are (have mean and std measured: pixmim stats)"
        )
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused
        return values.astype(np.float32)
