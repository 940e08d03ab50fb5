"""The low-pass against a plain FFT in float64."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from pixmim.targets import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ColorBins,
    LowFrequency,
    Pixels,
    Variant,
    low_pass,
    resolve_radius,
)

SIZES = [(8, 8), (9, 9), (8, 11), (11, 8), (32, 20), (33, 64)]
RADII = [0, 0.5, 1, 2.9, 3, 5, 7, 100]


def by_fft(images: Tensor, radius: float, variant: str) -> Tensor:
    h, w = images.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(images), dim=(-2, -1))
    i, j = torch.arange(h).double()[:, None], torch.arange(w).double()[None, :]
    if variant == "paper-code":
        keep = (i - (h - 1) / 2) ** 2 + (j - (w - 1) / 2) ** 2 <= radius**2
        return torch.fft.ifft2(spectrum * keep).abs()
    keep = (i - h // 2) ** 2 + (j - w // 2) ** 2 <= radius**2
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum * keep, dim=(-2, -1))).real


@pytest.mark.parametrize("variant", ["exact", "paper-code"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("radius", RADII)
def test_low_pass_is_the_fft_form(size: tuple[int, int], radius: float, variant: str) -> None:
    images = torch.rand(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(low_pass(images, radius, variant), by_fft(images, radius, variant), atol=1e-12, rtol=0)


@pytest.mark.parametrize("variant", ["exact", "paper-code"])
@pytest.mark.parametrize("channels", [1, 4, 13])
def test_any_number_of_channels(channels: int, variant: str) -> None:
    images = torch.rand(1, channels, 12, 10, dtype=torch.float64)
    torch.testing.assert_close(low_pass(images, 3, variant), by_fft(images, 3, variant), atol=1e-12, rtol=0)


@pytest.mark.parametrize("variant", ["exact", "paper-code"])
def test_float32_at_the_published_size(variant: str) -> None:
    images = torch.rand(2, 3, 224, 224)
    error = (low_pass(images, 40, variant).double() - by_fft(images.double(), 40, variant)).abs().max()
    assert error < 5e-6


def test_autocast_does_not_reach_the_filter() -> None:
    images = torch.rand(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = low_pass(images, 6)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, low_pass(images, 6))


def kept_bins(radius: int, variant: Variant) -> int:
    """Count the bins that the filter keeps at 224 px: the value of a filtered unit impulse at its own pixel."""
    impulse = torch.zeros(1, 1, 224, 224, dtype=torch.float64)
    impulse[..., 0, 0] = 1
    return round(low_pass(impulse, radius, variant)[..., 0, 0].item() * 224 * 224)


@pytest.mark.parametrize(("radius", "bins"), [(10, 316), (20, 1264), (30, 2828), (40, 5024), (60, 11304), (112, 39428)])
def test_paper_code_keeps_the_published_number_of_bins(radius: int, bins: int) -> None:
    assert kept_bins(radius, "paper-code") == bins


def test_the_exact_filter_keeps_5025_bins_and_all_beyond_the_corner() -> None:
    assert kept_bins(40, "exact") == 5025
    assert kept_bins(159, "exact") == 224 * 224


def test_a_step_overshoots_by_the_measured_amount() -> None:
    """A vertical step from 0 to 1 rings from -0.090 to 1.090, figures of the paper's release."""
    step = (torch.arange(224) >= 112).double().expand(1, 1, 224, 224)
    ringing = low_pass(step, 40)
    assert ringing.min().item() == pytest.approx(-0.090, abs=2e-3)
    assert ringing.max().item() == pytest.approx(1.090, abs=2e-3)


def test_the_filter_is_a_projection_that_keeps_constants() -> None:
    images = torch.rand(1, 2, 16, 24, dtype=torch.float64)
    once = low_pass(images, 5)
    torch.testing.assert_close(low_pass(once, 5), once)
    torch.testing.assert_close(low_pass(images, 0), images.mean(dim=(2, 3), keepdim=True).expand_as(images))


@pytest.mark.parametrize(("side", "radius"), [(32, 6), (64, 11), (96, 17), (128, 23), (192, 34), (224, 40), (448, 80)])
def test_auto_radius_keeps_the_relative_cut_off(side: int, radius: int) -> None:
    assert resolve_radius("auto", (side, side)) == radius
    images = torch.rand(1, 1, side, side)
    assert torch.equal(low_pass(images, "auto"), low_pass(images, radius))


