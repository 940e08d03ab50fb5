"""Filters and random textures for the corruptions: smoothing, zoom, motion blur, clouds and ice crystals.

Images are float (c h w). Smoothing and zoom are separable: a matrix product along rows and one along columns.
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
    """Convolve with a Gaussian of `sigma` pixels, cut at `truncate` sigmas; symmetric padding (edge pixels repeat)."""
    return _smoothing(x.shape[1], sigma, truncate) @ x @ _smoothing(x.shape[2], sigma, truncate).T


def enlarge(x: Float[Tensor, "c h w"], factor: float) -> Float[Tensor, "c h w"]:
    """Zoom into the center by `factor` >= 1, bilinear; the size stays."""
    return _zoom(x.shape[1], factor) @ x @ _zoom(x.shape[2], factor).T


def smear(x: Float[Tensor, "c h w"], radius: float, sigma: float, angle: float) -> Float[Tensor, "c h w"]:
    """Motion blur: average 2 ceil(radius) + 1 pixels along a line from each pixel, weighted by half a Gaussian.

    Radius and sigma are in pixels, the angle in degrees: 0 to the right, 90 down. Edge pixels are repeated outside.
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


def plasma(size: tuple[int, int], decay: float, generator: np.random.Generator) -> Float[Tensor, "1 h w"]:
    """Return clouds in [0, 1] by the diamond-square algorithm on a torus; details fade with `decay` squared."""
    n = 2 ** max(1, math.ceil(math.log2(max(size))))
    field = np.zeros((n, n))
    step, strength = n, 1.0
    while step > 1:
        half = step // 2
        even, odd = slice(0, None, step), slice(half, None, step)
        corners = field[::step, ::step]
        along = corners + np.roll(corners, -1, axis=1)
        centers = (along + np.roll(along, -1, axis=0)) / 4 + strength * generator.uniform(-1, 1, corners.shape)
        field[half::step, half::step] = centers
        for axis, edges in ((0, (even, odd)), (1, (odd, even))):
            neighbors = centers + np.roll(centers, 1, axis=axis) + corners + np.roll(corners, -1, axis=1 - axis)
            field[edges] = neighbors / 4 + strength * generator.uniform(-1, 1, corners.shape)
        step, strength = half, strength / decay**2
    field -= field.min()
    return torch.from_numpy((field / field.max()).astype(np.float32)[None, : size[0], : size[1]])


def crystals(size: tuple[int, int], generator: np.random.Generator) -> Float[Tensor, "h w"]:
    """Return feathers of ice: needles in six directions over clouds, with mean 0 and standard deviation 1.

    All are filtered from the same noise with equal power in each octave, as in photographs of frost, up to the finest
    detail of 224 px. Each direction has its own shift of the clouds: its needles dominate where they are bright.
    """
    y, x = np.fft.fftfreq(size[0])[:, None].astype(np.float32), np.fft.rfftfreq(size[1]).astype(np.float32)
    frequency, angle = np.hypot(y, x) * min(size), np.arctan2(y, x)  # periods along the shorter edge
    noise = np.fft.rfft2(generator.standard_normal(size, np.float32)) * (frequency < 160) / np.maximum(frequency, 1)
    coarse = np.exp(-((frequency / 5) ** 2))
    clouds = _standardize(np.fft.irfft2(noise * coarse, s=size))
    needles = np.full(size, -np.inf, np.float32)
    rotation = generator.uniform(0, math.pi)
    for i in range(6):
        beam = np.exp(-8 * np.sin(angle - rotation - i * math.pi / 6) ** 2)
        direction = _standardize(np.fft.irfft2(noise * (1 - coarse) * beam, s=size))
        region = np.roll(clouds, (i * size[0] // 6, i * size[1] // 3), axis=(0, 1))
        needles = np.maximum(needles, direction + 0.6 * region)
    return torch.from_numpy(_standardize(0.6 * clouds + _standardize(needles)))


def _standardize(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return (values - values.mean()) / (values.std() + 1e-9)


@lru_cache(64)
def _smoothing(length: int, sigma: float, truncate: float) -> Float[Tensor, "n n"]:
    reach = int(truncate * sigma + 0.5)
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-(offsets**2) / (2 * sigma**2)) if reach else np.ones(1)
    rows = np.arange(length)[:, None]
    period = (rows + offsets) % (2 * length)
    matrix = np.zeros((length, length))
    np.add.at(matrix, (rows, np.minimum(period, 2 * length - 1 - period)), weights / weights.sum())
    return torch.from_numpy(matrix.astype(np.float32))


@lru_cache(256)
def _zoom(length: int, factor: float) -> Float[Tensor, "n n"]:
    center = (length - 1) / 2
    sources = center + (np.arange(length) - center) / factor
    return torch.from_numpy(np.clip(1 - np.abs(sources[:, None] - np.arange(length)), 0, None).astype(np.float32))
