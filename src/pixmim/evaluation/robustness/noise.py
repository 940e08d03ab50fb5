"""Noise of the sensor: each value by itself. Images are float (c h w) in [0, 1]; results may leave that range."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def gaussian(
    x: Float[Tensor, "c h w"], constants: tuple[float, ...], draw: np.random.Generator, scale: float
) -> Float[Tensor, "c h w"]:
    """Add normal noise. constants: its deviation."""
    return x + constants[0] * torch.from_numpy(draw.standard_normal(x.shape, np.float32))


def shot(
    x: Float[Tensor, "c h w"], constants: tuple[float, ...], draw: np.random.Generator, scale: float
) -> Float[Tensor, "c h w"]:
    """Count light by its quanta. constants: the mean count of a white value."""
    return torch.from_numpy(draw.poisson(x.numpy() * constants[0]).astype(np.float32)) / constants[0]


def impulse(
    x: Float[Tensor, "c h w"], constants: tuple[float, ...], draw: np.random.Generator, scale: float
) -> Float[Tensor, "c h w"]:
    """Values that fall to black or white, as often. constants: the share of values that do."""
    u = torch.from_numpy(draw.random(x.shape, np.float32))
    share = constants[0]
    return torch.where(u < share / 2, 0.0, torch.where(u < share, 1.0, x))
