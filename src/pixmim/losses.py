"""Reconstruction loss: patches of the target, a distance per patch, the mean over hidden patches.

Predicted patches may be larger than those of the mask. A partly hidden patch is weighted by its hidden fraction.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from pixmim.masking import Mask
from pixmim.targets import ColorBins
from pixmim.utils.patches import hidden_share, patchify, unpatchify

Distance = Literal["mse", "l1", "smooth_l1", "cross_entropy"]


def _cross_entropy(
    scores: Float[Tensor, "b m s"], bins: Int[Tensor, "b m d"], reduction: str
) -> Float[Tensor, "b m d"]:
    return F.cross_entropy(scores.reshape(bins.numel(), -1), bins.flatten(), reduction=reduction).view(bins.shape)


_DISTANCES: dict[str, Callable[..., Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
    "cross_entropy": _cross_entropy,
}


class Loss(NamedTuple):
    """The loss of a batch, and the mean distance in each predicted patch, hidden or visible."""

    loss: Float[Tensor, ""]
    per_patch: Float[Tensor, "b m"]


class ReconstructionLoss(nn.Module):
    """Compare a prediction with a target on hidden patches: target, normalization and distance are independent.

        loss = sum(hidden * mean_over_values(distance(prediction, targets))) / sum(hidden)

    Args:
        target: Module from normalized images to images to be predicted: `Pixels()`, `LowFrequency()`, or `ColorBins()`
            of either, which needs the distance "cross_entropy" and no normalization.
        normalize_patches: MAE's norm_pix_loss (arXiv 2111.06377, section 3): normalize each target patch to
            (x - mean) / sqrt(var + 1e-6), with the unbiased variance over its p*p*c values.
        distance: "mse" (MAE, PixMIM), "l1" (SimMIM) or "smooth_l1"; "cross_entropy" for `ColorBins`.
        normalize_window: Odd side in pixels of a window; normalizes each value by the mean and deviation of its channel
            in the window around it, instead of by patches (see `window_statistics`). 0: no window.

    Raises:
        ValueError: If the choices exclude each other.
    """

    def __init__(
        self, target: nn.Module, normalize_patches: bool = True, distance: Distance = "mse", normalize_window: int = 0
    ) -> None:
        super().__init__()
        if distance not in _DISTANCES:
            raise ValueError(f"distance must be one of {', '.join(_DISTANCES)}, not {distance!r}")
        if (distance == "cross_entropy") != isinstance(target, ColorBins):
            raise ValueError("distance='cross_entropy' and target=ColorBins(...) require each other")
        if isinstance(target, ColorBins) and (normalize_patches or normalize_window):
            raise ValueError("ColorBins needs values in [0, 1]: pass normalize_patches=False and no normalize_window")
        if normalize_patches and normalize_window:
            raise ValueError("normalize_window replaces normalize_patches: pass normalize_patches=False")
        if normalize_window and (normalize_window < 3 or normalize_window % 2 == 0):
            raise ValueError(f"normalize_window must be odd and at least 3, not {normalize_window}")
        self.target, self.normalize_patches, self.distance = target, normalize_patches, distance
        self.normalize_window = normalize_window
        self.outputs = target.bins if isinstance(target, ColorBins) else 1
        """Predicted numbers per value."""

    def forward(self, prediction: Float[Tensor, "b m d"], images: Float[Tensor, "b c h w"], mask: Mask) -> Loss:
        """Compute the loss over the patches that `mask` hides, in float32 under autocast too.

        Args:
            prediction: m patches that cover the image, d = p*p*c*outputs. If p is a multiple of the mask's patch size,
                all values of a partly hidden patch count, visible ones too (LSMAE's pred_downsampling).
            images: Normalized images.
            mask: Mask of the same batch.

        Raises:
            ValueError: If the batch sizes differ, or prediction, images and mask do not match in size.
        """
        if not len(prediction) == len(images) == len(mask.hidden):
            raise ValueError(
                f"batch sizes differ: prediction {len(prediction)}, images {len(images)}, mask {len(mask.hidden)}"
            )
        patch = patch_size(prediction, images, self.outputs)
        prediction = prediction if prediction.dtype == torch.float64 else prediction.float()
        distance = _DISTANCES[self.distance](prediction, self.targets(images, patch), reduction="none").mean(dim=2)
        hidden = hidden_share(mask.hidden, patch, (images.shape[2], images.shape[3])).to(distance.dtype)
        return Loss((distance * hidden).sum() / hidden.sum(), distance)

    @torch.no_grad()
    def targets(self, images: Float[Tensor, "b c h w"], patch: int) -> Shaped[Tensor, "b n d"]:
        """Return the target of each patch: float32 (float64 for float64 images), or the bins of `ColorBins`."""
        if isinstance(self.target, ColorBins):
            return patchify(self.target.numbers(images), patch)
        target = self.target(images)
        target = target if target.dtype == torch.float64 else target.float()
        if self.normalize_window:
            mean, scale = window_statistics(target, self.normalize_window)
            target = (target - mean) / scale
        patches = patchify(target, patch)
        return normalize_patches(patches) if self.normalize_patches else patches

    def statistics(
        self, target: Float[Tensor, "b c h w"], patch: int, seen: Bool[Tensor, "b 1 h w"] | None = None
    ) -> "Statistics | None":
        """Return the mean and scale that normalization uses at each pixel; None without normalization.

        Args:
            target: Target before normalization.
            patch: Patch size in pixels.
            seen: Pixels to compute the statistics from; None: all.
        """
        if self.normalize_window:
            return window_statistics(target, self.normalize_window, seen)
        return patch_statistics(target, patch, seen) if self.normalize_patches else None


def normalize_patches(patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """Apply MAE's norm_pix to each patch: (x - mean) / sqrt(var + 1e-6), with the unbiased variance."""
    centered = patches - patches.mean(dim=-1, keepdim=True)  # on a CPU, torch.var_mean takes eight times as long
    variance = centered.square().sum(dim=-1, keepdim=True) / (patches.shape[-1] - 1)
    return centered / (variance + 1e-6).sqrt()


Statistics = tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]
"""Mean and sqrt(var + 1e-6) at each pixel."""


