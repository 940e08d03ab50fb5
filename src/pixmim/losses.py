"""From a prediction to a number: the target's patches, a distance per patch, the mean over the hidden ones."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pixmim.grid import patchify
from pixmim.masking import Mask

Distance = Literal["mse", "l1", "smooth_l1"]

_DISTANCES = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}


@dataclass(frozen=True)
class Loss:
    """loss: the mean of `per_patch` over hidden patches, a scalar. per_patch: the mean distance in each patch (b n)."""

    loss: Float[Tensor, ""]
    per_patch: Float[Tensor, "b n"]


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

    def forward(self, prediction: Float[Tensor, "b n d"], images: Float[Tensor, "b c h w"], mask: Mask) -> Loss:
        """The loss of a prediction (b n p*p*c) for normalised images, over the patches that `mask` hides.

        Computed in float32 whatever the autocast. Raises ValueError if the prediction does not fit the images.
        """
        patches = self.patches(images, patch_size(prediction, images))
        distance = _DISTANCES[self.distance](prediction.float(), patches, reduction="none").mean(dim=2)
        hidden = mask.hidden.to(distance.dtype)
        return Loss((distance * hidden).sum() / hidden.sum(), distance)

    @torch.no_grad()
    def patches(self, images: Float[Tensor, "b c h w"], patch: int) -> Float[Tensor, "b n d"]:
        """What must be predicted for each patch, float32 (float64 for float64 images)."""
        target = self.target(images)
        patches = patchify(target if target.dtype == torch.float64 else target.float(), patch)
        return normalise(patches) if self.normalise_patches else patches


def normalise(patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
    """MAE's norm_pix over the last axis, with the unbiased variance and 1e-6 under the root."""
    mean, scale = statistics(patches)
    return (patches - mean) / scale


def statistics(patches: Float[Tensor, "b n d"]) -> tuple[Float[Tensor, "b n 1"], Float[Tensor, "b n 1"]]:
    """Mean and sqrt(variance + 1e-6) of each patch: what norm_pix takes away, and what a picture must put back."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()


def patch_size(prediction: Float[Tensor, "b n d"], images: Float[Tensor, "b c h w"]) -> int:
    """The patch size p for which a prediction (b n p*p*c) covers the images. Raises ValueError if there is none."""
    _, n, d = prediction.shape
    _, c, h, w = images.shape
    patch = math.isqrt(d // c)
    if patch * patch * c != d or n * patch * patch != h * w:
        raise ValueError(f"a prediction of {n} patches x {d} values does not cover images of {c}x{h}x{w}")
    return patch
