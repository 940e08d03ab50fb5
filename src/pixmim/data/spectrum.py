"""Radial power spectra: how smooth images are, and what a low-pass keeps of them."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from jaxtyping import Float

from pixmim.transforms.crops import Array

Vector = npt.NDArray[np.float64]

_MIN_DEVIATION = 1e-9  # standard deviation below which an image has no spectrum


@dataclass(frozen=True)
class Spectrum:
    """Mean spectrum of square grayscale images."""

    size: int  # side of the images in pixels
    power: Vector
    """Mean power per frequency bin at each radius 1, 2, ..., size // 2, of images with unit variance."""
    variance: Vector
    """Share of the variance at radii in (r - 1, r], for r = 0, 1, ..., up to the corners; sums to one."""
    exponent: float | None  # b of the power law f^-b that fits `power`; None for images of fewer than 12 pixels
    images: int

    def share_kept(self, radius: float) -> float:
        """Return the share of the variance, in [0, 1], at frequencies of at most `radius` bins (rounded down)."""
        return float(self.variance[: int(radius) + 1].sum())

    def radius_for(self, share: float) -> int:
        """Return the smallest radius in bins that keeps at least this share of the variance."""
        return int(np.searchsorted(np.cumsum(self.variance), share - 1e-9))


def radial_spectrum(images: Iterable[Float[Array, "size size"]]) -> Spectrum | None:
    """Measure the mean radial power spectrum of grayscale images of one size.

    Two spectra are taken of each image. For `power` and `exponent`, a Hann window removes the jump between opposite
    edges, which would add a slope of f^-2 to any image. The low-pass of training includes that jump, so `variance` is
    measured on the image as it is. Images without variance are left out.

    Args:
        images: Images of any unit.

    Returns:
        The spectrum, or None if no image has variance.
    """
    size = count = 0
    for image in images:
        if not size:
            size = len(image)
            hann = np.hanning(size + 1)[:-1]
            window = hann[:, None] * hann
            f = np.fft.fftfreq(size, 1 / size)
            distance = np.hypot(f[:, None], f)
            rings = np.rint(distance).astype(np.int64).ravel()
            radii = np.ceil(distance - 1e-9).astype(np.int64).ravel()  # as the low-pass counts: inside r or on it
            power, variance = np.zeros(rings.max() + 1), np.zeros(radii.max() + 1)
        x = image.astype(np.float64)
        if not np.isfinite(x).all() or x.std() < _MIN_DEVIATION:
            continue
        x = (x - x.mean()) / x.std()
        windowed = (x - (x * window).sum() / window.sum()) * window
        power += np.bincount(rings, np.abs(np.fft.fft2(windowed)).ravel() ** 2 / (window**2).sum(), len(power))
        variance += np.bincount(radii, np.abs(np.fft.fft2(x)).ravel() ** 2, len(variance))
        count += 1
    if not count:
        return None
    power = (power / np.bincount(rings) / count)[1 : size // 2 + 1]
    return Spectrum(size, power, variance / variance.sum(), fit_exponent(power), count)


def fit_exponent(power: Float[Array, " radii"]) -> float | None:
    """Fit b of a power law f^-b to the power at radii 1, 2, ...: least squares in logarithms, equal weight per octave.

    The lowest three frequencies are left out because the window smears them, and the highest eighth because resizing
    and JPEG attenuate them.

    Returns:
        The exponent; None if fewer than two frequencies remain.
    """
    f = np.arange(1, len(power) + 1)
    kept = (f >= 4) & (f <= len(power) * 7 / 8) & (power > 0)
    if kept.sum() < 2:
        return None
    slope, _ = np.polyfit(np.log(f[kept]), np.log(power[kept]), 1, w=f[kept] ** -0.5)
    return float(-slope)