def patch_statistics(
    images: Float[Tensor, "b c h w"], patch: int, seen: Bool[Tensor, "b 1 h w"] | None = None
) -> Statistics:
    """Return the statistics of norm_pix at each pixel, over all values of its patch or those of `seen` pixels.

    In a patch without a seen pixel, the mean is 0 and the scale that of a constant.
    """
    size = (images.shape[2], images.shape[3])
    values, weights = patchify(images, patch), patchify(_weights(images, seen), patch)
    count = weights.sum(dim=-1, keepdim=True)
    mean = (values * weights).sum(dim=-1, keepdim=True) / count.clamp(min=1)
    variance = ((values - mean).square() * weights).sum(dim=-1, keepdim=True) / (count - 1).clamp(min=1)
    scale = (variance + 1e-6).sqrt()
    return unpatchify(mean.expand_as(values), patch, size), unpatchify(scale.expand_as(values), patch, size)


def window_statistics(
    images: Float[Tensor, "b c h w"], window: int = 47, seen: Bool[Tensor, "b 1 h w"] | None = None
) -> Statistics:
    """Return the statistics of each channel in a window around each pixel, with the unbiased variance.

    Source: NORM_TARGET of the SimMIM in Swin Transformer's repository, with windows of 47 pixels.

    Args:
        images: Images; pixels outside the border do not count.
        window: Side in pixels, odd.
        seen: Pixels that count; None: all. Windows without one have the mean of the channel.
    """
    center = images.mean(dim=(2, 3), keepdim=True)  # sums of squares lose precision for large means
    weights = _weights(images, seen)
    values = (images - center) * weights
    count = _window_sum(weights, window).clamp(min=1)
    mean = _window_sum(values, window) / count
    variance = (_window_sum(values.square(), window) - count * mean.square()) / (count - 1).clamp(min=1)
    return mean + center, (variance.clamp(min=0) + 1e-6).sqrt()


def _window_sum(images: Float[Tensor, "b c h w"], window: int) -> Float[Tensor, "b c h w"]:
    columns = F.avg_pool2d(images, (window, 1), 1, (window // 2, 0), divisor_override=1)
    return F.avg_pool2d(columns, (1, window), 1, (0, window // 2), divisor_override=1)


def _weights(images: Float[Tensor, "b c h w"], seen: Bool[Tensor, "b 1 h w"] | None) -> Float[Tensor, "b c h w"]:
    return torch.ones_like(images) if seen is None else seen.expand_as(images).to(images.dtype)


def patch_size(prediction: Float[Tensor, "b n d"], images: Float[Tensor, "b c h w"], outputs: int = 1) -> int:
    """Return the patch size p of a prediction, d = p*p*c*outputs. Raises ValueError if it does not cover the images."""
    _, n, d = prediction.shape
    _, c, h, w = images.shape
    patch = math.isqrt(d // (c * outputs))
    if patch * patch * c * outputs != d or n * patch * patch != h * w:
        text = f"a prediction of {n} patches x {d} values does not cover images of {c}x{h}x{w}"
        raise ValueError(text + f" with {outputs} bins" * (outputs > 1))
    return patch
