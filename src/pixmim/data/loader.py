"""Batches that threads prepare ahead of the training loop.

Which images, crops, flips and masks a batch holds is a function of seed and position, whatever the number of threads
or ranks, and wherever a run was interrupted.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Any, Generic, Required, TypedDict, TypeVar, Unpack

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from pixmim.data.bad_images import BadImageLog
from pixmim.data.dataset import BadImage, ImageDataset, prefetch_in_order
from pixmim.data.sampler import BatchShard, CropSampler, Indices, SampleBatch
from pixmim.masking import Mask
from pixmim.transforms.crops import Array, Crop, stack_images
from pixmim.utils.threads import ThreadPool, num_threads

T = TypeVar("T")  # an image, as a loader reads it
B = TypeVar("B", covariant=True)

SampleMasks = Callable[[Indices], tuple[Mask | None, float]]
"""Sample the masks at positions of a run, and the weight of these rows in the loss: see `MaskSampler.at`."""

Finish = Callable[[Mask | None, float], B]
"""Complete a batch, given its masks and weight."""

_CPU = torch.device("cpu")
_AHEAD = 2  # batches that are ready or in progress while the loop uses one; this bounds the memory


@dataclass(frozen=True)
class Batch:
    """Cropped images, with the flips still to be applied on the device.

    On a CPU the loader reuses this memory once the next batch is requested: copy what must last.

    Args:
        images: Pixels in the dtype of the dataset.
        flip: Images to mirror.
        indices: Dataset index of each image, on the host.
        mask: Masks for pre-training; in page-locked memory for a CUDA device.
        weight: Weight of these images in the loss of their step. The weights of all parts and ranks sum to one.
    """

    images: Shaped[Tensor, "b c h w"]
    flip: Bool[Tensor, " b"]
    indices: Int[Tensor, " b"]
    mask: Mask | None = None
    weight: float = 1.0


class BatchLoader(ABC, Generic[T, B]):
    """Endless iterator over batches that threads prepare ahead of the loop. Use it in a `with` statement.

    A subclass defines how an image is read and how a batch is made of them.

    Args:
        dataset: The images.
        crop_uniforms: Uniform numbers that the crop of an image takes.
        shard: Positions of this rank.
        skipped: Log of unreadable images. The next readable image of the epoch replaces each.
        flip: Probability of a horizontal flip.
        seed: Seed of order, crops and flips.
        masks: Samples the masks of a batch, in a thread.
        threads: Number of threads; 0 means one for each core, at most 16.
        device: Where batches go. For CUDA they are in page-locked memory, so copies need not be waited for.
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
        """Seconds that the loop has waited for batches so far."""

    @abstractmethod
    def _read(self, index: int, flip: bool, u: list[float]) -> T:
        """Read one image, to be flipped and cropped by the numbers `u`. Raises BadImage."""

    @abstractmethod
    def _start(self, samples: SampleBatch, number: int) -> tuple[Callable[[int], None], Finish[B]]:
        """Start batch `number`: return a function that threads call for each row, and one that returns the batch."""

    @property
    def ready(self) -> bool:
        """Return True if the next batch is complete."""
        return bool(self._pending) and all(job.done() for job in self._pending[0][0])

    def __iter__(self) -> Iterator[B]:
        return self

    def __next__(self) -> B:
        while len(self._pending) <= _AHEAD:
            self._pending.append(self._submit())
        jobs, complete = self._pending.popleft()
        began = perf_counter()
        wait(jobs, return_when=FIRST_EXCEPTION)  # wakes the loop once, not for each job
        for job in jobs:
            job.result()
        batch = complete()
        self.wait_seconds += perf_counter() - began
        return batch

    def __enter__(self) -> "BatchLoader[T, B]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads, each after its current image. A stuck thread is abandoned. Can be called twice."""
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self) -> tuple[list[Future[Any]], Callable[[], B]]:
        """Start the next batch, in jobs small enough to keep all threads busy."""
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

        count = len(positions)
        size = -(-count // (4 * self._threads))
        masks = self._pool.submit(sample_masks)
        parts = [range(first, min(first + size, count)) for first in range(0, count, size)]
        jobs = [self._pool.submit(prepare_rows, part) for part in parts]
        return [masks, *jobs], lambda: finish(*masks.result())

    def _read_row(self, samples: SampleBatch, row: int) -> tuple[T, int, bool, list[float]]:
        """Return the image of a row, its index, flip and crop numbers; those of a replacement if it is unreadable."""
        for offset in range(len(self._dataset)):
            index, flip, u = self._sampler.replacement(samples, row, offset).rows[0] if offset else samples.rows[row]
            if index in self._skipped:
                continue
            try:
                image = self._read(index, flip, u)
            except BadImage as error:
                self._skipped.record(index, self._dataset.path_of(index), str(error))
                continue
            self._skipped.mark_ok(index)
            return image, index, flip, u
        raise self._skipped.error()


class LoaderOptions(TypedDict, total=False):
    """Keyword arguments of every `BatchLoader`."""

    skipped: Required[BadImageLog]
    flip: float
    seed: int
    masks: SampleMasks
    threads: int
    device: torch.device


class Loader(BatchLoader[Array, Batch]):
    """Batches of images that are read and decoded when they are needed.

    Args:
        crop: What the network sees of an image.
        options: See `BatchLoader`.
    """

    def __init__(self, dataset: ImageDataset, crop: Crop, shard: BatchShard, **options: Unpack[LoaderOptions]) -> None:
        super().__init__(dataset, crop.num_uniforms, shard, **options)
        self._crop, self._reuse = crop, self._device.type == "cpu"
        self._memory: list[tuple[Tensor, Tensor, Tensor]] = []

    def _read(self, index: int, flip: bool, u: list[float]) -> Array:
        return self._dataset.read_array(index)

    def _start(self, samples: SampleBatch, number: int) -> tuple[Callable[[int], None], Finish[Batch]]:
        count = len(samples.indices)
        images, flip, indices = (values[:count] for values in self._allocate(number))
        windows, flips, numbers = images.numpy(), flip.numpy(), indices.numpy()

        def prepare(row: int) -> None:
            image, numbers[row], flips[row], u = self._read_row(samples, row)
            self._crop.crop_into(image, u, windows[row])

        return prepare, lambda mask, weight: Batch(images.permute(0, 3, 1, 2), flip, indices, mask, weight)

    def _allocate(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return memory for a batch. It is reused on a CPU, where fresh pages cost as much as the copies into them."""
        if number > _AHEAD and self._reuse:
            return self._memory[number % (_AHEAD + 1)]  # of the batch that the loop has just finished with
        count, form = self._shard.local_batch_size, self._dataset.image_spec
        images = torch.empty(count, *self._crop.shape, form.channels, dtype=form.torch_dtype, pin_memory=self._pin)
        flip = torch.empty(count, dtype=torch.bool, pin_memory=self._pin)
        memory = images, flip, torch.empty(count, dtype=torch.int64)
        if self._reuse:
            self._memory.append(memory)
        return memory


def iterate_in_order(
    dataset: ImageDataset, crop: Crop, *, skipped: BadImageLog, batch: int, threads: int = 0, first: int = 0
) -> Iterator[tuple[Shaped[Tensor, "b c h w"], npt.NDArray[np.int64], int]]:
    """Yield every image of a dataset once, in order, through a crop without randomness.

    Args:
        dataset: The images.
        crop: What is seen of each.
        skipped: Log of unreadable images, which are left out.
        batch: Images to read for a batch. Fewer are yielded, or none, where some are unreadable.
        threads: Number of threads; 0 means one for each core, at most 16.
        first: Index to start at.

    Yields:
        Images, their indices, and the index after the last one that was read.
    """

    def read(index: int) -> Tensor | None:
        try:
            image = dataset.image(index)
        except BadImage as error:
            skipped.record(index, dataset.path_of(index), str(error))
            return None
        skipped.mark_ok(index)
        return crop.crop(image)

    def collect(part: range, images: Iterator[Tensor | None]) -> tuple[Tensor, npt.NDArray[np.int64], int]:
        readable = [(index, image) for index, image in zip(part, images, strict=True) if image is not None]
        stack = stack_images([image for _, image in readable]) if readable else torch.empty(0, 1, 1, 1)
        return stack, np.asarray([index for index, _ in readable], np.int64), part.stop

    with ThreadPool(threads, "pixmim-read") as pool:
        advance = prefetch_in_order(dataset)
        ahead: deque[tuple[range, Iterator[Tensor | None]]] = deque()
        for start in range(first, len(dataset), batch):
            advance(start)
            part = range(start, min(start + batch, len(dataset)))
            ahead.append((part, pool.map(read, part)))
            if len(ahead) > _AHEAD:
                yield collect(*ahead.popleft())
        while ahead:
            yield collect(*ahead.popleft())
