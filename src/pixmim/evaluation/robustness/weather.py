"""Snow, frost and fog. Images are float (c h w) in [0, 1]; lengths grow with the size."""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from pixmim.evaluation.robustness.filters import crystals, enlarge, plasma, smear

_LUMA = (0.299, 0.587, 0.114)
PANES = (
    ((0.31, 0.58, 0.65), (0.093, 0.056, 0.053)),
    ((0.77, 0.79, 0.83), (0.077, 0.079, 0.082)),
    ((0.77, 0.79, 0.83), (0.076, 0.079, 0.082)),
    ((0.57, 0.63, 0.68), (0.102, 0.102, 0.107)),
    ((0.40, 0.44, 0.49), (0.139, 0.138, 0.135)),
)
"""Mean and standard deviation of red, green and blue in the five photographs of frost that ImageNet-C was made with.

Measured in 300 random crops of 224 px from each. The second and third show the same pane; a sixth photograph exists,
but the authors' code never draws it.
"""


def snow(
    x: Float[Tensor, "c h w"], constants: tuple[float, ...], draw: np.random.Generator, scale: float
) -> Float[Tensor, "c h w"]:
    """Whitened light, and flakes that fall, thrown on it twice.

    constants: mean and deviation of the noise that flakes are cut out of, their size in pixels, the level of the cut,
    half length and sigma of their fall in pixels, and how much of the image's own light is left. Snow is made for a
    picture of 224 px, and then resized.
    """
    mean, deviation, flake, level, radius, sigma, left = constants
    full = round(x.shape[1] / scale), round(x.shape[2] / scale)  # the same snow whatever the size
    noise = mean + deviation * torch.from_numpy(draw.standard_normal((1, *full), np.float32))
    # The outermost of the ceil(224 / flake) values in the middle move onto the border.
    layer = enlarge(noise, 223 / (math.ceil(224 / flake) - 1))
    layer = torch.where(layer < level, 0.0, layer).clamp(0, 1)
    layer = smear(layer, radius, sigma, draw.uniform(-135, -45))
    layer = F.interpolate(layer[None], x.shape[1:], mode="bilinear", antialias=True)[0]
    grey = x if len(x) == 1 else (x * torch.tensor(_LUMA).view(3, 1, 1)).sum(dim=0, keepdim=True)
    white = torch.maximum(x, grey * 1.5 + 0.5)
    return left * x + (1 - left) * white + layer + layer.flip(1, 2)


def frost(
    x: Float[Tensor, "c h w"], constants: tuple[float, ...], draw: np.random.Generator, scale: float
) -> Float[Tensor, "c h w"]:
    """Add ice on the pane, in the light of one of five photographs. constants: weights of the image and of the ice."""
    mean, deviation = torch.tensor(PANES[draw.integers(len(PANES))])
    if len(x) == 1:
        mean, deviation = (values @ torch.tensor(_LUMA) for values in (mean, deviation))
    ice = mean.view(-1, 1, 1) + deviation.view(-1, 1, 1) * crystals((x.shape[1], x.shape[2]), draw)
    return constants[0] * x + constants[1] * ice.clamp(0, 1)


def fog(
    x: Float[Tensor, "c h w"], constants: tuple[float, ...], draw: np.random.Generator, scale: float
) -> Float[Tensor, "c h w"]:
    """A cloudy landscape added, and all of it scaled back to the brightest value. constants: strength, decay."""
    most = float(x.max())
    return (x + constants[0] * plasma((x.shape[1], x.shape[2]), constants[1], draw)) * most / (most + constants[0])
