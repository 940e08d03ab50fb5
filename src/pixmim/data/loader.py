"""Batches of cropped uint8 images, made by threads ahead of the loop; a pure function of (seed, position).

Positions count the samples of the whole run: position p belongs to epoch p // n and is place p % n of that epoch's
order. Batches are cut from this one stream, so every sample comes exactly once an epoch and there is no short batch
(a batch may span two epochs). Which images, crops and flips a batch holds depends on nothing but seed and position:
not on threads, and not on where a run was interrupted.
"""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from pixmim import rng
from pixmim.data.order import Order
from pixmim.data.skipped import Skipped
from pixmim.data.source import BadImage, Source
from pixmim.transforms import Crop

_AHEAD = 2  # batches that are ready or in the making while the loop uses one: this bounds the memory


@dataclass(frozen=True)
class Batch:
    """Cropped images as they lie in memory, and which of them the device must still flip.

    In memory that is not page-locked, a batch is overwritten once the next one is asked for: copy what shall last.
    """

    images: Shaped[Tensor, "b c h w"]
    flip: Bool[Tensor, " b"]


@dataclass(frozen=True)
class _Plan:
    """What a batch will hold: for each row its epoch, place and image, and the numbers of its flip and crop."""

    epochs: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    indices: list[int]
    numbers: list[list[float]]


