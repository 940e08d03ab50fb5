"""Mask generators. A mask is a value made outside the model: models draw no random numbers.

A generator is a function of a grid and of a fixed count of uniform numbers per image, so that a mask can be recomputed
from (seed, step, row). Called as `generator(batch, grid)`, it draws these numbers itself.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pixmim.utils import rng

Grid = tuple[int, int]
"""(rows, columns) of patches."""


@dataclass(frozen=True)
class Mask:
    """Hidden patches of a batch, with MAE's index tables.

    If rows hide different numbers of patches, there are no tables: models that drop hidden patches (MAE, LSMAE,
    ConvMAE) need rows of one length, models that replace them (SimMIM) do not.

    Attributes:
        hidden: True = not seen by the network.
        ids_keep: Visible patches of each row, ascending; int64.
        ids_restore: Index of each patch in the sequence "visible patches, then hidden patches"; int64.
    """

    hidden: Bool[Tensor, "b n"]
    ids_keep: Int[Tensor, "b k"] | None
    ids_restore: Int[Tensor, "b n"] | None

    @staticmethod
    def from_hidden(hidden: Bool[Tensor, "b n"], visible: int | None = None) -> "Mask":
        """Build a mask with its tables.

        Args:
            hidden: True = not seen by the network.
            visible: Number of visible patches in each row, if known; avoids a device synchronization.

        Raises:
            ValueError: If a row hides all patches or no patch.
        """
        if visible is None:
            counts = (~hidden).sum(dim=1)
            if not bool(((counts > 0) & (counts < hidden.shape[1])).all()):
                raise ValueError("each row of a mask must have hidden and visible patches")
            if not bool((counts == counts[0]).all()):
                return Mask(hidden, None, None)
            visible = int(counts[0])
        # Visible and hidden patches each keep their order, so a cumulative count is an index.
        restore = torch.where(hidden, visible + hidden.cumsum(dim=1), (~hidden).cumsum(dim=1)) - 1
        return Mask(hidden, _inverse(restore)[:, :visible], restore)

    @property
    def indices(self) -> tuple[Int[Tensor, "b k"], Int[Tensor, "b n"]]:
        """(ids_keep, ids_restore). Raises ValueError if the rows hide different numbers of patches."""
        if self.ids_keep is None or self.ids_restore is None:
            raise ValueError(
                "this model drops hidden patches, so each row must hide the same number of them; BEiT's blocks, and "
                "complete blocks (whole_blocks) that do not divide the grid, do not: choose another mask, or SimMIM"
            )
        return self.ids_keep, self.ids_restore

    def to(self, device: torch.device | str) -> "Mask":
        """Copy to a device, asynchronously from page-locked memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Mask":
        """Copy to page-locked memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Mask":
        ids_keep, ids_restore = (None if t is None else function(t) for t in (self.ids_keep, self.ids_restore))
        return Mask(function(self.hidden), ids_keep, ids_restore)


class MaskGenerator(ABC):
    """Base of mask generators: uniform numbers to masks."""

    ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"mask ratio must be between 0 and 1, not {self.ratio}")

    @abstractmethod
    def num_uniforms(self, grid: Grid) -> int:
        """Return the count of uniform numbers per image."""

    @abstractmethod
    def sample(self, u: Float[Tensor, "b u"], grid: Grid) -> Mask:
        """Turn uniform numbers in [0, 1) into masks, one for each row.

        Raises:
            ValueError: If the settings hide all patches of this grid, or no patch.
        """

    def has_fixed_count(self, grid: Grid) -> bool:
        """Return True if all masks of a grid hide the same number of patches."""
        return True

    def __call__(self, batch: int, grid: int | Grid, generator: torch.Generator | None = None) -> Mask:
        """Draw masks for `batch` images with a torch generator. `grid`: (rows, columns), or the number of patches."""
        shape = (1, grid) if isinstance(grid, int) else grid
        device = generator.device if generator is not None else None
        return self.sample(torch.rand(batch, self.num_uniforms(shape), generator=generator, device=device), shape)


@dataclass(frozen=True)
class RandomMask(MaskGenerator):
    """Hide random patches, keeping int(n * (1 - ratio)) visible: MAE's random_masking (arXiv 2111.06377, section 3).

    At ratio 0.75, 49 of 196 patches stay visible, and 64 of 256.
    """

    ratio: float = 0.75

    def num_uniforms(self, grid: Grid) -> int:
        return grid[0] * grid[1]

    def sample(self, u: Float[Tensor, "b u"], grid: Grid) -> Mask:
        return _keep_first(_rank(u), self.ratio)


@dataclass(frozen=True)
class BlockwiseRandomMask(MaskGenerator):
    """Hide random square blocks of patches; blocks at the border may be smaller.

    Args:
        ratio: Hidden fraction.
        block_size: Side of a block in patches.
        whole_blocks: False: keep int(n * (1 - ratio)) patches visible, cutting the last block, column by column
            (LSMAE, arXiv 2210.07224). True: hide ceil(blocks * ratio) complete blocks (SimMIM, arXiv 2111.09886,
            section 3.2: blocks of 32 px, 22 of 36 at 192 px and 30 of 49 at 224 px at ratio 0.6).
    """

    ratio: float
    block_size: int
    whole_blocks: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 1:
            raise ValueError(f"block_size must be 1 or more, not {self.block_size}")

    def num_uniforms(self, grid: Grid) -> int:
        return math.ceil(grid[0] / self.block_size) * math.ceil(grid[1] / self.block_size)

    def has_fixed_count(self, grid: Grid) -> bool:
        return not self.whole_blocks or (grid[0] % self.block_size == 0 and grid[1] % self.block_size == 0)

    def sample(self, u: Float[Tensor, "b u"], grid: Grid) -> Mask:
        size = self.block_size
        row, column = torch.arange(grid[0], device=u.device)[:, None], torch.arange(grid[1], device=u.device)[None, :]
        block_of_patch = (row // size * math.ceil(grid[1] / size) + column // size).flatten()
        rank = _rank(u)[:, block_of_patch]
        if not self.whole_blocks:
            within = (column % size * size + row % size).flatten()
            return _keep_first(_rank(rank * size**2 + within), self.ratio)
        blocks = self.num_uniforms(grid)
        hidden = math.ceil(blocks * self.ratio)
        if hidden >= blocks:
            raise ValueError(f"a ratio of {self.ratio} hides all {blocks} blocks of {size}x{size} patches")
        return Mask.from_hidden(rank < hidden, (blocks - hidden) * size**2 if self.has_fixed_count(grid) else None)


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
        return _keep_first(_rank(-noise.flatten(1)), self.ratio)


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


class MaskSampler:
    """Sample the masks of a run as a function of (seed, step, row of the batch).

    Args:
        generator: Kind of mask.
        grid: (rows, columns) of patches.
        seed: Seed of the run.
        batch_size: Images per batch, over all ranks.
    """

    def __init__(self, generator: MaskGenerator, grid: Grid, seed: int, batch_size: int) -> None:
        self._generator, self._grid, self._seed, self._batch_size = generator, grid, seed, batch_size
        self._count_hidden = lru_cache(maxsize=4)(lambda step: int(self(step, range(batch_size)).hidden.sum()))

    def __call__(self, step: int, rows: npt.ArrayLike) -> Mask:
        """Sample the masks of some rows of a step's batch."""
        u = rng.uniform(self._seed, "mask", step, rows, self._generator.num_uniforms(self._grid))
        return self._generator.sample(torch.from_numpy(u.astype(np.float32)), self._grid)

    def at(self, positions: npt.NDArray[np.int64]) -> tuple[Mask, float]:
        """Sample the masks at positions of a run, all in one batch.

        Returns:
            The masks, and their fraction of the hidden patches of the batch: the weight of these rows in the loss,
            which is a mean over hidden patches.
        """
        step, rows = int(positions[0]) // self._batch_size, positions % self._batch_size
        mask = self(step, rows)
        if self._generator.has_fixed_count(self._grid):
            return mask, len(rows) / self._batch_size
        return mask, int(mask.hidden.sum()) / self._count_hidden(step)