def test_auto_radius_of_a_non_square_image_is_an_ellipse() -> None:
    """The cut-off in cycles per pixel is the same in both directions."""
    h, w = 56, 112
    assert resolve_radius("auto", (h, w)) == (10, 20)
    y, x = torch.arange(h).double()[:, None], torch.arange(w).double()[None, :]
    for frequency, share in ((0.16, 1.0), (0.2, 0.0)):  # cycles per pixel; the cut-off is 40/224 = 0.179
        for wave in (
            torch.cos(2 * torch.pi * round(frequency * h) / h * y).expand(h, w),
            torch.cos(2 * torch.pi * round(frequency * w) / w * x).expand(h, w),
        ):
            kept = low_pass(wave[None, None], "auto")
            assert (kept.norm() / wave.norm()).item() == pytest.approx(share, abs=1e-6)


def test_module_filters_the_unnormalized_image() -> None:
    mean, std = (0.3, 0.4, 0.5, 0.2), (0.2, 0.1, 0.3, 0.25)
    m, s = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (mean, std))
    images = torch.rand(2, 4, 16, 20, dtype=torch.float64)
    for variant in ("exact", "paper-code"):
        target = LowFrequency(4, variant, mean, std).double()((images - m) / s)
        torch.testing.assert_close(target, (by_fft(images, 4, variant) - m) / s, atol=1e-6, rtol=0)


@pytest.mark.parametrize("bins", [2, 7, 8, 256])
@pytest.mark.parametrize("filtered", [False, True])
def test_color_bins_against_a_loop(bins: int, filtered: bool) -> None:
    """Noise, and hard edges, at which low frequencies overshoot [0, 1]."""
    mean, std = (0.4, 0.2), (0.3, 0.1)
    pixels = (torch.rand(2, 2, 8, 12, dtype=torch.float64) > 0.5).double()
    pixels[0] = torch.rand(2, 8, 12, dtype=torch.float64)
    m, s = (torch.tensor(v, dtype=torch.float64).view(1, -1, 1, 1) for v in (mean, std))
    target = ColorBins(bins, LowFrequency(3) if filtered else Pixels(), mean, std).double()
    seen = by_fft(pixels, 3, "exact") if filtered else pixels
    assert not filtered or (seen.min() < 0 and seen.max() > 1)
    numbers, centers = target.numbers((pixels - m) / s), target((pixels - m) / s)
    for b, c, y, x in itertools.product(range(2), range(2), range(8), range(12)):
        value, number = seen[b, c, y, x].item(), int(numbers[b, c, y, x])
        assert number == 0 or number / bins - 1e-6 <= value
        assert number == bins - 1 or value <= (number + 1) / bins + 1e-6
        center = (number + 0.5) / bins
        assert centers[b, c, y, x].item() == pytest.approx((center - mean[c]) / std[c], abs=1e-5)


def test_the_expected_color_against_a_loop() -> None:
    mean, std = (0.4, 0.2, 0.7), (0.3, 0.1, 0.2)
    scores = torch.randn(1, 2, 4 * 3 * 5)
    expected = ColorBins(5, mean=mean, std=std).expected(scores)
    assert expected.shape == (1, 2, 12)
    for n, value in itertools.product(range(2), range(12)):
        weights = [math.exp(v) for v in scores[0, n, value * 5 : value * 5 + 5].tolist()]
        color = sum(w * (k + 0.5) / 5 for k, w in enumerate(weights)) / sum(weights)
        assert expected[0, n, value].item() == pytest.approx((color - mean[value % 3]) / std[value % 3], rel=1e-4)


def test_every_grey_level_of_a_file_has_the_same_bin_after_normalization() -> None:
    """256 bins separate the 256 levels, although normalization rounds them."""
    levels = (torch.arange(256.0) / 255).expand(1, 3, 1, 256)
    m, s = (torch.tensor(v).view(1, -1, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    assert torch.equal(ColorBins(256).numbers((levels - m) / s), torch.arange(256).expand(1, 3, 1, 256))


def test_invalid_values_are_refused() -> None:
    with pytest.raises(ValueError, match="4 channels, but mean and std of 3"):
        ColorBins(8)(torch.zeros(1, 4, 8, 8))
    for bins in (1, 0, -8):
        with pytest.raises(ValueError, match=f"bins must be 2 or more, not {bins}"):
            ColorBins(bins)
    with pytest.raises(ValueError, match="4 channels, but mean and std of 3"):
        LowFrequency(variant="paper-code")(torch.zeros(1, 4, 8, 8))
    for radius in (-1, math.nan, (3, 0), (math.nan, 3), (3, math.nan), (math.inf, 3)):
        with pytest.raises(ValueError, match="must not be negative"):
            LowFrequency(radius)


def test_a_filter_of_inference_mode_is_used_in_training() -> None:
    images = torch.rand(1, 1, 14, 14, requires_grad=True)  # a size of its own: filters are kept
    with torch.inference_mode():
        low_pass(images, 3)
    low_pass(images, 3).sum().backward()
    assert images.grad is not None and torch.allclose(images.grad, torch.ones(1, 1, 14, 14), atol=1e-5)