class Loader:
    """An endless iterator of Batches, to be used in a `with` statement, whose end stops the threads.

    source    the data set
    crop      what the network sees; given the numbers that belong to (seed, epoch, index)
    flip      probability of a horizontal flip
    batch     images in a batch, of all ranks together
    start     position of the first sample; a resumed run starts where it was interrupted
    skipped   keeps account of images that cannot be read; each is replaced by the next one of its epoch's order
    share     (rank, ranks): which equal part of each batch is this process's
    threads   0: one for each core, at most 16
    pin       put batches into page-locked memory, for a copy to a GPU that does not wait

    Raises ValueError for a batch that does not divide among the ranks.
    """

    def __init__(
        self,
        source: Source,
        crop: Crop,
        *,
        batch: int,
        skipped: Skipped,
        flip: float = 0.5,
        seed: int = 0,
        start: int = 0,
        share: tuple[int, int] = (0, 1),
        threads: int = 0,
        pin: bool = False,
    ) -> None:
        rank, ranks = share
        if batch % ranks:
            raise ValueError(f"a batch of {batch} does not divide among {ranks} ranks")
        self._source, self._crop, self._skipped = source, crop, skipped
        self._flip, self._seed, self._pin = flip, seed, pin
        self._batch, self._mine = batch, range(batch // ranks * rank, batch // ranks * (rank + 1))
        self._next = start
        self._order = Order(seed, len(source))
        self._threads = threads or min(16, os.cpu_count() or 1)
        # Each decoding thread must not open a team of its own for every small resize.
        self._pool = ThreadPoolExecutor(self._threads, "pixmim-load", initializer=torch.set_num_threads, initargs=(1,))
        self._pending: deque[tuple[Batch, list[Future[None]]]] = deque()
        self._free: list[Batch] = []
        self._used: Batch | None = None
        self._closed = False
        self.waited = 0.0
        """Seconds the loop has waited for batches so far."""

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._used is not None and not self._pin:  # page-locked memory may still be on its way to the device
            self._free.append(self._used)
        while len(self._pending) <= _AHEAD:
            self._pending.append(self._submit())
        self._used, parts = self._pending.popleft()
        began = perf_counter()
        for part in parts:
            part.result()
        self.waited += perf_counter() - began
        return self._used

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop the threads and wait for them; each ends after the image in its hands. Can be called twice."""
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self) -> tuple[Batch, list[Future[None]]]:
        """Hand the next batch to the threads, in parts small enough that all of them stay busy."""
        batch = self._free.pop() if self._free else self._empty()
        plan = self._plan(np.arange(self._next + self._mine.start, self._next + self._mine.stop))
        batch.flip.copy_(torch.tensor([u[0] < self._flip for u in plan.numbers]))
        self._next += self._batch
        rows = np.array_split(np.arange(len(self._mine)), min(len(self._mine), 4 * self._threads))
        return batch, [self._pool.submit(self._fill, batch, plan, part.tolist()) for part in rows]

    def _empty(self) -> Batch:
        """A batch to fill. Memory is used again, because fresh pages cost as much as the copies into them."""
        count, form = len(self._mine), self._source.form
        shape = (count, *self._crop.shape, form.channels)
        images = torch.empty(shape, dtype=getattr(torch, form.pixels), pin_memory=self._pin)
        return Batch(images.permute(0, 3, 1, 2), torch.empty(count, dtype=torch.bool, pin_memory=self._pin))

    def _plan(self, positions: npt.NDArray[np.int64]) -> _Plan:
        epochs, places = np.divmod(positions, len(self._source))
        indices = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            indices[epochs == epoch] = self._order.at(epoch, places[epochs == epoch])
        return _Plan(epochs, places, indices.tolist(), self._numbers(epochs, indices))

    def _fill(self, batch: Batch, plan: _Plan, rows: list[int]) -> None:
        """Make some rows of a batch."""
        for row in rows:
            if self._closed:
                return
            index, u = plan.indices[row], plan.numbers[row]
            image = self._read(index)
            if image is None:  # a picture that stands in for another has its own numbers
                index, image = self._instead(int(plan.epochs[row]), int(plan.places[row]))
                u = self._numbers(plan.epochs[row : row + 1], [index])[0]
                batch.flip[row] = u[0] < self._flip
            self._crop.put(image, u[1:], batch.images[row])

    def _numbers(self, epochs: npt.NDArray[np.int64], indices: npt.ArrayLike) -> list[list[float]]:
        """What decides the flip and the crop of each sample: a function of (seed, epoch, index)."""
        found: list[list[float]] = rng.uniform(self._seed, "crop", epochs, indices, self._crop.draws + 1).tolist()
        return found

    def _read(self, index: int) -> Tensor | None:
        """An image, or None, with a line in the account, if it cannot be read."""
        if index in self._skipped:
            return None
        try:
            image = self._source.image(index)
        except BadImage as error:
            self._skipped.add(index, self._source.locate(index), str(error))
            return None
        self._skipped.passed(index)
        return image

    def _instead(self, epoch: int, place: int) -> tuple[int, Tensor]:
        """The first image after a place of the epoch's order that can be read."""
        count = len(self._source)
        for step in range(1, count):
            index = int(self._order.at(epoch, [(place + step) % count])[0])
            image = self._read(index)
            if image is not None:
                return index, image
        raise self._skipped.too_many()


def in_order(
    source: Source, crop: Crop, *, skipped: Skipped, batch: int, threads: int = 0, first: int = 0
) -> Iterator[tuple[Shaped[Tensor, "b c h w"], npt.NDArray[np.int64], int]]:
    """Every image of a data set once, in order from `first` on, through a crop without randomness.

    Gives batches, their indices, and how far into the data set they reach. An image that cannot be read is left out,
    so a batch may be short, or empty.
    """

    def read(index: int) -> Tensor | None:
        try:
            return crop.crop(source.image(index))
        except BadImage as error:
            skipped.add(index, source.locate(index), str(error))
            return None

    def collect(part: range, images: Iterator[Tensor | None]) -> tuple[Tensor, npt.NDArray[np.int64], int]:
        found = [(index, image) for index, image in zip(part, images, strict=True) if image is not None]
        stack = torch.stack([image for _, image in found]) if found else torch.empty(0, 1, 1, 1)
        return stack, np.asarray([index for index, _ in found], np.int64), part.stop

    count = threads or min(16, os.cpu_count() or 1)
    with ThreadPoolExecutor(count, "pixmim-read", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        parts = (range(start, min(start + batch, len(source))) for start in range(first, len(source), batch))
        ahead: deque[tuple[range, Iterator[Tensor | None]]] = deque()
        for part in parts:
            ahead.append((part, pool.map(read, part)))
            if len(ahead) > _AHEAD:
                yield collect(*ahead.popleft())
        while ahead:
            yield collect(*ahead.popleft())
