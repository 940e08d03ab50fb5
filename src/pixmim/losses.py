"""From a prediction to a number: the target's patches, a distance per patch, the mean over the hidden ones.

Predicted patches may be larger than those of the mask; one that is hidden in part then counts for its hidden share.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from pixmim.grid import hidden_share, patchify, unpatchify
from pixmim.masking import Mask

Distance = Literal["mse", "l1", "smooth_l1"]

_DISTANCES = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}


@dataclass(frozen=True)
class Loss:
    """loss: the mean of `per_patch` over hidden patches, a scalar. per_patch: the mean distance in each patch (b m)."""

    loss: Float[Tensor, ""]
    per_patch: Float[Tensor, "b m"]


class Objective(nn.Module):
    """The loss of one method: target, per-patch normalisation and distance are three independent choices.

    target             module from normalised images to what must be predicted: Pixels() or LowFrequency()
    normalise_patches  MAE's norm_pix: each target patch loses its mean and is divided by sqrt(variance + 1e-6),
                       with the unbiased variance over all its p*p*c values (arXiv 2111.06377, section 3)
    distance           "mse" (MAE, PixMIM), "l1" (SimMIM) or "smooth_l1", averaged over the values of a patch
    """

    def __init__(self, target: nn.Module, normalise_patches: bool = True, distance: Distance = "mse") -> None:
        super().__init__()
        if distance not in _DISTANCES:
            raise ValueError(f"a distance is one of {', '.join(_DISTANCES)}, not {distance!r}")
        self.target, self.normalise_patches, self.distance = target, normalise_patches, distance

    def forward(self, prediction: Float[Tensor, "b m d"], images: Float[Tensor, "b c h w"], mask: Mask) -> Loss:
        """The loss of a prediction (b m p*p*c) for normalised images, over the patches that `mask` hides.

        A mask on a finer grid gives each predicted patch the weight of its hidden share; then all p*p*c values of a
        patch count, its visible ones too (LSMAE's pred_downsampling). Computed in float32 whatever the autocast.
        Raises ValueError if the prediction does not fit the images, or the mask the prediction.
        """
        patch = patch_size(prediction, images)
        patches = self.patches(images, patch)
        distance = _DISTANCES[self.distance](prediction.float(), patches, reduction="none").mean(dim=2)
        hidden = hidden_share(mask.hidden, patch, (images.shape[2], images.shape[3])).to(distance.dtype)
        return Loss((distance * hidden).sum() / hidden.sum(), distance)

    @torch.no_grad()
    def patches(self, images: Float[Tensor, "b c h w"], patch: int) -> Float[Tensor, "b n d"]:
        """What must be predicted for each patch, float32 (float64 for float64 images)."""
        target = self.target(images)
        patches = patchify(target if target.dtype == torch.float64 else target.float(), patch)
        return normalise(patches) if self.normalise_patches else patches


def normalise(patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """MAE's norm_pix over the last axis, with the unbiased variance and 1e-6 under the root."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


Statistics = tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]
"""The mean and sqrt(variance + 1e-6) around each pixel: what normalisation takes away and a picture must put back."""


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


def _weights(images: Float[Tensor, "b c h w"], seen: Bool[Tensor, "b 1 h w"] | None) -> Float[Tensor, "b c h w"]:
    return torch.ones_like(images) if seen is None else seen.expand_as(images).to(images.dtype)


def patch_size(prediction: Float[Tensor, "b n d"], images: Float[Tensor, "b c h w"]) -> int:
    """The patch size p for which a prediction (b n p*p*c) covers the images. Raises ValueError if there is none."""
    _, n, d = prediction.shape
    _, c, h, w = images.shape
    patch = math.isqrt(d // c)
    if patch * patch * c != d or n * patch * patch != h * w:
        raise ValueError(f"a prediction of {n} patches x {d} values does not cover images of {c}x{h}x{w}")
    return patch
