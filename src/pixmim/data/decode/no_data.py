"""Pixels without data: those with the value that GDAL's tag 42113 of a GeoTIFF names."""

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pixmim.data.dataset import BadImage
from pixmim.data.decode.channels import NOT_MISSING
from pixmim.transforms.crops import Array

TAG = 42113

_recorder = threading.local()


@contextmanager
def recorded_shares() -> Iterator[list[npt.NDArray[np.float64]]]:
    """Yield a list of the shares of values with data in each channel (c), for each file that `read` reads here."""
    _recorder.shares = shares = list[npt.NDArray[np.float64]]()
    try:
        yield shares
    finally:
        del _recorder.shares


def parse_no_data(text: object) -> float | None:
    """Return the number in GDAL's tag; None if it is absent or no number."""
    try:
        return float(text.strip(" \0")) if isinstance(text, str) else None
    except ValueError:
        return None


@dataclass(frozen=True)
class NoData:
    """Mask of the values without data (h w c), as stored or `of_channels`; of height and width 1 if all have data."""

    missing: npt.NDArray[np.bool_] = field(default_factory=lambda: NOT_MISSING)
    value: float = 0.0

    @classmethod
    def find(cls, stored: Array | None, value: float | None) -> "NoData":
        """Compare the values (h w c) as they are in the file, before any conversion."""
        if stored is None or value is None or not _fits(stored, value):
            return cls()
        return cls(np.isnan(stored) if math.isnan(value) else stored == stored.dtype.type(value), value)

    def of_channels(self, count: int) -> "NoData":
        """Return the mask for `count` channels made of the stored ones, such as colors of a palette."""
        if self.missing.shape[2] == count:
            return self
        missing = self.missing.all(axis=2, keepdims=True)
        return NoData(np.broadcast_to(missing, (*missing.shape[:2], count)), self.value)


def fill_no_data(pixels: Array, no_data: NoData, max_share: float = 1.0) -> Array:
    """Replace the values (h w c) without data by the mean of the other values of the channel.

    Raises:
        BadImage: If the share of pixels without data is above `max_share`, or a channel has no data at all.
    """
    missing, value = no_data.missing, no_data.value
    if hasattr(_recorder, "shares"):
        _recorder.shares.append(1 - missing.mean(axis=(0, 1)))
    if not missing.any():
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
