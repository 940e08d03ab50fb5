"""Snow, frost and fog. Images are float (c h w) in [0, 1]; lengths grow with the size."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from pixmim.evaluate.corruptions.fields import enlarge, plasma, ridges, smear

_LUMA = (0.299, 0.587, 0.114)
_ICE = (0.82, 0.92, 1.0)  # the colour of frost: white with some blue


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
    layer = enlarge(noise, flake)
    layer = torch.where(layer < level, 0.0, layer).clamp(0, 1)
    layer = smear(layer, radius, sigma, draw.uniform(-135, -45))
    layer = F.interpolate(layer[None], x.shape[1:], mode="bilinear", antialias=True)[0]
    grey = x if len(x) == 1 else (x * torch.tensor(_LUMA).view(3, 1, 1)).sum(dim=0, keepdim=True)
    white = torch.maximum(x, grey * 1.5 + 0.5)
    return left * x + (1 - left) * white + layer + layer.flip(1, 2)


def frost(
    x: Float[Tensor, "c h w"], constants: tuple[float, ...], draw: np.random.Generator, scale: float
) -> Float[Tensor, "c h w"]:
    """Crystals on the pane, drawn, in front of the image. constants: weights of the image and of the frost."""
    veins = torch.from_numpy(ridges((x.shape[1], x.shape[2]), draw))
    cover = plasma((x.shape[1], x.shape[2]), 1.6, draw)[0]
    ice = (0.3 + 0.7 * veins) * (0.55 + 0.45 * cover)
    ice = ice / ice.max()
    colour = torch.tensor(_ICE if len(x) == 3 else (1.0,)).view(-1, 1, 1)
    return constants[0] * x + constants[1] * ice * colour


def fog(
    x: Float[Tensor, "c h w"], constants: tuple[float, ...], draw: np.random.Generator, scale: float
) -> Float[Tensor, "c h w"]:
    """A cloudy landscape added, and all of it scaled back to the brightest value. constants: strength, decay."""
    most = float(x.max())
    return (x + constants[0] * plasma((x.shape[1], x.shape[2]), constants[1], draw)) * most / (most + constants[0])
