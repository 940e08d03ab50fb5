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
from pixmim.utils.ranks import inverse, ranks

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
            ValueError: If `hidden` is not of this type and shape, or a row hides all patches or no patch.
        """
        if hidden.dtype != torch.bool or hidden.ndim != 2:  # ~ inverts the bits of integers
            raise ValueError(f"hidden must be bool of shape (b, n), not {hidden.dtype} of {tuple(hidden.shape)}")
        if visible is None:
            counts = (~hidden).sum(dim=1)
            if not bool(((counts > 0) & (counts < hidden.shape[1])).all()):
                raise ValueError("each row of a mask must have hidden and visible patches")
            if not bool((counts == counts[0]).all()):
                return Mask(hidden, None, None)
            visible = int(counts[0])
        # Visible and hidden patches each keep their order, so a cumulative count is an index.
        restore = torch.where(hidden, visible + hidden.cumsum(dim=1), (~hidden).cumsum(dim=1)) - 1
        return Mask(hidden, inverse(restore)[:, :visible], restore)

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
        """Draw masks with a torch generator. `grid`: (rows, columns), for `RandomMask` also the number of patches."""
        if isinstance(grid, int) and not isinstance(self, RandomMask):  # neighbors count
            raise ValueError(f"{type(self).__name__} needs a grid of (rows, columns), not {grid} patches")
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
        return keep_first(ranks(u), self.ratio)


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
        order = ranks(u)[:, block_of_patch]
        if not self.whole_blocks:
            within = (column % size * size + row % size).flatten()
            # Below 4 MAX_PATCHES, so exact in float32.
            return keep_first(ranks((order * size**2 + within).float()), self.ratio)
        blocks = self.num_uniforms(grid)
        hidden = math.ceil(blocks * self.ratio)
        if hidden >= blocks:
            raise ValueError(f"a ratio of {self.ratio} hides all {blocks} blocks of {size}x{size} patches")
        return Mask.from_hidden(order < hidden, (blocks - hidden) * size**2 if self.has_fixed_count(grid) else None)


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
        u = rng.uniform32(self._seed, "mask", step, rows, self._generator.num_uniforms(self._grid))
        return self._generator.sample(torch.from_numpy(u), self._grid)

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


def keep_first(rank: Tensor, ratio: float) -> Mask:
    """Keep the int(n * (1 - ratio)) patches of lowest rank visible."""
    patches = rank.shape[1]
    visible = int(patches * (1 - ratio))
    if not 0 < visible < patches:
        raise ValueError(f"a ratio of {ratio} over {patches} patches leaves {visible} visible")
    return Mask.from_hidden(rank >= visible, visible)
