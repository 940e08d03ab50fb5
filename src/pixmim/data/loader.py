"""Batches of cropped images, made by threads ahead of the loop; a pure function of (seed, position).

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
from functools import lru_cache
from time import perf_counter
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from pixmim import rng
from pixmim.data.skipped import Skipped
from pixmim.data.source import BadImage, Source
from pixmim.transforms import Crop, stacked

_AHEAD = 2  # batches that are ready or in the making while the loop uses one: this bounds the memory


@dataclass(frozen=True)
class Batch:
    """Cropped images as they lie in memory, and which of them the device must still flip."""

    images: Shaped[Tensor, "b c h w"]
    flip: Bool[Tensor, " b"]


class Loader:
    """An endless iterator of Batches, to be used in a `with` statement, whose end stops the threads.

    source    the data set
    crop      what the network sees; given the numbers that belong to (seed, epoch, index)
    size      (h, w) of the crop in pixels
    flip      probability of a horizontal flip
    batch     images in a batch
    start     position of the first sample; a resumed run starts where it was interrupted
    skipped   keeps account of images that cannot be read; each is replaced by the next one of its epoch's order
    threads   0: one for each core, at most 16
    pin       put batches into page-locked memory, for a copy to a GPU that does not wait
    """

    def __init__(
        self,
        source: Source,
        crop: Crop,
        size: tuple[int, int],
        *,
        batch: int,
        skipped: Skipped,
        flip: float = 0.5,
        seed: int = 0,
        start: int = 0,
        threads: int = 0,
        pin: bool = False,
    ) -> None:
        self._source, self._crop, self._skipped = source, crop, skipped
        self._shape = (batch, *size, source.form.channels)
        self._flip, self._seed, self._pin = flip, seed, pin
        self._next = start
        self._threads = threads or min(16, os.cpu_count() or 1)
        # Each decoding thread must not open a team of its own for every small resize.
        self._pool = ThreadPoolExecutor(self._threads, "pixmim-load", initializer=torch.set_num_threads, initargs=(1,))
        self._pending: deque[tuple[Batch, list[Future[None]]]] = deque()
        self._closed = False
        self._order = lru_cache(maxsize=3)(lambda epoch: rng.permutation(seed, epoch, len(source)))
        self.waited = 0.0
        """Seconds the loop has waited for batches so far."""

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while len(self._pending) <= _AHEAD:
            self._pending.append(self._submit())
        batch, parts = self._pending.popleft()
        began = perf_counter()
        for part in parts:
            part.result()
        self.waited += perf_counter() - began
        return batch

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
        count = self._shape[0]
        images = torch.empty(self._shape, dtype=self._source.form.dtype, pin_memory=self._pin)
        flip = torch.empty(count, dtype=torch.bool, pin_memory=self._pin)
        positions = np.arange(self._next, self._next + count)
        self._next += count
        rows = np.array_split(np.arange(count), min(count, 4 * self._threads))
        parts = [self._pool.submit(self._fill, images, flip, positions, part) for part in rows]
        return Batch(images.permute(0, 3, 1, 2), flip), parts

    def _fill(
        self, images: Tensor, flip: Tensor, positions: npt.NDArray[np.int64], rows: npt.NDArray[np.int64]
    ) -> None:
        """Make some rows of a batch (b h w c)."""
        epochs, places = np.divmod(positions[rows], len(self._source))
        wanted = [int(self._order(e)[p]) for e, p in zip(epochs.tolist(), places.tolist(), strict=True)]
        numbers = self._numbers(epochs, wanted)  # of all rows at once; a picture that stands in for another has its own
        for i, row in enumerate(rows.tolist()):
            if self._closed:
                return
            index, image = self._read(int(epochs[i]), int(places[i]))
            u = numbers[i] if index == wanted[i] else self._numbers(epochs[i : i + 1], [index])[0]
            images[row] = self._crop.crop(image, u[1:]).permute(1, 2, 0)
            flip[row] = u[0] < self._flip

    def _numbers(self, epochs: npt.NDArray[np.int64], indices: list[int]) -> list[list[float]]:
        """What decides the flip and the crop of each sample: a function of (seed, epoch, index)."""
        found: list[list[float]] = rng.uniform(self._seed, "crop", epochs, indices, self._crop.draws + 1).tolist()
        return found

    def _read(self, epoch: int, place: int) -> tuple[int, Tensor]:
        """The sample at a place of the epoch's order, or the next one after it that can be read."""
        order = self._order(epoch)
        for step in range(len(order)):
            index = int(order[(place + step) % len(order)])
            if index in self._skipped:
                continue
            try:
                image = self._source.image(index)
            except BadImage as error:
                self._skipped.add(index, self._source.locate(index), str(error))
            else:
                self._skipped.passed(index)
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
            return crop.crop(source.image(index), ())
        except BadImage as error:
            skipped.add(index, source.locate(index), str(error))
            return None

    def collect(part: range, images: Iterator[Tensor | None]) -> tuple[Tensor, npt.NDArray[np.int64], int]:
        found = [(index, image) for index, image in zip(part, images, strict=True) if image is not None]
        stack = stacked([image for _, image in found]) if found else torch.empty(0, 1, 1, 1, dtype=source.form.dtype)
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
