"""More mask generators: squares, BEiT's rectangles and green noise."""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pixmim.masking import Grid, Mask, MaskGenerator, keep_first
from pixmim.utils import rng
from pixmim.utils.ranks import ranks


@dataclass(frozen=True)
class SquareMask(MaskGenerator):
    """Hide one square of round(sqrt(ratio * n)) patches a side: SimMIM's central region masking (section 3.2).

    Args:
        ratio: Hidden fraction, approximately.
        moving: True: anywhere in the image. False: in the center.
    """

    ratio: float
    moving: bool = False

    def num_uniforms(self, grid: Grid) -> int:
        return 2

    def sample(self, u: Float[Tensor, "b u"], grid: Grid) -> Mask:
        rows, columns = grid
        side = max(1, round(math.sqrt(self.ratio * rows * columns)))
        h, w = min(side, rows), min(side, columns)
        if h * w == rows * columns:
            raise ValueError(f"a square of ratio {self.ratio} hides all of {rows}x{columns} patches")
        position = u if self.moving else torch.full_like(u, 0.5)
        top, left = (position[:, 0] * (rows - h + 1)).long(), (position[:, 1] * (columns - w + 1)).long()
        hidden = _rectangle(top, left, torch.full_like(top, h), torch.full_like(top, w), grid)
        return Mask.from_hidden(hidden.flatten(1), rows * columns - h * w)


@dataclass(frozen=True)
class BeitBlockMask(MaskGenerator):
    """Hide rectangles one by one until int(n * ratio) patches are hidden: BEiT (arXiv 2106.08254, algorithm 1).

    A block has up to ten tries, as in BEiT's code. A try draws the area uniformly from [min_patches, patches still to
    hide] and the aspect ratio log-uniformly from [0.3, 1/0.3]. It succeeds if the block is smaller than the grid in
    both directions and hides at least one more patch, but no more than are still to hide. After ten failed tries the
    mask ends with fewer patches, so rows differ: only for models that replace hidden patches.

    Args:
        ratio: Hidden fraction, at most.
        min_patches: Smallest area of a block; at most a quarter of the patches to hide.
    """

    ratio: float = 0.4
    min_patches: int = 16

    def num_uniforms(self, grid: Grid) -> int:
        return 4 * 10 * _MAX_BLOCKS

    def has_fixed_count(self, grid: Grid) -> bool:
        return False

    def sample(self, u: Float[Tensor, "b u"], grid: Grid) -> Mask:
        rows, columns = grid
        total = int(rows * columns * self.ratio)
        if total < 1:
            raise ValueError(f"a ratio of {self.ratio} hides no patch of {rows}x{columns}")
        smallest = min(self.min_patches, total // 4)  # BEiT's 16 are of 196 patches
        hidden = torch.zeros(len(u), rows, columns, dtype=torch.bool, device=u.device)
        failed = torch.zeros(len(u), dtype=torch.long, device=u.device)  # tries of the current block
        for area_u, ratio_u, top_u, left_u in u.view(len(u), -1, 4).permute(1, 2, 0):
            remaining = total - hidden.sum(dim=(1, 2))
            area = (smallest + area_u * (remaining - smallest)).clamp(min=0)
            ratio = torch.exp((2 * ratio_u - 1) * math.log(1 / 0.3))
            h, w = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
            top, left = (top_u * (rows - h + 1)).long(), (left_u * (columns - w + 1)).long()
            block = _rectangle(top, left, h, w, grid)
            added = (block & ~hidden).sum(dim=(1, 2))
            success = (h < rows) & (w < columns) & (added > 0) & (added <= remaining) & (failed < 10)
            hidden |= block & success[:, None, None]
            failed = torch.where(success, 0, failed + 1)
        patches = hidden.flatten(1)
        one = torch.arange(patches.shape[1], device=u.device) == (u[:, :1] * patches.shape[1]).long()
        patches = patches | (one & ~patches.any(dim=1, keepdim=True))  # a grid too small for any block hides one patch
        return Mask(patches, None, None)  # without tables even if these rows agree by chance: the next ones may not


_MAX_BLOCKS = 24


@dataclass(frozen=True)
class GreenNoiseMask(MaskGenerator):
    """Keep the int(n * (1 - ratio)) patches visible where green noise is largest: ColorMAE (arXiv 2407.13036).

    Green noise is white noise through a band-pass, the difference of two Gaussians, so that hidden and visible patches
    form clumps of a few patches. Each image has a random window, flipped or not, of one of a bank of patterns, as in
    ColorMAE's code. Its patterns are published, and the code that made them is not: the Gaussians of 0.5 and 2 patches
    are pixmim's.
    """

    ratio: float = 0.75

    def num_uniforms(self, grid: Grid) -> int:
        return 5

    def sample(self, u: Float[Tensor, "b u"], grid: Grid) -> Mask:
        bank = _green_noise(max(128, 2 ** math.ceil(math.log2(2 * max(grid))))).to(u.device)
        patterns, side, _ = bank.shape
        pattern = (u[:, 0] * patterns).long().clamp(max=patterns - 1)[:, None, None]
        rows, columns = (_window(u[:, i], u[:, i + 2], length, side) for i, length in ((1, grid[0]), (2, grid[1])))
        noise = bank[pattern, rows[:, :, None], columns[:, None, :]]
        return keep_first(ranks(-noise.flatten(1)), self.ratio)


_GREEN_SIGMAS = 0.5, 2.0  # of the Gaussians, in patches
_BANK_VALUES = 2**20  # of all patterns together


@lru_cache(maxsize=2)
def _green_noise(side: int) -> Float[Tensor, "patterns side side"]:
    """Return a bank of periodic patterns of green noise, always the same: normal white noise through the band-pass."""
    count = max(1, _BANK_VALUES // side**2)
    u = rng.uniform(0, "green noise", 0, np.arange(count * side), 2 * side)
    radius, angle = np.sqrt(-2 * np.log1p(-u[:, :side])), 2 * np.pi * u[:, side:]
    white = (radius * np.cos(angle)).reshape(count, side, side)  # Box and Muller's transform
    f = np.fft.fftfreq(side)
    narrow, wide = (np.exp(-2 * (np.pi * sigma) ** 2 * (f[:, None] ** 2 + f[None, :] ** 2)) for sigma in _GREEN_SIGMAS)
    return torch.from_numpy(np.fft.ifft2(np.fft.fft2(white) * (narrow - wide)).real.astype(np.float32))


def _window(start: Tensor, flip: Tensor, length: int, side: int) -> Int[Tensor, "b length"]:
    """Return consecutive indices, modulo `side`, from a random start, in reverse order if `flip` is 1/2 or more."""
    index = torch.arange(length, device=start.device).expand(len(start), -1)
    index = torch.where(flip[:, None] < 0.5, index, length - 1 - index)
    return ((start * side).long()[:, None] + index) % side


def _rectangle(top: Tensor, left: Tensor, h: Tensor, w: Tensor, grid: Grid) -> Bool[Tensor, "b rows columns"]:
    """Return one filled rectangle for each row of top, left, h and w (b)."""
    y, x = torch.arange(grid[0], device=top.device), torch.arange(grid[1], device=top.device)
    down = (y >= top[:, None]) & (y < (top + h)[:, None])
    across = (x >= left[:, None]) & (x < (left + w)[:, None])
    return down[:, :, None] & across[:, None, :]
