"""Lenses, glass, motion, and bending. Images are float (c h w) in [0, 1]; lengths grow with `scale`."""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from pixmim.evaluate.corruptions.fields import enlarge, smear, smooth


def defocus(
    x: Float[Tensor, "c h w"], constants: tuple[float, ...], draw: np.random.Generator, scale: float
) -> Float[Tensor, "c h w"]:
    """Convolve with a disk. constants: its radius, and the sigma that softens its edge, in pixels."""
    kernel = disk(constants[0] * scale, constants[1] * scale)
    reach = len(kernel) // 2
    padded = F.pad(x[:, None], (reach, reach, reach, reach), mode="reflect")
    return F.conv2d(padded, kernel[None, None])[:, 0]


def disk(radius: float, sigma: float) -> Float[Tensor, "k k"]:
    """A disk that sums to one; a pixel on the rim counts for about the share of it that is covered."""
    reach = math.ceil(radius + 0.5 + 2 * sigma)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    kernel = torch.from_numpy(np.clip(radius + 0.5 - np.hypot(y, x), 0, 1).astype(np.float32))
    kernel = smooth(kernel[None], sigma, truncate=2.0)[0]
    return kernel / kernel.sum()


def glass(
    x: Float[Tensor, "c h w"], constants: tuple[float, ...], draw: np.random.Generator, scale: float
) -> Float[Tensor, "c h w"]:
    """Pixels change places with near ones. constants: sigma of a Gaussian before and after, reach, rounds.

    A reach that is not whole is for each pixel one of the two whole numbers beside it, at odds that keep the mean.
    """
    (sigma, reach, rounds), (h, w) = constants, x.shape[1:]
    reach *= scale
    most = math.ceil(reach)
    place = np.arange(h * w).reshape(h, w)
    stride = 2 * most  # pixels so far apart cannot meet
    for _ in range(int(rounds)):
        for start in range(stride * stride):
            rows, columns = np.meshgrid(
                np.arange(most + start // stride, h - most, stride),
                np.arange(most + start % stride, w - most, stride),
                indexing="ij",
            )
            own = math.floor(reach) + (draw.random(rows.shape) < reach % 1)
            down, right = (np.floor(draw.random(rows.shape) * 2 * own).astype(np.int64) - own for _ in range(2))
            here, there = (rows, columns), (rows + down, columns + right)
            place[here], place[there] = place[there], place[here]
    blurred = smooth(x, sigma * scale).flatten(1)
    return smooth(blurred[:, torch.from_numpy(place.reshape(-1))].view_as(x), sigma * scale)


def motion(
    x: Float[Tensor, "c h w"], constants: tuple[float, ...], draw: np.random.Generator, scale: float
) -> Float[Tensor, "c h w"]:
    """A smear along a line at up to 45 degrees. constants: half its length and its sigma, in pixels."""
    return smear(x, constants[0] * scale, constants[1] * scale, draw.uniform(-45, 45))


def zoom(
    x: Float[Tensor, "c h w"], constants: tuple[float, ...], draw: np.random.Generator, scale: float
) -> Float[Tensor, "c h w"]:
    """The mean of the image and of its enlargements. constants: the largest (not reached), and the step."""
    most, step = constants
    factors = [1 + step * i for i in range(math.ceil((most - 1) / step - 1e-6))]
    total = x.clone()
    for factor in factors:
        total += enlarge(x, factor)
    return total / (len(factors) + 1)


def elastic(
    x: Float[Tensor, "c h w"], constants: tuple[float, ...], draw: np.random.Generator, scale: float
) -> Float[Tensor, "c h w"]:
    """Bend and shear. constants, in pixels: strength and sigma of a smooth displacement; how far three corners move.

    The displacement is noise in [-1, 1], smoothed and multiplied by the strength. What is left of noise falls with
    sigma in pixels, so the strength grows with the square of the scale for the displacement to grow with the scale.
    """
    (strength, sigma, corners), (h, w) = constants, x.shape[1:]
    noise = torch.from_numpy(draw.uniform(-1, 1, (2, h, w)).astype(np.float32))
    right, down = smooth(noise, sigma * scale, truncate=3.0) * strength * scale**2

    middle, third = np.array([w, h]) // 2, min(h, w) // 3
    fixed = middle + third * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = fixed + draw.uniform(-corners * scale, corners * scale, (3, 2))
    # A map of (x, y, 1) that takes the three fixed points to where they moved.
    matrix = np.linalg.solve(np.c_[fixed, np.ones(3)], moved).T.astype(np.float32).tolist()

    y, z = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    y, z = y + down, z + right
    (a, b, c), (d, e, f) = matrix
    grid = torch.stack([(a * z + b * y + c) * 2 / (w - 1) - 1, (d * z + e * y + f) * 2 / (h - 1) - 1], dim=-1)
    return F.grid_sample(x[None], grid[None], mode="bilinear", padding_mode="reflection", align_corners=True)[0]
