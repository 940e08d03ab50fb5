"""The spectrum of noise of known slope, and of a single wave; the share that the low-pass of training keeps."""

import numpy as np
import pytest
import torch

from pixmim.data.spectrum import fit_exponent, radial_spectrum
from pixmim.targets import low_pass


def noise(slope: float, size: int, seed: int) -> np.ndarray:
    """Return an image whose power falls as f^-slope."""
    f = np.fft.fftfreq(size, 1 / size)
    radius = np.hypot(f[:, None], f)
    radius[0, 0] = np.inf
    white = np.fft.fft2(np.random.default_rng(seed).normal(size=(size, size)))
    return np.fft.ifft2(white * radius ** (-slope / 2)).real


@pytest.mark.parametrize(("slope", "kept"), [(0, 0.10), (1, 0.31), (2, 0.78), (3, 0.99)])
def test_noise_of_known_slope_has_its_exponent_and_share(slope: float, kept: float) -> None:
    spectrum = radial_spectrum(100 + 7 * noise(slope, 224, seed) for seed in range(20))
    assert spectrum is not None and spectrum.exponent is not None and spectrum.images == 20
    assert abs(spectrum.exponent - slope) < 0.1
    assert abs(spectrum.share_kept(40) - kept) < 0.02
    assert abs(spectrum.variance.sum() - 1) < 1e-12
    assert spectrum.share_kept(spectrum.radius_for(0.5)) >= 0.5 > spectrum.share_kept(spectrum.radius_for(0.5) - 1)


def test_the_share_kept_is_that_of_the_low_pass_of_training() -> None:
    image = noise(1.5, 64, seed=3)
    spectrum = radial_spectrum([image])
    assert spectrum is not None
    filtered = low_pass(torch.from_numpy(image)[None, None], 11)
    assert abs(spectrum.share_kept(11) - float(filtered.var() / image.var(ddof=1))) < 1e-6


def test_a_wave_has_all_its_variance_at_its_frequency() -> None:
    wave = np.sin(2 * np.pi * 5 / 32 * np.arange(32))
    spectrum = radial_spectrum([np.tile(wave, (32, 1))])
    assert spectrum is not None
    assert spectrum.share_kept(4) < 1e-12 and spectrum.share_kept(5) > 1 - 1e-12
    assert int(spectrum.power.argmax()) + 1 == 5


def test_flat_and_infinite_images_are_left_out() -> None:
    flat, infinite = np.full((16, 16), 3.0), np.full((16, 16), np.inf)
    assert radial_spectrum([]) is None and radial_spectrum([flat, infinite]) is None
    spectrum = radial_spectrum([flat, noise(2, 16, 0), infinite])
    assert spectrum is not None and spectrum.images == 1


def test_the_exponent_of_an_exact_power_law_is_exact_and_unknown_for_tiny_images() -> None:
    f = np.arange(1, 33)
    exponent = fit_exponent(3 * f**-1.7)
    assert exponent is not None and abs(exponent - 1.7) < 1e-9
    assert fit_exponent(np.ones(4)) is None
