"""From a prediction to a number: the target's patches, a distance per patch, the mean over the hidden ones.

Predicted patches may be larger than those of the mask; one that is hidden in part then counts for its hidden share.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

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
    """-log of the probability that each value's s / d scores give its bin."""
    each = scores.reshape(bins.numel(), -1)
    return F.cross_entropy(each, bins.flatten(), reduction=reduction).view(bins.shape)


_DISTANCES: dict[str, Callable[..., Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "smooth_l1": F.smooth_l1_loss,
    "cross_entropy": _cross_entropy,
}


@dataclass(frozen=True)
class Loss:
    """loss: the mean of `per_patch` over hidden patches, a scalar. per_patch: the mean distance in each patch (b m)."""

    loss: Float[Tensor, ""]
    per_patch: Float[Tensor, "b m"]


class ReconstructionLoss(nn.Module):
    """The loss of one method: target, normalization and distance are three independent choices.

    target             module from normalized images to what must be predicted: Pixels(), LowFrequency(), or
                       ColorBins() of either, which takes the distance "cross_entropy" and no normalization
    normalize_patches  MAE's norm_pix: each target patch loses its mean and is divided by sqrt(variance + 1e-6),
                       with the unbiased variance over all its p*p*c values (arXiv 2111.06377, section 3)
    distance           "mse" (MAE, PixMIM), "l1" (SimMIM), "smooth_l1", averaged over the values of a patch; for
                       ColorBins, and only for them, "cross_entropy"
    normalize_window   in place of normalize_patches: each value loses the mean of its channel over a window of this
                       odd side around it, and is divided by the deviation there (see `window_statistics`); 0: none

    Raises ValueError for choices that do not go together.
    """

    def __init__(
        self, target: nn.Module, normalize_patches: bool = True, distance: Distance = "mse", normalize_window: int = 0
    ) -> None:
        super().__init__()
        if distance not in _DISTANCES:
            raise ValueError(f"a distance is one of {', '.join(_DISTANCES)}, not {distance!r}")
        if (distance == "cross_entropy") != isinstance(target, ColorBins):
            raise ValueError("the distance 'cross_entropy' and the target ColorBins(...) go with each other only")
        if isinstance(target, ColorBins) and (normalize_patches or normalize_window):
            raise ValueError(
                "normalized values have no bins of [0, 1]: give ColorBins with normalize_patches=False and no window"
            )
        if normalize_patches and normalize_window:
            raise ValueError("a target is normalized once: with normalize_window, give normalize_patches=False")
        if normalize_window and (normalize_window < 3 or normalize_window % 2 == 0):
            raise ValueError(f"a window has a middle, so an odd side of 3 or more, not {normalize_window}")
        self.target, self.normalize_patches, self.distance = target, normalize_patches, distance
        self.normalize_window = normalize_window
        self.outputs = target.bins if isinstance(target, ColorBins) else 1
        """Numbers that are predicted for each value."""

    def forward(self, prediction: Float[Tensor, "b m d"], images: Float[Tensor, "b c h w"], mask: Mask) -> Loss:
        """The loss of a prediction (b m p*p*c*outputs) for normalized images, over the patches that `mask` hides.

        A mask on a finer grid gives each predicted patch the weight of its hidden share; then all p*p*c values of a
        patch count, its visible ones too (LSMAE's pred_downsampling). Computed in float32 whatever the autocast
        (in float64 for a prediction in it). Raises ValueError if prediction, images and mask are not of one batch, if
        the prediction does not fit the images, or the mask the prediction.
        """
        if not len(prediction) == len(images) == len(mask.hidden):
            raise ValueError(
                f"a prediction for {len(prediction)} images does not go with {len(images)} images and masks of "
                f"{len(mask.hidden)}: all three are of one batch"
            )
        patch = patch_size(prediction, images, self.outputs)
        patches = self.patches(images, patch)
        prediction = prediction if prediction.dtype == torch.float64 else prediction.float()
        distance = _DISTANCES[self.distance](prediction, patches, reduction="none").mean(dim=2)
        hidden = hidden_share(mask.hidden, patch, (images.shape[2], images.shape[3])).to(distance.dtype)
        return Loss((distance * hidden).sum() / hidden.sum(), distance)

    @torch.no_grad()
    def patches(self, images: Float[Tensor, "b c h w"], patch: int) -> Shaped[Tensor, "b n d"]:
        """What must be predicted for each patch, float32 (float64 for float64 images); of ColorBins, their numbers."""
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
        """What normalization takes from a target around each of its pixels; None where it is not normalized."""
        if self.normalize_window:
            return window_statistics(target, self.normalize_window, seen)
        return patch_statistics(target, patch, seen) if self.normalize_patches else None


def normalize_patches(patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """MAE's norm_pix over the last axis, with the unbiased variance and 1e-6 under the root.

    Written out, because on a CPU torch.var_mean takes eight times as long as its parts.
    """
    centerd = patches - patches.mean(dim=-1, keepdim=True)
    variance = centerd.square().sum(dim=-1, keepdim=True) / (patches.shape[-1] - 1)
    return centerd / (variance + 1e-6).sqrt()


Statistics = tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]
"""The mean and sqrt(variance + 1e-6) around each pixel: what normalization takes away and a picture must put back."""


def patch_statistics(
    images: Float[Tensor, "b c h w"], patch: int, seen: Bool[Tensor, "b 1 h w"] | None = None
) -> Statistics:
    """What norm_pix takes from each pixel's patch, over all its values or those of `seen` pixels alone.

    Where no pixel of a patch is seen, the mean is 0 and the deviation that of a constant.
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
    """What window normalization takes from each value: of its channel, over window x window pixels around it.

    Only pixels of the image count, or those that are `seen`; the variance is the unbiased one. Source: the SimMIM of
    Swin Transformer's repository, later than the paper, there NORM_TARGET, with windows of 47 pixels. Where no pixel
    of a window is seen, the mean is that of the whole channel.
    """
    middle = images.mean(dim=(2, 3), keepdim=True)  # sums of squares lose digits far from zero
    weights = _weights(images, seen)
    values = (images - middle) * weights
    count = _window_sum(weights, window).clamp(min=1)
    mean = _window_sum(values, window) / count
    variance = (_window_sum(values.square(), window) - count * mean.square()) / (count - 1).clamp(min=1)
    return mean + middle, (variance.clamp(min=0) + 1e-6).sqrt()


def _window_sum(images: Float[Tensor, "b c h w"], window: int) -> Float[Tensor, "b c h w"]:
    """The sum over a window around each pixel, down the columns and then along the rows."""
    down = F.avg_pool2d(images, (window, 1), 1, (window // 2, 0), divisor_override=1)
    return F.avg_pool2d(down, (1, window), 1, (0, window // 2), divisor_override=1)


def _weights(images: Float[Tensor, "b c h w"], seen: Bool[Tensor, "b 1 h w"] | None) -> Float[Tensor, "b c h w"]:
    return torch.ones_like(images) if seen is None else seen.expand_as(images).to(images.dtype)


def patch_size(prediction: Float[Tensor, "b n d"], images: Float[Tensor, "b c h w"], outputs: int = 1) -> int:
    """The patch size p for which a prediction (b n p*p*c*outputs) covers the images. Raises ValueError for none."""
    _, n, d = prediction.shape
    _, c, h, w = images.shape
    patch = math.isqrt(d // (c * outputs))
    if patch * patch * c * outputs != d or n * patch * patch != h * w:
        bins = f" with {outputs} bins" if outputs > 1 else ""
        raise ValueError(f"a prediction of {n} patches x {d} values does not cover images of {c}x{h}x{w}{bins}")
    return patch
