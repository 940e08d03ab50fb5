"""Pixels without data: those with the value that GDAL's tag 42113 of a GeoTIFF names."""

import math

import numpy as np
import numpy.typing as npt

from pixmim.data.dataset import BadImage
from pixmim.transforms.crops import Array

TAG = 42113


def parse_no_data(text: object) -> float | None:
    """Return the number in GDAL's tag; None if it is absent or no number."""
    try:
        return float(text.strip(" \0")) if isinstance(text, str) else None
    except ValueError:
        return None


def find_no_data(pixels: Array, value: float | None) -> npt.NDArray[np.bool_] | None:
    """Return where pixels (h w c) have no data; None if all have."""
    if value is None or not _fits(pixels, value):
        return None
    missing = np.isnan(pixels) if math.isnan(value) else pixels == pixels.dtype.type(value)
    return missing if missing.any() else None


def fill_no_data(pixels: Array, value: float | None, max_share: float = 1.0) -> Array:
    """Replace values without data by the mean of the other values of the channel.

    Args:
        pixels: Pixels (h w c).
        value: Value of pixels without data; None: all have data.
        max_share: Largest share of the pixels that may lack data.

    Raises:
        BadImage: If the share is larger, or a channel has no data at all.
    """
    missing = find_no_data(pixels, value)
    if missing is None:
        return pixels
    share = float(missing.any(axis=2).mean())
    if share > max_share:
        raise BadImage(f"{share:.0%} of its pixels have no data ({value:g}), more than --max-no-data {max_share:g}")
    filled = pixels.copy()
    for k in range(pixels.shape[2]):
        valid = ~missing[..., k]
        if not valid.any():
            raise BadImage(f"channel {k + 1} has no data ({value:g}) at all")
        mean = pixels[..., k][valid].mean(dtype=np.float64)
        filled[..., k][~valid] = mean if pixels.dtype.kind == "f" else np.rint(mean)
    return filled


def _fits(pixels: Array, value: float) -> bool:
    """Return True if a dtype can hold the value: 255 marks nothing in a signed image of 8 bits."""
    if pixels.dtype.kind == "f":
        return True
    if pixels.dtype == bool or not math.isfinite(value) or not value.is_integer():
        return False
    info = np.iinfo(pixels.dtype)
    return bool(info.min <= value <= info.max)