def _rank(values: Tensor) -> Tensor:
    """Return the rank of each value in its row. Stable, so that devices agree on ties."""
    return _inverse(torch.argsort(values, dim=1, stable=True))


def _inverse(permutation: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """Return the inverse of the permutation in each row."""
    numbers = torch.arange(permutation.shape[1], device=permutation.device).expand_as(permutation)
    return torch.empty_like(permutation).scatter_(1, permutation, numbers)


def _keep_first(rank: Tensor, ratio: float) -> Mask:
    """Keep the int(n * (1 - ratio)) patches of lowest rank visible."""
    patches = rank.shape[1]
    visible = int(patches * (1 - ratio))
    if not 0 < visible < patches:
        raise ValueError(f"a ratio of {ratio} over {patches} patches leaves {visible} visible")
    return Mask.from_hidden(rank >= visible, visible)


def _rectangle(top: Tensor, left: Tensor, h: Tensor, w: Tensor, grid: Grid) -> Bool[Tensor, "b rows columns"]:
    """Return one filled rectangle for each row of top, left, h and w (b)."""
    y, x = torch.arange(grid[0], device=top.device), torch.arange(grid[1], device=top.device)
    down = (y >= top[:, None]) & (y < (top + h)[:, None])
    across = (x >= left[:, None]) & (x < (left + w)[:, None])
    return down[:, :, None] & across[:, None, :]
