"""What blurs and weather are made of: smoothing, zooming, shifting, and random landscapes. Images are float (c h w).

Smoothing and zooming act on rows and columns apart, so each is two products with a matrix of the picture's length.
"""

import math
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def smooth(x: Float[Tensor, "c h w"], sigma: float, truncate: float = 4.0) -> Float[Tensor, "c h w"]:
    """Convolve with a Gaussian of `sigma` pixels, cut at `truncate` sigmas; borders are mirrored, edge pixels twice."""
    return _smoothing(x.shape[1], sigma, truncate) @ x @ _smoothing(x.shape[2], sigma, truncate).T


def enlarge(x: Float[Tensor, "c h w"], factor: float) -> Float[Tensor, "c h w"]:
    """The middle of an image, enlarged by `factor` >= 1 to the image's size, bilinear."""
    return _enlarging(x.shape[1], factor) @ x @ _enlarging(x.shape[2], factor).T


def smear(x: Float[Tensor, "c h w"], radius: float, sigma: float, angle: float) -> Float[Tensor, "c h w"]:
    """Motion blur: each pixel is a mean along a line that begins at it, weighted by half a Gaussian.

    radius  half the line, in pixels; it holds 2 ceil(radius) + 1 of them
    sigma   of the Gaussian, in pixels
    angle   of the line, in degrees, 0 to the right and 90 downwards

    Values beyond the border are those of the nearest pixel.
    """
    h, w = x.shape[1:]
    reach = 2 * math.ceil(radius)
    weights = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(reach + 1)]
    padded = F.pad(x[None], (reach, reach, reach, reach), mode="replicate")[0]
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    total = torch.zeros_like(x)
    for i, weight in enumerate(weights):
        top, left = reach + math.floor(i * sin + 0.5), reach + math.floor(i * cos + 0.5)
        total.add_(padded[:, top : top + h, left : left + w], alpha=weight / sum(weights))
    return total


def plasma(size: tuple[int, int], decay: float, draw: np.random.Generator) -> Float[Tensor, "1 h w"]:
    """A cloudy landscape in [0, 1] by the diamond-square method on a torus; details fade with `decay` squared."""
    n = 2 ** max(1, math.ceil(math.log2(max(size))))
    field = np.zeros((n, n))
    step, strength = n, 1.0
    while step > 1:
        half = step // 2
        corners = field[::step, ::step]
        along = corners + np.roll(corners, -1, axis=1)
        centers = (along + np.roll(along, -1, axis=0)) / 4 + strength * draw.uniform(-1, 1, corners.shape)
        field[half::step, half::step] = centers
        for axis, place in (
            (0, (slice(0, None, step), slice(half, None, step))),
            (1, (slice(half, None, step), slice(0, None, step))),
        ):
            beside = centers + np.roll(centers, 1, axis=axis) + corners + np.roll(corners, -1, axis=1 - axis)
            field[place] = beside / 4 + strength * draw.uniform(-1, 1, corners.shape)
        step, strength = half, strength / decay**2
    field -= field.min()
    return torch.from_numpy((field / field.max()).astype(np.float32)[None, : size[0], : size[1]])


def crystals(size: tuple[int, int], draw: np.random.Generator) -> Float[Tensor, "h w"]:
    """Draw feathers of ice: needles in six directions, over clouds, with mean 0 and standard deviation 1.

    All are filtered from the same noise of equal power in each octave, as in photographs of frost, up to the finest
    detail of 224 px. Each direction has its own shift of the clouds: its needles grow over the others where they are
    bright.
    """
    y, x = np.fft.fftfreq(size[0])[:, None].astype(np.float32), np.fft.rfftfreq(size[1]).astype(np.float32)
    frequency, angle = np.hypot(y, x) * min(size), np.arctan2(y, x)  # periods along the shorter edge
    noise = np.fft.rfft2(draw.standard_normal(size, np.float32)) * (frequency < 160) / np.maximum(frequency, 1)
    coarse = np.exp(-((frequency / 5) ** 2))
    clouds = _standardize(np.fft.irfft2(noise * coarse, s=size))
    needles = np.full(size, -np.inf, np.float32)
    turn = draw.uniform(0, math.pi)
    for i in range(6):
        beam = np.exp(-8 * np.sin(angle - turn - i * math.pi / 6) ** 2)
        grown = _standardize(np.fft.irfft2(noise * (1 - coarse) * beam, s=size))
        region = np.roll(clouds, (i * size[0] // 6, i * size[1] // 3), axis=(0, 1))
        needles = np.maximum(needles, grown + 0.6 * region)
    return torch.from_numpy(_standardize(0.6 * clouds + _standardize(needles)))


def _standardize(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return (values - values.mean()) / (values.std() + 1e-9)


@lru_cache(64)
def _smoothing(length: int, sigma: float, truncate: float) -> Float[Tensor, "n n"]:
    """Row i holds the weights that pixel i takes of all pixels."""
    reach = int(truncate * sigma + 0.5)
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-(offsets**2) / (2 * sigma**2)) if reach else np.ones(1)
    period = (np.arange(length)[:, None] + offsets) % (2 * length)
    matrix = np.zeros((length, length))
    np.add.at(
        matrix, (np.arange(length)[:, None], np.minimum(period, 2 * length - 1 - period)), weights / weights.sum()
    )
    return torch.from_numpy(matrix.astype(np.float32))


@lru_cache(256)
def _enlarging(length: int, factor: float) -> Float[Tensor, "n n"]:
    """Row i holds the weights that pixel i of the enlarged image takes of all pixels."""
    center = (length - 1) / 2
    places = center + (np.arange(length) - center) / factor
    return torch.from_numpy(np.clip(1 - np.abs(places[:, None] - np.arange(length)), 0, None).astype(np.float32))
