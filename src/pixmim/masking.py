"""What is hidden from the network. A mask is a value made outside the model; models never draw random numbers.

Like a crop, a masker is a function of a grid and of uniform numbers, a fixed count for each image, so that a loop can
compute the same mask again from (seed, step, row). Called with a generator it draws those numbers itself.
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


@dataclass(frozen=True)
class Mask:
    """Which patches are hidden, and the index tables a model needs to drop them and to put them back.

    hidden   bool (b n): True = hidden from the network, everywhere in pixmim
    keep     int64 (b k): the visible patches of each row, in rising order
    restore  int64 (b n): place of each patch in the sequence "visible patches, then hidden ones"

    Where rows hide different numbers of patches there are no tables (None): a model that drops tokens needs rows of
    one length, a model that replaces them does not.
    """

    hidden: Bool[Tensor, "b n"]
    ids_keep: Int[Tensor, "b k"] | None
    ids_restore: Int[Tensor, "b n"] | None

    @staticmethod
    def from_hidden(hidden: Bool[Tensor, "b n"], visible: int | None = None) -> "Mask":
        """Build a Mask. `visible` is the number of visible patches in each row; giving it spares a wait for the device.

        Raises ValueError if a row hides all patches or none.
        """
        if visible is None:
            counts = (~hidden).sum(dim=1)
            if not bool(((counts > 0) & (counts < hidden.shape[1])).all()):
                raise ValueError("a mask must hide some patches and leave some, in every row")
            if not bool((counts == counts[0]).all()):
                return Mask(hidden, None, None)
            visible = int(counts[0])
        # Patches keep their order among the visible ones and among the hidden ones, so counting places them.
        seen = (~hidden).cumsum(dim=1)
        restore = torch.where(hidden, visible + hidden.cumsum(dim=1), seen) - 1
        return Mask(hidden, _inverse(restore)[:, :visible], restore)

    @property
    def indices(self) -> tuple[Int[Tensor, "b k"], Int[Tensor, "b n"]]:
        """keep and restore. Raises ValueError if the rows hide different numbers of patches."""
        if self.ids_keep is None or self.ids_restore is None:
            raise ValueError(
                "this model drops hidden patches, so each row of a mask must hide the same number of them; block-wise "
                "masks, and whole units that do not divide the grid, do not: choose another mask, or SimMIM"
            )
        return self.ids_keep, self.ids_restore

    def to(self, device: torch.device | str) -> "Mask":
        """Copy to another device, without waiting where that is possible."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Mask":
        """Copy to page-locked memory."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Mask":
        keep, restore = (None if t is None else function(t) for t in (self.ids_keep, self.ids_restore))
        return Mask(function(self.hidden), keep, restore)


class MaskGenerator(ABC):
    """The contract of a masker: how many uniform numbers an image takes, and what mask they decide."""

    @abstractmethod
    def num_uniforms(self, grid: Grid) -> int:
        """Uniform numbers that an image with a grid of (rows, columns) patches takes."""

    @abstractmethod
    def sample(self, u: Float[Tensor, "b u"], grid: Grid) -> Mask:
        """The masks that the numbers `u` in [0, 1) decide, one for each row.

        Raises ValueError if the masker's settings would hide every patch of this grid, or none.
        """

    def has_fixed_count(self, grid: Grid) -> bool:
        """Return True if all masks of a grid hide the same number of patches."""
        return True

    def __call__(self, batch: int, grid: int | Grid, generator: torch.Generator | None = None) -> Mask:
        """Masks for `batch` images, drawn from torch's `generator`. `grid`: (rows, columns), or their number alone."""
        shape = (1, grid) if isinstance(grid, int) else grid
        device = generator.device if generator is not None else None
        return self.sample(torch.rand(batch, self.num_uniforms(shape), generator=generator, device=device), shape)


@dataclass(frozen=True)
class RandomMask(MaskGenerator):
    """MAE's mask: each patch is as likely to be hidden as any other; int(n * (1 - ratio)) stay visible.

    Source: MAE (arXiv 2111.06377), section 3; 196 -> 49, 256 -> 64, 784 -> 196 at ratio 0.75.
    """

    ratio: float = 0.75

    def __post_init__(self) -> None:
        _check(self.ratio)

    def num_uniforms(self, grid: Grid) -> int:
        return grid[0] * grid[1]

    def sample(self, u: Float[Tensor, "b u"], grid: Grid) -> Mask:
        return _keep_first(_rank(u), self.ratio)


