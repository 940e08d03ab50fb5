"""Load batches in threads, ahead of the training loop.

The images, crops, flips and masks of a batch are a function of (seed, position). They do not depend on the number of
threads or ranks, or on interruptions.
"""

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from itertools import islice
from time import perf_counter
from types import TracebackType
from typing import Any, Generic, TypedDict, TypeVar, Unpack

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from pixmim.data.bad_images import BadImageLog
from pixmim.data.dataset import ImageDataset, prefetch_in_order
from pixmim.data.sampler import BatchShard, CropSampler, Indices, SampleBatch
from pixmim.masking import Mask
from pixmim.transforms.crops import Array, Crop
from pixmim.transforms.images import stack_images
from pixmim.utils.threads import ThreadPool, num_threads, ordered_map

T = TypeVar("T")  # an image as a loader reads it
B = TypeVar("B", covariant=True)  # a batch

SampleMasks = Callable[[Indices], tuple[Mask | None, float]]
"""Sample the masks at positions of a run, and the weight of these rows in the loss: see `MaskSampler.at`."""

Finish = Callable[[Mask | None, float], B]
"""Complete a batch, given its masks and weight."""

_CPU = torch.device("cpu")
_AHEAD = 2  # batches that are ready or in progress while the loop uses one


@dataclass(frozen=True)
class Batch:
    """A batch of cropped images, with the flips still to be applied on the device.

    On a CPU the loader reuses the memory for later batches: copy what you keep.

    Args:
        images: Pixels in the dtype of the dataset.
        flip: True for each image to flip horizontally.
        indices: Dataset index of each image, in CPU memory.
        mask: Masks for pre-training; in page-locked memory for a CUDA device.
        weight: Weight of these images in the loss of their step. The weights of all parts and ranks sum to one.
    """

    images: Shaped[Tensor, "b c h w"]
    flip: Bool[Tensor, " b"]
    indices: Int[Tensor, " b"]
    mask: Mask | None = None
    weight: float = 1.0


