"""Batches of cropped images, made by threads ahead of the loop.

Which images, crops and flips a batch holds is decided by the stream, from nothing but seed and position: not by
threads, ranks, or where a run was interrupted.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Shaped
from torch import Tensor

from pixmim.data.bad_images import Skipped
from pixmim.data.batches import Batch, Batches, Portion
from pixmim.data.dataset import BadImage, Source, follow
from pixmim.data.sampler import Plan, Stream
from pixmim.transforms.crops import Array, Crop, stacked
from pixmim.utils.threads import how_many, workers

_CPU = torch.device("cpu")
_AHEAD = 2  # batches that are ready or in the making while the loop uses one: this bounds the memory


class Loader(Batches):
    """Batches out of images that are read and decoded as they are needed.

    source    the data set
    crop      what the network sees; given the numbers that belong to (seed, epoch, index)
    portion   which samples are this process's
    flip      probability of a horizontal flip
    skipped   keeps account of images that cannot be read; each is replaced by the next one of its epoch's order
    threads   of them, which read and decode
    device    where batches go. To a CUDA device, from page-locked memory: the copy need not be waited for. On a CPU,
              the memory of a batch is filled again once the next one is asked for
    """

    def __init__(
        self,
        source: Source,
        crop: Crop,
        portion: Portion,
        *,
        skipped: Skipped,
        flip: float = 0.5,
        seed: int = 0,
        threads: int = 0,
        device: torch.device = _CPU,
    ) -> None:
        self._source, self._crop, self._portion, self._skipped = source, crop, portion, skipped
        self._pin, self._reuse = device.type == "cuda", device.type == "cpu"
        self._stream = Stream(seed, len(source), source.pieces, crop.draws, flip)
        self._threads = how_many(threads)
        self._pool = workers(threads, "pixmim-load")
        self._pending: deque[tuple[Batch, Batch, list[Future[None]]]] = deque()
        self._free: list[Batch] = []
        self._used: Batch | None = None
        self._submitted, self._waited, self._closed = 0, 0.0, False

    @property
    def waited(self) -> float:
        return self._waited

    @property
    def ready(self) -> bool:
        return bool(self._pending) and all(part.done() for part in self._pending[0][2])

    def __next__(self) -> Batch:
        if self._used is not None and self._reuse:
            self._free.append(self._used)
        while len(self._pending) <= _AHEAD:
            self._pending.append(self._submit())
        self._used, batch, parts = self._pending.popleft()
        began = perf_counter()
        wait(parts, return_when=FIRST_EXCEPTION)  # so the loop wakes once, and not for each part
        for part in parts:
            part.result()
        self._waited += perf_counter() - began
        return batch

    def close(self) -> None:
        """Stop the threads, each after the image in its hands; one that is stuck is left behind."""
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self) -> tuple[Batch, Batch, list[Future[None]]]:
        """Hand the next batch to the threads, in parts small enough that all of them stay busy; and its memory."""
        whole = self._free.pop() if self._free else self._empty()
        plan = self._stream.plan(self._portion.positions(self._submitted))
        count = len(plan.indices)
        batch = Batch(whole.images[:count], whole.flip[:count], whole.indices[:count])
        self._source.soon(self._stream.soon(plan))
        batch.flip.copy_(torch.from_numpy(plan.flip))
        batch.indices.copy_(torch.from_numpy(plan.indices))
        indices, u = plan.indices.tolist(), plan.u.tolist()
        windows = batch.images.permute(0, 2, 3, 1).numpy()

        def fill(rows: range) -> None:
            for row in rows:
                if self._closed:
                    return
                image, numbers = self._read(indices[row]), u[row]
                if image is None:
                    image, numbers = self._instead(batch, plan, row)
                self._crop.put(image, numbers, windows[row])

        self._submitted += 1
        part = -(-count // (4 * self._threads))
        return whole, batch, [self._pool.submit(fill, range(k, min(k + part, count))) for k in range(0, count, part)]

    def _empty(self) -> Batch:
        """A batch to fill. Memory is used again, because fresh pages cost as much as the copies into them."""
        count, form = self._portion.count, self._source.form
        shape = (count, *self._crop.shape, form.channels)
        images = torch.empty(shape, dtype=form.dtype, pin_memory=self._pin)
        flip = torch.empty(count, dtype=torch.bool, pin_memory=self._pin)
        return Batch(images.permute(0, 3, 1, 2), flip, torch.empty(count, dtype=torch.int64))

    def _read(self, index: int) -> Array | None:
        """An image, or None, with a line in the account, if it cannot be read."""
        if index in self._skipped:
            return None
        try:
            image = self._source.array(index)
        except BadImage as error:
            self._skipped.add(index, self._source.locate(index), str(error))
            return None
        self._skipped.passed(index)
        return image

    def _instead(self, batch: Batch, plan: Plan, row: int) -> tuple[Array, list[float]]:
        """The first image after a row's own in the order that can be read, with its own flip and numbers."""
        for step in range(1, len(self._source)):
            other = self._stream.instead(plan, row, step)
            image = self._read(int(other.indices[0]))
            if image is not None:
                batch.flip[row], batch.indices[row] = bool(other.flip[0]), int(other.indices[0])
                return image, other.u[0].tolist()
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
            image = source.image(index)
        except BadImage as error:
            skipped.add(index, source.locate(index), str(error))
            return None
        skipped.passed(index)
        return crop.crop(image)

    def collect(part: range, images: Iterator[Tensor | None]) -> tuple[Tensor, npt.NDArray[np.int64], int]:
        found = [(index, image) for index, image in zip(part, images, strict=True) if image is not None]
        stack = stacked([image for _, image in found]) if found else torch.empty(0, 1, 1, 1)
        return stack, np.asarray([index for index, _ in found], np.int64), part.stop

    with workers(threads, "pixmim-read") as pool:
        come_to = follow(source)
        parts = (range(start, min(start + batch, len(source))) for start in range(first, len(source), batch))
        ahead: deque[tuple[range, Iterator[Tensor | None]]] = deque()
        for part in parts:
            come_to(part.start)
            ahead.append((part, pool.map(read, part)))
            if len(ahead) > _AHEAD:
                yield collect(*ahead.popleft())
        while ahead:
            yield collect(*ahead.popleft())