@dataclass(frozen=True)
class BlockwiseRandomMask(MaskGenerator):
    """Units of `unit` x `unit` patches are hidden together. Units at the border may hold fewer patches.

    whole  False, LSMAE's rule: int(n * (1 - ratio)) patches stay visible, the last unit cut if need be, its columns
           one after another. True, SimMIM's: ceil(units * ratio) whole units are hidden.

    Sources: LSMAE (arXiv 2210.07224); SimMIM (arXiv 2111.09886), section 3.2: in units of 32 px, 22 of 36 are hidden
    at 192 px and 30 of 49 at 224 px, at ratio 0.6.
    """

    ratio: float
    block_size: int
    whole_blocks: bool = False

    def __post_init__(self) -> None:
        _check(self.ratio)
        if self.block_size < 1:
            raise ValueError(f"a mask unit is at least one patch wide, not {self.block_size}")

    def num_uniforms(self, grid: Grid) -> int:
        return math.ceil(grid[0] / self.block_size) * math.ceil(grid[1] / self.block_size)

    def has_fixed_count(self, grid: Grid) -> bool:
        return not self.whole_blocks or (grid[0] % self.block_size == 0 and grid[1] % self.block_size == 0)

    def sample(self, u: Float[Tensor, "b u"], grid: Grid) -> Mask:
        row = torch.arange(grid[0], device=u.device)[:, None]
        column = torch.arange(grid[1], device=u.device)[None, :]
        unit_of_patch = (
            row // self.block_size * math.ceil(grid[1] / self.block_size) + column // self.block_size
        ).flatten()
        rank = _rank(u)[:, unit_of_patch]
        if not self.whole_blocks:
            within = (column % self.block_size * self.block_size + row % self.block_size).flatten()
            return _keep_first(_rank(rank * self.block_size**2 + within), self.ratio)
        units = self.num_uniforms(grid)
        hidden = math.ceil(units * self.ratio)
        if hidden >= units:
            raise ValueError(
                f"a ratio of {self.ratio} hides all {units} units of {self.block_size}x{self.block_size} patches"
            )
        return Mask.from_hidden(
            rank < hidden, (units - hidden) * self.block_size**2 if self.has_fixed_count(grid) else None
        )


@dataclass(frozen=True)
class SquareMask(MaskGenerator):
    """One square of about `ratio` of the area is hidden: in the middle, or anywhere if it is `moving`.

    Its side is round(sqrt(ratio * n)) patches. Source: SimMIM, section 3.2 ("central region masking").
    """

    ratio: float
    moving: bool = False

    def __post_init__(self) -> None:
        _check(self.ratio)

    def num_uniforms(self, grid: Grid) -> int:
        return 2

    def sample(self, u: Float[Tensor, "b u"], grid: Grid) -> Mask:
        rows, columns = grid
        side = max(1, round(math.sqrt(self.ratio * rows * columns)))
        h, w = min(side, rows), min(side, columns)
        if h * w == rows * columns:
            raise ValueError(f"a square of ratio {self.ratio} hides all of a grid of {rows}x{columns} patches")
        place = u if self.moving else torch.full_like(u, 0.5)
        top, left = (place[:, 0] * (rows - h + 1)).long(), (place[:, 1] * (columns - w + 1)).long()
        size = torch.tensor([h, w], device=u.device).expand(len(u), 2)
        return Mask.from_hidden(_rectangle(top, left, size[:, 0], size[:, 1], grid).flatten(1), rows * columns - h * w)


