"""Order, crop and flip of each sample of a run, as a pure function of (seed, position).

Position p of a run is position p % n of epoch p // n, for n images. Batches are consecutive positions, so each image
occurs exactly once per epoch and every batch is full; a batch may span two epochs.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from pixmim.utils import rng

WINDOW = 16
"""Shards that are shuffled together. With 2,000 images per shard, these are 32,000 images."""

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BatchShard:
    """Positions of a run that one rank computes, batch by batch.

    Args:
        batch_size: Images per batch, over all ranks.
        start: Position of the first sample; in a resumed run, that of the interruption.
        rank: Rank of this process.
        world_size: Number of processes. Each gets an equal share of every batch.
        parts: Accumulation steps: parts of a share, whose sizes differ by at most one image.

    Raises:
        ValueError: If the batch does not divide evenly among the ranks, or a share has fewer images than parts.
    """

    batch_size: int
    start: int = 0
    rank: int = 0
    world_size: int = 1
    parts: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.world_size or self.batch_size < self.world_size * self.parts:
            raise ValueError(f"cannot divide a batch of {self.batch_size} into {self.world_size} x {self.parts} parts")

    @property
    def local_batch_size(self) -> int:
        """Largest number of images in a part."""
        return -(-self.batch_size // self.world_size // self.parts)

    def positions(self, number: int) -> Indices:
        """Return the positions of this rank in part `number`, counted from `start` over all batches."""
        batch, part = divmod(number, self.parts)
        share = self.batch_size // self.world_size
        first = self.start + batch * self.batch_size + self.rank * share
        return np.arange(first + part * share // self.parts, first + (part + 1) * share // self.parts)


@dataclass(frozen=True)
class SampleBatch:
    """Epoch, position in it, dataset index, flip, and random numbers in [0, 1) of the crop, for several samples."""

    epochs: Indices
    epoch_positions: Indices
    indices: Indices
    flip: npt.NDArray[np.bool_]
    u: npt.NDArray[np.float64]

    @cached_property
    def rows(self) -> list[tuple[int, bool, list[float]]]:
        """Index, flip and crop numbers of each sample, as Python numbers, because scalars of NumPy are slow."""
        return list(zip(self.indices.tolist(), self.flip.tolist(), self.u.tolist(), strict=True))


class CropSampler:
    """Map positions of a run to samples; `count` and `shard_sizes` as in `ShuffledOrder`.

    A crop takes `num_uniforms` random numbers, and an image is flipped with probability `flip`.
    """

    def __init__(self, seed: int, count: int, shard_sizes: Indices | None, num_uniforms: int, flip: float) -> None:
        self._seed, self._count, self._num_uniforms, self._flip = seed, count, num_uniforms, flip
        self._order = ShuffledOrder(seed, count, shard_sizes)

    def samples(self, positions: npt.ArrayLike) -> SampleBatch:
        """Return the samples at `positions`."""
        epochs, epoch_positions = np.divmod(np.asarray(positions, np.int64), self._count)
        return self._at(epochs, epoch_positions, epoch_positions)

    def replacement(self, samples: SampleBatch, row: int, offset: int) -> SampleBatch:
        """Return the sample `offset` positions after a row in its epoch, which replaces it if it is unreadable."""
        epochs, positions = samples.epochs[row : row + 1], samples.epoch_positions[row : row + 1]
        return self._at(epochs, positions, (positions + offset) % self._count)

    def upcoming_shards(self, samples: SampleBatch) -> list[int]:
        """Return the shards to prefetch, in order, when these samples are read. Empty without shards."""
        return self._order.upcoming_shards(int(samples.epochs[-1]), int(samples.epoch_positions[-1]))

    def _at(self, epochs: Indices, epoch_positions: Indices, read_positions: Indices) -> SampleBatch:
        indices = np.empty_like(read_positions)
        for epoch in np.unique(epochs).tolist():
            indices[epochs == epoch] = self._order.at(epoch, read_positions[epochs == epoch])
        numbers = rng.uniform(self._seed, "crop", epochs, indices, self._num_uniforms + 1)
        return SampleBatch(epochs, epoch_positions, indices, numbers[:, 0] < self._flip, numbers[:, 1:])


class ShuffledOrder:
    """Random order of each epoch, computed position by position, in constant memory.

    Without shards, an epoch is a permutation of all images. With shards, as on object storage, the shards are permuted,
    and then the images within each window of `WINDOW` shards, so that few shards are needed at a time.

    Args:
        seed: Seed of the run.
        count: Images in the dataset.
        shard_sizes: Images in each shard, `count` together; or None.
    """

    def __init__(self, seed: int, count: int, shard_sizes: Indices | None = None) -> None:
        self._seed, self._count, self._sizes = seed, count, shard_sizes
        if shard_sizes is not None:
            self._first_of = np.cumsum(shard_sizes) - shard_sizes
        self._shuffle = lru_cache(maxsize=2)(self._shuffle_shards)

    def at(self, epoch: int, positions: npt.ArrayLike) -> Indices:
        """Return the dataset indices at positions (0 to count - 1) of an epoch."""
        positions = np.asarray(positions, np.int64)
        if self._sizes is None:
            return rng.shuffled(self._seed, "order", epoch, self._count, positions)
        shards, ends = self._shuffle(epoch)
        window, first, last = self._window(ends, positions)
        inside = rng.shuffled(self._seed, "order", epoch, last - first, positions - first, window)
        k = np.searchsorted(ends, first + inside, side="right")
        return self._first_of[shards[k]] + first + inside - (ends[k] - self._sizes[shards[k]])

    def upcoming_shards(self, epoch: int, position: int) -> list[int]:
        """Return the shards of the window at a position and of the next window, in order. Empty without shards."""
        if self._sizes is None:
            return []
        shards, ends = self._shuffle(epoch)
        window = int(self._window(ends, np.asarray([position]))[0][0])
        upcoming = shards[window * WINDOW : (window + 2) * WINDOW].tolist()
        if (window + 1) * WINDOW >= len(shards):  # the next window is in the next epoch
            upcoming += self._shuffle(epoch + 1)[0][:WINDOW].tolist()
        return list(dict.fromkeys(upcoming))

    def _shuffle_shards(self, epoch: int) -> tuple[Indices, Indices]:
        """Return the shards in the order of an epoch, and the position after the last image of each."""
        assert self._sizes is not None
        shards = rng.shuffled(self._seed, "shard_sizes", epoch, len(self._sizes), np.arange(len(self._sizes)))
        return shards, np.cumsum(self._sizes[shards])

    def _window(self, ends: Indices, positions: Indices) -> tuple[Indices, Indices, Indices]:
        """Return the window of each position, and the start and end of that window."""
        borders = np.concatenate([ends[WINDOW - 1 : -1 : WINDOW], ends[-1:]])
        window = np.searchsorted(borders, positions, side="right")
        return window, np.concatenate([[0], borders])[window], borders[window]
