"""Small data sets on the device itself: decoded once, and cut there, without a copy from the host ever after."""

from collections.abc import Callable
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from pixmim.data.bad_images import Skipped
from pixmim.data.batches import Batch, Batches, Portion
from pixmim.data.dataset import BadImage, Source, follow
from pixmim.data.sampler import Plan, Stream
from pixmim.transforms.crops import Crop, mirrored, movable
from pixmim.utils.threads import workers

_ROWS = 64  # images that are cut at a time: this bounds the memory that their indices take


class Resident(Batches):
    """Batches out of images that lie decoded on a device; bit for bit those of a Loader.

    The source must know its images' sizes, and the crop only cut them, without resizing: see `Crop.corner`.
    `progress` is told how many images are there; the other parameters are a Loader's.
    """

    def __init__(
        self,
        source: Source,
        crop: Crop,
        portion: Portion,
        device: torch.device,
        *,
        skipped: Skipped,
        flip: float = 0.5,
        seed: int = 0,
        threads: int = 0,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        assert source.sizes is not None
        self._crop, self._portion, self._device, self._skipped = crop, portion, device, skipped
        self._stream = Stream(seed, len(source), source.pieces, crop.draws, flip)
        self._sizes = source.sizes
        self._ends = np.cumsum(self._sizes.prod(axis=1))
        self._dtype = source.form.dtype
        self._pixels = movable(torch.empty(int(self._ends[-1]), source.form.channels, dtype=self._dtype, device=device))
        self._number, self._waited = 0, 0.0

        def read(index: int) -> None:
            try:
                image = source.image(index)
            except BadImage as error:
                skipped.add(index, source.locate(index), str(error))
                return
            end, count = int(self._ends[index]), int(self._sizes[index].prod())
            self._pixels[end - count : end] = movable(image).permute(1, 2, 0).reshape(count, -1).to(device)
            skipped.passed(index)

        with workers(threads, "pixmim-keep") as pool:
            come_to = follow(source)
            come_to(0)
            for done, _ in enumerate(pool.map(read, range(len(source))), 1):
                come_to(done)
                progress(done)

    @property
    def waited(self) -> float:
        return self._waited

    @property
    def ready(self) -> bool:
        return True

    def close(self) -> None:
        pass

    def __next__(self) -> Batch:
        began = perf_counter()
        plan = self._stream.plan(self._portion.positions(self._number))
        self._number += 1
        rows = [self._readable(plan, row) for row in range(len(plan.indices))]
        indices = np.asarray([index for index, _, _ in rows])
        sizes = self._sizes[indices]
        corners = [self._crop.corner((h, w), u) for (h, w), (_, _, u) in zip(sizes.tolist(), rows, strict=True)]
        (heights, widths), (tops, lefts) = sizes.T, np.asarray(corners).T
        first = self._ends[indices] - heights * widths
        where = torch.from_numpy(np.stack([first, tops, lefts, heights, widths])).to(self._device, non_blocking=True)
        images = torch.cat([self._cut(part) for part in where.split(_ROWS, dim=1)]).view(self._dtype)
        flip = torch.tensor([flip for _, flip, _ in rows]).to(self._device, non_blocking=True)
        self._waited += perf_counter() - began
        return Batch(images, flip, torch.from_numpy(indices))

    def _readable(self, plan: Plan, row: int) -> tuple[int, bool, list[float]]:
        """The image, flip and numbers of a row, or those of the first image after it that could be read."""
        for step in range(len(self._sizes)):
            one, at = (self._stream.instead(plan, row, step), 0) if step else (plan, row)
            if int(one.indices[at]) not in self._skipped:
                return int(one.indices[at]), bool(one.flip[at]), one.u[at].tolist()
        raise self._skipped.too_many()

    def _cut(self, where: Tensor) -> Tensor:
        """The crops (b c h w) of images whose first pixel, corner and size the five rows of `where` (5 b) give."""
        first, tops, lefts, heights, widths = where[:, :, None].unbind()
        h, w = self._crop.shape
        rows, columns = mirrored(tops, h, heights), mirrored(lefts, w, widths)
        places = (first + rows * widths)[:, :, None] + columns[:, None, :]
        return self._pixels[places].permute(0, 3, 1, 2)
