"""Batches from a small dataset that stays decoded in GPU memory."""

from collections.abc import Callable
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from pixmim.data.dataset import BadImage, ImageDataset, prefetch_in_order
from pixmim.data.loader import Batch, BatchLoader, Finish, LoaderOptions
from pixmim.data.sampler import BatchShard, SampleBatch
from pixmim.masking import Mask
from pixmim.transforms.crops import Crop, as_int16_view, reflect_indices

_ROWS = 64  # images to crop at a time; this bounds the memory of their pixel indices


class GpuLoader(BatchLoader[None, Batch]):
    """Read all images onto the device once, and crop them there. Yields bitwise the batches of `Loader`.

    Args:
        dataset: One that knows the sizes of its images.
        crop: One that does not resize them: see `Crop.corner`.
        shard: Positions of this rank.
        options: See `BatchLoader`.
    """

    def __init__(self, dataset: ImageDataset, crop: Crop, shard: BatchShard, **options: Unpack[LoaderOptions]) -> None:
        super().__init__(dataset, crop.num_uniforms, shard, **options)
        assert dataset.sizes is not None
        self._crop, self._sizes, self._dtype = crop, dataset.sizes, dataset.image_spec.torch_dtype
        self._ends = np.cumsum(self._sizes.prod(axis=1))
        shape = int(self._ends[-1]), dataset.image_spec.channels
        self._pixels = as_int16_view(torch.empty(shape, dtype=self._dtype, device=self._device))
        advance = prefetch_in_order(dataset)
        advance(0)
        try:
            for done, _ in enumerate(self._pool.map(self._keep, range(len(dataset))), 1):
                advance(done)
        except BaseException:
            self.close()
            raise

    def _keep(self, index: int) -> None:
        """Copy one image to the device."""
        try:
            image = self._dataset.image(index)
        except BadImage as error:
            self._skipped.record(index, self._dataset.path_of(index), str(error))
            return
        end, count = int(self._ends[index]), int(self._sizes[index].prod())
        self._pixels[end - count : end] = as_int16_view(image).permute(1, 2, 0).reshape(count, -1).to(self._device)
        self._skipped.mark_ok(index)

    def _read(self, index: int, flip: bool, u: list[float]) -> None:
        """Do nothing: the image is on the device."""

    def _start(self, samples: SampleBatch, number: int) -> tuple[Callable[[int], None], Finish[Batch]]:
        count = len(samples.indices)
        indices = torch.empty(count, dtype=torch.int64)
        flip = torch.empty(count, dtype=torch.bool, pin_memory=self._pin)
        windows = torch.empty(5, count, dtype=torch.int64, pin_memory=self._pin)
        numbers, flips, columns = indices.numpy(), flip.numpy(), windows.numpy()

        def prepare(row: int) -> None:
            _, index, flips[row], u = self._read_row(samples, row)
            h, w = self._sizes[index].tolist()
            corner = self._crop.offset_without_resize((h, w), u)
            assert corner is not None
            numbers[row] = index
            columns[:, row] = self._ends[index] - h * w, *corner, h, w

        def finish(mask: Mask | None, weight: float) -> Batch:
            on_device = windows.to(self._device, non_blocking=True)
            images = torch.cat([self._cut(part) for part in on_device.split(_ROWS, dim=1)]).view(self._dtype)
            return Batch(images, flip, indices, mask, weight)

        return prepare, finish

    def _cut(self, windows: Tensor) -> Tensor:
        """Return crops (b c h w) of images, given their first pixel, top, left, height and width as rows (5 b)."""
        first, tops, lefts, heights, widths = windows[:, :, None].unbind()
        h, w = self._crop.shape
        rows, columns = reflect_indices(tops, h, heights), reflect_indices(lefts, w, widths)
        pixels = (first + rows * widths)[:, :, None] + columns[:, None, :]
        return self._pixels[pixels].permute(0, 3, 1, 2)