@dataclass(frozen=True)
class BeitBlockMask(MaskGenerator):
    """BEiT's block-wise mask: rectangles are hidden one after another, until int(n * ratio) patches are.

    A block has up to ten tries. Each draws an area uniformly between `least` patches (but no more than a quarter of the
    whole number) and what is still to hide, and an aspect
    ratio log-uniformly between 0.3 and 1/0.3; it counts if the block is smaller than the grid both ways and adds at
    least one patch and no more than is still to hide. When ten tries fail, the mask stays short of its number, so rows
    may differ: only models that replace hidden patches take it.

    Source: BEiT (arXiv 2106.08254), algorithm 1, with the tries of its code.
    """

    ratio: float = 0.4
    least: int = 16

    def __post_init__(self) -> None:
        _check(self.ratio)

    def num_uniforms(self, grid: Grid) -> int:
        return 4 * 10 * _MOST_BLOCKS

    def has_fixed_count(self, grid: Grid) -> bool:
        return False

    def sample(self, u: Float[Tensor, "b u"], grid: Grid) -> Mask:
        rows, columns = grid
        wanted = int(rows * columns * self.ratio)
        if wanted < 1:
            raise ValueError(f"a ratio of {self.ratio} hides no patch of a grid of {rows}x{columns}")
        least = min(self.least, wanted // 4)  # BEiT's 16 are of 196 patches; a small grid needs smaller blocks
        hidden = torch.zeros(len(u), rows, columns, dtype=torch.bool, device=u.device)
        failed = torch.zeros(len(u), dtype=torch.long, device=u.device)  # tries of the present block
        for area_u, ratio_u, top_u, left_u in u.view(len(u), -1, 4).permute(1, 2, 0):
            left_over = wanted - hidden.sum(dim=(1, 2))
            area = (least + area_u * (left_over - least)).clamp(min=0)
            ratio = torch.exp((2 * ratio_u - 1) * math.log(1 / 0.3))
            h, w = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
            top, left = (top_u * (rows - h + 1)).long(), (left_u * (columns - w + 1)).long()
            block = _rectangle(top, left, h, w, grid)
            adds = (block & ~hidden).sum(dim=(1, 2))
            taken = (h < rows) & (w < columns) & (adds > 0) & (adds <= left_over) & (failed < 10)
            hidden |= block & taken[:, None, None]
            failed = torch.where(taken, 0, failed + 1)
        patches = hidden.flatten(1)
        one = torch.arange(patches.shape[1], device=u.device) == (u[:, :1] * patches.shape[1]).long()
        patches = patches | (one & ~patches.any(dim=1, keepdim=True))  # a grid that no block fits loses one patch
        # No tables, even where by chance all these rows agree: the next ones may not.
        return Mask(patches, None, None)


_MOST_BLOCKS = 24


class MaskSampler:
    """The masks of a run, as a function of (seed, step, row of the batch).

    Args:
        generator: Kind of mask.
        grid: Rows and columns of patches.
        seed: Seed of the run.
        batch_size: Images in a batch, over all ranks.
    """

    def __init__(self, generator: MaskGenerator, grid: Grid, seed: int, batch_size: int) -> None:
        self._generator, self._grid, self._seed, self._batch_size = generator, grid, seed, batch_size
        self._count_hidden = lru_cache(maxsize=4)(self._count_hidden_patches)

    def __call__(self, step: int, rows: npt.ArrayLike) -> Mask:
        """Sample the masks of some rows of a step's batch."""
        u = rng.uniform(self._seed, "mask", step, rows, self._generator.num_uniforms(self._grid))
        return self._generator.sample(torch.from_numpy(u.astype(np.float32)), self._grid)

    def at(self, positions: npt.NDArray[np.int64]) -> tuple[Mask, float]:
        """Sample the masks at positions of a run, all in one batch.

        Returns:
            The masks, and their share of the hidden patches of the batch: the weight of these rows in its loss, which
            is a mean over hidden patches.
        """
        step, rows = int(positions[0]) // self._batch_size, positions % self._batch_size
        mask = self(step, rows)
        if self._generator.has_fixed_count(self._grid):
            return mask, len(rows) / self._batch_size
        return mask, int(mask.hidden.sum()) / self._count_hidden(step)

    def _count_hidden_patches(self, step: int) -> int:
        return int(self(step, range(self._batch_size)).hidden.sum())


def _check(ratio: float) -> None:
    if not 0 < ratio < 1:
        raise ValueError(f"a mask ratio lies between 0 and 1, not {ratio}")


def _rank(values: Tensor) -> Tensor:
    """Return the rank of each value in its row. Equal values keep their order, on every device alike."""
    return _inverse(torch.argsort(values, dim=1, stable=True))


def _inverse(permutation: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
    """Return the inverse of the permutation in each row."""
    numbers = torch.arange(permutation.shape[1], device=permutation.device).expand_as(permutation)
    return torch.empty_like(permutation).scatter_(1, permutation, numbers)


def _keep_first(rank: Tensor, ratio: float) -> Mask:
    """Keep the patches of the lowest ranks visible, int(n * (1 - ratio)) of them."""
    patches = rank.shape[1]
    visible = int(patches * (1 - ratio))
    if not 0 < visible < patches:
        raise ValueError(f"a ratio of {ratio} over {patches} patches leaves {visible} visible")
    return Mask.from_hidden(rank >= visible, visible)


def _rectangle(top: Tensor, left: Tensor, h: Tensor, w: Tensor, grid: Grid) -> Bool[Tensor, "b rows columns"]:
    """One filled rectangle for each row, from its corner and size (b)."""
    y, x = torch.arange(grid[0], device=top.device), torch.arange(grid[1], device=top.device)
    down = (y >= top[:, None]) & (y < (top + h)[:, None])
    across = (x >= left[:, None]) & (x < (left + w)[:, None])
    return down[:, :, None] & across[:, None, :]
