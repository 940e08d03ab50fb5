"""Reconstruction targets: pixels, their low frequencies (PixMIM), or bins of color.

A target is a module from normalized images (b c h w) to normalized images of the same shape.
"""

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

Variant = Literal["exact", "paper-code"]
Radius = float | tuple[float, float] | Literal["auto"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Pixels(nn.Identity):
    """Use the image itself, as MAE and SimMIM do."""


class _PixelSpace(nn.Module):
    """Base of targets that are computed on pixels in [0, 1]: keeps the normalization of the images."""

    mean: Float[Tensor, " c"]
    std: Float[Tensor, " c"]

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def to_pixels(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        if images.shape[1] != len(self.mean):
            raise ValueError(
                f"images have {images.shape[1]} channels, but mean and std of {len(self.mean)}: pass "
                f"{type(self).__name__} the mean and std that the images were normalized with"
            )
        return images * self.std.view(-1, 1, 1) + self.mean.view(-1, 1, 1)

    def to_normalized(self, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return (pixels - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)


class LowFrequency(_PixelSpace):
    """Remove the high frequencies of an image: PixMIM's target (arXiv 2303.02416, section 4.1). See `low_pass`.

    Args:
        radius: Cut-off in frequency bins (40 at 224 px in the paper), (vertical, horizontal) for an ellipse, or "auto",
            which keeps the paper's relative cut-off at any image size.
        variant: "exact" (centered, real) or "paper-code" (as the published code).
        mean: Mean per channel that the images were normalized with, in units of [0, 1]. Only "paper-code" uses mean and
            std, because it takes an absolute value of pixels. The exact filter is linear and preserves constants, so
            it commutes with normalization.
        std: Standard deviation per channel.

    Raises:
        ValueError: If the radius or the variant is invalid; in `forward`, if variant is "paper-code" and the images
            have another number of channels than mean and std.
    """

    def __init__(
        self,
        radius: Radius = 40,
        variant: Variant = "exact",
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        super().__init__(mean, std)
        _check(radius, variant)
        self.radius, self.variant = radius, variant

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        if self.variant == "exact":
            return low_pass(images, self.radius, "exact")
        return self.to_normalized(low_pass(self.to_pixels(images), self.radius, "paper-code"))


class ColorBins(_PixelSpace):
    """Classify each value into one of equal parts of [0, 1]: SimMIM's color bins (arXiv 2111.09886, section 3.4).

    The target of the distance "cross_entropy". A model predicts `bins` scores for each value, in the order (row,
    column, channel, bin): `create_model(..., outputs=bins)`. As images, the target is the centers of the bins.

    Args:
        bins: Number of parts; 8 and 256 in the paper.
        of: Target that is binned, by default `Pixels()`. Low frequencies overshoot [0, 1] at edges (by 0.09 at a step
            from 0 to 1); values outside [0, 1] count as the first or the last bin.
        mean: Mean per channel that the images were normalized with, in units of [0, 1].
        std: Standard deviation per channel.

    Raises:
        ValueError: If bins is less than 2; in use, if the images have another number of channels than mean and std.
    """

    def __init__(
        self,
        bins: int = 8,
        of: nn.Module | None = None,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        super().__init__(mean, std)
        if bins < 2:
            raise ValueError(f"bins must be 2 or more, not {bins}")
        self.bins, self.of = bins, of or Pixels()

    @torch.no_grad()
    def numbers(self, images: Float[Tensor, "b c h w"]) -> Int[Tensor, "b c h w"]:
        """Return the bin of each value, 0 to bins - 1."""
        colors = self.to_pixels(self.of(images))
        # A NaN has no bin. Any will do: a network predicts NaN from it.
        return (colors * self.bins).nan_to_num().floor().clamp(0, self.bins - 1).long()

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return self.to_normalized((self.numbers(images) + 0.5) / self.bins)

    def expected(self, scores: Float[Tensor, "b n s"]) -> Float[Tensor, "b n d"]:
        """Return the expected color under predicted scores: the bins' centers, weighted by softmax(scores).

        Args:
            scores: Predicted patches, s = p*p*c*bins.

        Returns:
            Normalized patches, d = p*p*c.
        """
        centers = (torch.arange(self.bins, device=scores.device) + 0.5) / self.bins
        colors = scores.float().unflatten(2, (-1, len(self.mean), self.bins)).softmax(dim=-1) @ centers
        return ((colors - self.mean) / self.std).flatten(2)


def resolve_radius(radius: Radius, size: tuple[int, int]) -> float | tuple[float, float]:
    """Replace "auto" by the paper's relative cut-off, 40 bins at 224 px: 64 -> 11, 448 -> 80.

    For a non-square size (h, w) this is an ellipse, with the same cut-off in cycles per pixel in both directions.
    """
    if not isinstance(radius, str):
        return radius
    vertical, horizontal = (max(1, round(40 * side / 224)) for side in size)
    return vertical if vertical == horizontal else (vertical, horizontal)


def low_pass(images: Float[Tensor, "b c h w"], radius: Radius, variant: Variant = "exact") -> Float[Tensor, "b c h w"]:
    """Keep the frequencies of each channel within `radius` bins of zero: an ideal low-pass (PixMIM, section 4.1).

    - "exact" keeps bin (u, v) if u^2 + v^2 <= r^2. The result is real, linear in the image, and preserves constants.
    - "paper-code" (mmselfsup 1.0.0) keeps bin (i, j) of the shifted spectrum if
      (i - (h-1)/2)^2 + (j - (w-1)/2)^2 <= r^2. For even sizes this circle is centered half a bin off the zero
      frequency, so the inverse transform is complex; the result is its absolute value. Expects pixels in [0, 1].

    Whether a bin is kept depends on |u| and |v| only, so the filter is four small real matrix products with a
    cosine-sine basis of the low frequencies, instead of two FFTs. They run in float32 (float64 for float64 images)
    under autocast too, because TF32 and bfloat16 have errors of 1e-3 to 1e-2.

    Args:
        images: Images of any number of channels.
        radius: Cut-off in bins, (vertical, horizontal) for an ellipse, or "auto" (see `resolve_radius`).
        variant: "exact" or "paper-code".

    Raises:
        ValueError: If the radius is negative or the variant unknown.
    """
    _check(radius, variant)
    with torch.autocast(images.device.type, enabled=False):
        x = images if images.dtype == torch.float64 else images.float()
        f: _Filter = _constant_filter(images.shape[-2], images.shape[-1], radius, variant, x.dtype, x.device)
        if variant == "exact":
            return f.project(x)
        return torch.hypot(f.project(x * f.cosine), f.project(x * f.sine))


def _check(radius: Radius, variant: Variant) -> None:
    if variant not in ("exact", "paper-code"):
        raise ValueError(f"variant must be 'exact' or 'paper-code', not {variant!r}")
    if isinstance(radius, str):
        if radius != "auto":
            raise ValueError(f"radius must be a number of frequency bins, a pair of them or 'auto', not {radius!r}")
    elif not (all(0 < r < torch.inf for r in radius) if isinstance(radius, tuple) else radius >= 0):
        raise ValueError(f"radius must not be negative (a pair: positive and finite), but is {radius}")


class _Filter(NamedTuple):
    """Low-pass of one image size: bases (k h) and (l w), the products of them to keep (k l), and a phase (h w).

    The phase is for "paper-code". Shifting the spectrum by half a bin multiplies the image by a phase of modulus one,
    which the absolute value removes. So the complex filter is the real one, applied to both parts of image * phase.
    """

    rows: Tensor
    columns: Tensor
    keep: Tensor
    cosine: Tensor
    sine: Tensor

    def project(self, x: Tensor) -> Tensor:
        return self.rows.T @ (self.keep * (self.rows @ x @ self.columns.T)) @ self.columns


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constant_filter(
    h: int, w: int, radius: Radius, variant: Variant, dtype: torch.dtype, device: torch.device
) -> _Filter:
    """Return the filter as a constant of torch.compile's graph, so that compiled steps do not rebuild it."""
    pair = resolve_radius(radius, (h, w))
    pair = pair if isinstance(pair, tuple) else (pair, pair)
    return _filter((h, w), pair, variant, dtype, device)


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # autograd takes no tensors of that mode, and they are kept
def _filter(
    size: tuple[int, int], radius: tuple[float, float], variant: Variant, dtype: torch.dtype, device: torch.device
) -> _Filter:
    shifted = [variant == "paper-code" and side % 2 == 0 for side in size]
    (rows, v), (columns, u) = (_basis(*args) for args in zip(size, radius, shifted, strict=True))
    v, u, (ry, rx) = v[:, None], u[None, :], radius
    # Without division, so that bins on the boundary are exact.
    keep = v * v + u * u <= ry * ry if ry == rx else (v * rx) ** 2 + (u * ry) ** 2 <= (ry * rx) ** 2
    angles = [torch.arange(n, dtype=torch.float64) * (torch.pi / n * s) for n, s in zip(size, shifted, strict=True)]
    phase = angles[0][:, None] + angles[1][None, :]
    return _Filter(*(t.to(device, dtype) for t in (rows, columns, keep, phase.cos(), phase.sin())))


def _basis(size: int, radius: float, shifted: bool) -> tuple[Float[Tensor, "k size"], Float[Tensor, " k"]]:
    """Return an orthonormal real Fourier basis of the frequencies up to `radius`, and the frequency of each row.

    Frequencies are 0, 1, 2, ..., or 1/2, 3/2, ... if `shifted`.
    """
    bins = torch.arange(size, dtype=torch.float64) - ((size - 1) / 2 if shifted else size // 2)
    frequency = bins.abs().unique()
    frequency = frequency[frequency <= radius]
    # Frequency 0, and the highest of an even size, have no sine; their cosine has half the weight.
    unpaired = (frequency == 0) | (frequency * 2 == size)
    angle = 2 * torch.pi / size * frequency[:, None] * torch.arange(size, dtype=torch.float64)
    cosine = angle.cos() * (2 - unpaired.double()).sqrt()[:, None]
    sine = angle.sin()[~unpaired] * 2**0.5
    return torch.cat([cosine, sine]) / size**0.5, torch.cat([frequency, frequency[~unpaired]])
