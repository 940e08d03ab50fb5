"""What must be predicted: the pixels themselves, PixMIM's low frequencies of them, or bins that either falls into.

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


class Pixels(nn.Module):
    """MAE's and SimMIM's target: the image as it is."""

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return images


class LowFrequency(nn.Module):
    """PixMIM's target: the image without its high frequencies (arXiv 2303.02416, section 4.1).

    radius  cut-off in frequency bins (40 at 224 px in the paper); (rows, columns) for an ellipse; or "auto", which
            keeps the paper's relative cut-off, 40 at 224 px, at any image size
    variant    "exact" is centerd on the zero frequency and real; "paper-code" repeats the paper's code, whose circle is
            half a bin off center for even sizes and which takes the absolute value (see `low_pass`)
    mean, std  per channel, of the normalization the images went through, in units of [0, 1]. Only "paper-code" needs
            them, because its absolute value must be taken of un-normalized pixels; the exact filter is linear and
            keeps constants, so it gives the same on normalized images.

    Raises ValueError where variant is "paper-code" and the images' channels differ in number from mean and std.
    """

    def __init__(
        self,
        radius: Radius = 40,
        variant: Variant = "exact",
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        _check(radius, variant)
        self.radius, self.variant = radius, variant
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        if self.variant == "exact":
            return low_pass(images, self.radius, "exact")
        if images.shape[1] != self.mean.shape[1]:
            raise ValueError(
                f"images of {images.shape[1]} channels, but mean and std of {self.mean.shape[1]}: "
                "give LowFrequency the mean and std that the images were normalized with"
            )
        return (low_pass(images * self.std + self.mean, self.radius, "paper-code") - self.mean) / self.std


class ColorBins(nn.Module):
    """SimMIM's classes of color: each channel of each pixel lies in one of equal parts of [0, 1] (section 3.4).

    The target for the distance "cross_entropy": a model then predicts `bins` scores for each value, in the
    order (row, column, channel, bin), as `create_model(..., outputs=bins)` does. As images it gives the bins' centers.

    bins  how many parts; 8 and 256 in the paper (arXiv 2111.09886)
    of    what is put into bins: Pixels() unless another target is given. Low frequencies overshoot [0, 1] at edges, by
          0.09 beside a step; what lies outside belongs to the first bin or the last
    mean, std  per channel, of the normalization the images went through, in units of [0, 1]

    Raises ValueError for less than 2 bins, and where the images' channels differ in number from mean and std.
    """

    def __init__(
        self,
        bins: int = 8,
        of: nn.Module | None = None,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        if bins < 2:
            raise ValueError(f"colors are told apart by 2 bins or more, not {bins}")
        self.bins, self.of = bins, of or Pixels()
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)
        self.mean: Tensor
        self.std: Tensor

    @torch.no_grad()
    def numbers(self, images: Float[Tensor, "b c h w"]) -> Int[Tensor, "b c h w"]:
        """The bin that each value lies in, 0 to bins - 1."""
        if images.shape[1] != len(self.mean):
            raise ValueError(
                f"images of {images.shape[1]} channels, but mean and std of {len(self.mean)}: "
                "give ColorBins the mean and std that the images were normalized with"
            )
        colors = self.of(images) * self.std.view(-1, 1, 1) + self.mean.view(-1, 1, 1)
        # A NaN has no bin; any will do, since what a network predicts from it is NaN, too.
        return (colors * self.bins).nan_to_num().floor().clamp(0, self.bins - 1).long()

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        colors = (self.numbers(images) + 0.5) / self.bins
        return (colors - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)

    def expected(self, scores: Float[Tensor, "b n s"]) -> Float[Tensor, "b n d"]:
        """The mean color that scores (s = p*p*c*bins) stand for, normalized, as patches (d = p*p*c).

        It is the mean of the bins' centers, each weighted by its probability.
        """
        centers = (torch.arange(self.bins, device=scores.device) + 0.5) / self.bins
        colors = scores.float().unflatten(2, (-1, len(self.mean), self.bins)).softmax(dim=-1) @ centers
        return ((colors - self.mean) / self.std).flatten(2)


def auto_radius(size: tuple[int, int]) -> float | tuple[float, float]:
    """The paper's relative cut-off, 40 bins at 224 px, for an image of `size` (h, w): 64 -> 11, 448 -> 80.

    For a non-square image this is an ellipse of bins, so that the cut-off in cycles per pixel is the same both ways.
    """
    down, across = (max(1, round(40 * side / 224)) for side in size)
    return down if down == across else (down, across)


def resolve_radius(radius: Radius, size: tuple[int, int]) -> float | tuple[float, float]:
    """A radius as numbers: what "auto" stands for at an image of `size` (h, w), any other as it is."""
    return auto_radius(size) if isinstance(radius, str) else radius


def low_pass(images: Float[Tensor, "b c h w"], radius: Radius, variant: Variant = "exact") -> Float[Tensor, "b c h w"]:
    """Keep the frequencies of each channel that lie within `radius` bins of the zero frequency.

    The "exact" variant keeps bin (u, v) where u^2 + v^2 <= r^2; it is real, linear, and leaves constants alone.
    The "paper-code" variant is the paper's code (mmselfsup 1.0.0): bin (i, j) of the shifted spectrum is kept where
    (i - (h-1)/2)^2 + (j - (w-1)/2)^2 <= r^2, which for even sizes is centerd half a bin beside the zero frequency;
    the inverse is then complex, and its absolute value is taken. It expects un-normalized images, [0, 1].

    Either is four small real matrix products with a cosine-sine basis of the lowest frequencies, because a bin's
    fate depends on |u| and |v| alone. They run in float32 whatever the autocast (float64 images stay float64):
    in TF32 or bfloat16 the error would be 1e-3 to 1e-2.

    Raises ValueError for a negative radius or an unknown variant.
    """
    _check(radius, variant)
    with torch.autocast(images.device.type, enabled=False):
        x = images if images.dtype == torch.float64 else images.float()
        f: _Filter = _filter(images.shape[-2], images.shape[-1], radius, variant, x.dtype, x.device)
        if variant == "exact":
            return f.project(x)
        return torch.hypot(f.project(x * f.cosine), f.project(x * f.sine))


def num_kept_bins(size: tuple[int, int], radius: Radius, variant: Variant = "exact") -> int:
    """How many of the h*w frequency bins the filter keeps; 5025 of 50176 at 224 px and r = 40 (released: 5024)."""
    _check(radius, variant)
    rows, columns = (_bins(side, _is_shifted(side, variant)) for side in size)
    return int(_inside(rows, columns, *_radii(radius, size)).sum())


def _check(radius: Radius, variant: Variant) -> None:
    if variant not in ("exact", "paper-code"):
        raise ValueError(f"a low-pass has the variant 'exact' or 'released', not {variant!r}")
    if isinstance(radius, str):
        if radius != "auto":
            raise ValueError(f"a radius is a number of frequency bins, a pair of them, or 'auto', not {radius!r}")
    elif (min(radius) <= 0) if isinstance(radius, tuple) else (radius < 0):
        raise ValueError(f"a low-pass radius is not negative (a pair: positive), but got {radius}")


def _radii(radius: Radius, size: tuple[int, int]) -> tuple[float, float]:
    radius = resolve_radius(radius, size)
    return radius if isinstance(radius, tuple) else (radius, radius)


def _is_shifted(size: int, variant: Variant) -> bool:
    """Whether the filter is centerd half a bin beside the zero frequency along an axis."""
    return variant == "paper-code" and size % 2 == 0


def _bins(size: int, shifted: bool) -> Tensor:
    """Frequencies of the `size` bins of an ordered spectrum, measured from the filter's center; float64."""
    return torch.arange(size, dtype=torch.float64) - ((size - 1) / 2 if shifted else size // 2)


def _inside(rows: Tensor, columns: Tensor, down: float, across: float) -> Tensor:
    """Whether each pair of frequencies lies in the circle or ellipse; written without division, to be exact on it."""
    y, x = rows[:, None], columns[None, :]
    if down == across:
        return y * y + x * x <= down * down
    return (y * across) ** 2 + (x * down) ** 2 <= (down * across) ** 2


class _Filter(NamedTuple):
    """A low-pass for one image size: bases (k h) and (l w), which of their products stay (k l), and a phase (h w).

    The phase is for the paper-code variant only. Moving the spectrum by half a bin multiplies the image by a phase of
    modulus one, which the absolute value takes away again; so the complex filter is the real one, on the two parts of
    the image times that phase.
    """

    rows: Tensor
    columns: Tensor
    kept: Tensor
    cosine: Tensor
    sine: Tensor

    def project(self, x: Tensor) -> Tensor:
        return self.rows.T @ (self.kept * (self.rows @ x @ self.columns.T)) @ self.columns


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _filter(h: int, w: int, radius: Radius, variant: Variant, dtype: torch.dtype, device: torch.device) -> _Filter:
    """A constant of torch.compile's graph, which then holds four products; traced, each step would make it anew."""
    return _make_filter((h, w), *_radii(radius, (h, w)), variant, dtype, device)


@lru_cache(maxsize=16)
def _make_filter(
    size: tuple[int, int], down: float, across: float, variant: Variant, dtype: torch.dtype, device: torch.device
) -> _Filter:
    shifted = [_is_shifted(side, variant) for side in size]
    rows, row_bins = _basis(size[0], down, shifted[0])
    columns, column_bins = _basis(size[1], across, shifted[1])
    kept = _inside(row_bins, column_bins, down, across)
    angles = [torch.arange(n, dtype=torch.float64) * (torch.pi / n * s) for n, s in zip(size, shifted, strict=True)]
    phase = angles[0][:, None] + angles[1][None, :]
    return _Filter(*(t.to(device, dtype) for t in (rows, columns, kept, phase.cos(), phase.sin())))


def _basis(size: int, radius: float, shifted: bool) -> tuple[Tensor, Tensor]:
    """An orthonormal real Fourier basis (k size) of the frequencies up to `radius`, and each row's frequency (k).

    Frequencies are 0, 1, 2, ..., or 1/2, 3/2, ... if `shifted`; float64.
    """
    frequency = _bins(size, shifted).abs().unique()
    frequency = frequency[frequency <= radius]
    # Zero, and the highest of an even size, are their own mirror image: a cosine only, of half the weight.
    alone = (frequency == 0) | (frequency * 2 == size)
    angle = 2 * torch.pi / size * frequency[:, None] * torch.arange(size, dtype=torch.float64)
    cosine = angle.cos() * (2 - alone.double()).sqrt()[:, None]
    sine = angle.sin()[~alone] * 2**0.5
    return torch.cat([cosine, sine]) / size**0.5, torch.cat([frequency, frequency[~alone]])
