"""Lenses, glass, motion, and bending. Images are float (c h w) in [0, 1]; lengths grow with `scale`."""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from pixmim.evaluation.robustness.filters import enlarge, smear, smooth


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
    """Copy nearby pixels over each other, between two Gaussian blurs. constants: sigma of the blurs, reach, rounds.

    The authors' loop visits pixels from the last to the first and means to swap each with a neighbor. Its swap of two
    array views copies instead: each pixel takes its neighbor's current value, which the neighbor itself may have
    copied earlier in the same round. Following these chains by pointer doubling gives the same result without a loop.
    A reach that is not an integer is rounded up or down at random for each pixel, with its mean preserved.
    """
    (sigma, reach, rounds), (h, w) = constants, x.shape[1:]
    reach *= scale
    most = math.ceil(reach)
    rows, columns = np.mgrid[most + 1 : h - most + 1, most + 1 : w - most + 1]
    itself = np.arange(h * w)
    place = itself
    for _ in range(int(rounds)):
        own = math.floor(reach) + (draw.random(rows.shape) < reach % 1)
        down, right = (np.floor(draw.random(rows.shape) * 2 * own).astype(np.int64) - own for _ in range(2))
        source = itself.copy()
        source[rows * w + columns] = (rows + down) * w + columns + right
        last = np.maximum(source, itself)  # a later pixel has already changed in this round
        while not np.array_equal(last, further := last[last]):
            last = further
        place = place[source[last]]
    blurred = smooth(x, sigma * scale).flatten(1)
    return smooth(blurred[:, torch.from_numpy(place)].view_as(x), sigma * scale)


def motion(
    x: Float[Tensor, "c h w"], constants: tuple[float, ...], draw: np.random.Generator, scale: float
) -> Float[Tensor, "c h w"]:
    """A smear along a line at up to 45 degrees. constants: half its length and its sigma, in pixels."""
    return smear(x, constants[0] * scale, constants[1] * scale, draw.uniform(-45, 45))


def zoom(
    x: Float[Tensor, "c h w"], constants: tuple[float, ...], draw: np.random.Generator, scale: float
) -> Float[Tensor, "c h w"]:
    """Average the image and its enlargements. constants: where the factors end, and their step from 1."""
    most, step = constants
    factors = np.arange(1, most, step).tolist()  # rounding lets severity 1 reach its end: 12 factors
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