class BatchLoader(Iterator[B], Generic[T, B]):
    """Endless iterator over batches, prepared by threads. Use it in a `with` statement.

    A subclass defines how an image is read and how a batch is assembled.

    Args:
        dataset: The images.
        crop_uniforms: Number of random numbers that the crop of an image takes.
        shard: Positions of this rank.
        skipped: Log of unreadable images. The next readable image of the epoch replaces each.
        flip: Probability of a horizontal flip.
        seed: Seed of order, crops and flips.
        masks: Function that samples the masks of a batch; called in a thread.
        threads: Number of threads; 0: one per core, at most 16.
        device: Device of the model. For CUDA, batches are in page-locked memory, so copies to it are asynchronous.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        crop_uniforms: int,
        shard: BatchShard,
        *,
        skipped: BadImageLog,
        flip: float = 0.5,
        seed: int = 0,
        masks: SampleMasks = lambda positions: (None, 1.0),
        threads: int = 0,
        device: torch.device = _CPU,
    ) -> None:
        self._dataset, self._shard, self._skipped, self._masks = dataset, shard, skipped, masks
        self._sampler = CropSampler(seed, len(dataset), dataset.shard_sizes, crop_uniforms, flip)
        self._device, self._pin = device, device.type == "cuda"
        self._threads, self._pool = num_threads(threads), ThreadPool(threads, "pixmim-load")
        self._pending: deque[tuple[list[Future[Any]], Callable[[], B]]] = deque()
        self._submitted, self._closed = 0, False
        self.wait_seconds = 0.0
        """Seconds spent waiting for batches so far."""

    @abstractmethod
    def _read(self, index: int, flip: bool, u: list[float]) -> T:
        """Read one image, given its flip and the random numbers of its crop. Raises BadImage."""

    @abstractmethod
    def _start(self, samples: SampleBatch, number: int) -> tuple[Callable[[int], None], Finish[B]]:
        """Start a batch: return a function that prepares one row, in a thread, and one that returns the batch."""

    @property
    def ready(self) -> bool:
        """Return True if the next batch is complete."""
        return bool(self._pending) and all(job.done() for job in self._pending[0][0])

    def __next__(self) -> B:
        while len(self._pending) <= _AHEAD:
            self._pending.append(self._submit())
        jobs, complete = self._pending.popleft()
        start = perf_counter()
        wait(jobs, return_when=FIRST_EXCEPTION)  # wakes this thread once instead of once per job
        for job in jobs:
            job.result()
        batch = complete()
        self.wait_seconds += perf_counter() - start
        return batch

    def __enter__(self) -> "BatchLoader[T, B]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads after their current image. A stuck thread is abandoned. Can be called twice."""
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self) -> tuple[list[Future[Any]], Callable[[], B]]:
        """Start the next batch, as jobs small enough to keep all threads busy."""
        positions = self._shard.positions(self._submitted)
        samples = self._sampler.samples(positions)
        self._dataset.prefetch(self._sampler.upcoming_shards(samples))
        prepare, finish = self._start(samples, self._submitted)
        self._submitted += 1

        def sample_masks() -> tuple[Mask | None, float]:
            mask, weight = self._masks(positions)
            return mask.pin_memory() if mask is not None and self._pin else mask, weight

        def prepare_rows(rows: range) -> None:
            for row in rows:
                if self._closed:
                    return
                prepare(row)

        masks = self._pool.submit(sample_masks)
        count = len(positions)
        size = -(-count // (4 * self._threads))
        jobs = [self._pool.submit(prepare_rows, range(count)[first : first + size]) for first in range(0, count, size)]
        return [masks, *jobs], lambda: finish(*masks.result())

    def _read_row(self, samples: SampleBatch, row: int) -> tuple[T, int, bool, list[float]]:
        """Return image, index, flip and crop numbers of a row; those of the next readable image if it is unreadable."""
        for offset in range(len(self._dataset)):
            index, flip, u = self._sampler.replacement(samples, row, offset).rows[0] if offset else samples.rows[row]
            if index in self._skipped:
                continue
            with self._skipped.attempt(self._dataset, index):
                return self._read(index, flip, u), index, flip, u
        raise self._skipped.error()


class LoaderOptions(TypedDict, total=False):
    """Keyword arguments of `BatchLoader`, for subclasses."""

    skipped: BadImageLog
    flip: float
    seed: int
    masks: SampleMasks
    threads: int
    device: torch.device


class Loader(BatchLoader[Array, Batch]):
    """Read, decode and crop images when they are needed. Options: see `BatchLoader`."""

    def __init__(self, dataset: ImageDataset, crop: Crop, shard: BatchShard, **options: Unpack[LoaderOptions]) -> None:
        super().__init__(dataset, crop.num_uniforms, shard, **options)
        self._crop, self._reuse = crop, self._device.type == "cpu"
        self._buffers: list[tuple[Tensor, Tensor, Tensor]] = []

    def _read(self, index: int, flip: bool, u: list[float]) -> Array:
        return self._dataset.read_array(index)

    def _start(self, samples: SampleBatch, number: int) -> tuple[Callable[[int], None], Finish[Batch]]:
        count = len(samples.indices)
        images, flip, indices = (values[:count] for values in self._allocate(number))
        numpy_images, numpy_flip, numpy_indices = images.numpy(), flip.numpy(), indices.numpy()

        def prepare(row: int) -> None:
            image, numpy_indices[row], numpy_flip[row], u = self._read_row(samples, row)
            self._crop.crop_into(image, u, numpy_images[row])

        return prepare, lambda mask, weight: Batch(images.permute(0, 3, 1, 2), flip, indices, mask, weight)

    def _allocate(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return images, flip and indices to fill; reused on a CPU, where new pages cost as much as the copies."""
        if number > _AHEAD and self._reuse:
            return self._buffers[number % (_AHEAD + 1)]  # of the batch that the loop has finished with
        count, spec = self._shard.local_batch_size, self._dataset.image_spec
        images = torch.empty(count, *self._crop.shape, spec.channels, dtype=spec.torch_dtype, pin_memory=self._pin)
        flip = torch.empty(count, dtype=torch.bool, pin_memory=self._pin)
        buffers = images, flip, torch.empty(count, dtype=torch.int64)
        if self._reuse:
            self._buffers.append(buffers)
        return buffers


def iterate_in_order(
    dataset: ImageDataset, crop: Crop, *, skipped: BadImageLog, batch: int, threads: int = 0, first: int = 0
) -> Iterator[tuple[Shaped[Tensor, "b c h w"], npt.NDArray[np.int64], int]]:
    """Yield each image of a dataset once, in order, for an evaluation.

    Unreadable images are omitted, so a batch may be smaller, and even empty. The crop has no randomness.

    Yields:
        Images, their dataset indices, and the index to read next. The first index is `first`.
    """

    def read(index: int) -> Tensor | None:
        with skipped.attempt(dataset, index):
            return crop.crop(dataset.image(index))
        return None

    with ThreadPool(threads, "pixmim-read") as pool:
        indices = range(first, len(dataset))
        images = zip(prefetch_in_order(dataset, indices), ordered_map(pool, read, indices, _AHEAD * batch), strict=True)
        for start in range(first, len(dataset), batch):
            readable = [(index, image) for index, image in islice(images, batch) if image is not None]
            stack = stack_images([image for _, image in readable]) if readable else torch.empty(0, 1, 1, 1)
            yield stack, np.asarray([index for index, _ in readable], np.int64), min(start + batch, len(dataset))
