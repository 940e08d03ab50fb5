"""Cache decoded images: in GPU memory, in RAM, or not at all. The batches are bitwise the same.

`choose_cache_location` applies the rule, unless the user decides: on a GPU if all images take at most a quarter of its
memory and the crop does not resize; else in RAM, if they take at most a quarter of it; else nowhere. Only a resized
cache has image sizes that are known before decoding, so only a resized cache is cached by default.
"""

from collections.abc import Callable
from typing import Any, Literal, Unpack

import numpy as np
import torch
from torch import Tensor

from pixmim.config import PretrainConfig
from pixmim.data.bad_images import BadImageLog
from pixmim.data.dataset import ImageDataset, InMemoryDataset, prefetch_in_order
from pixmim.data.loader import Batch, BatchLoader, Finish, Loader, LoaderOptions
from pixmim.data.sampler import BatchShard, SampleBatch
from pixmim.masking import Mask
from pixmim.transforms.crops import Crop, reflect_indices
from pixmim.transforms.images import as_int16_view
from pixmim.utils.errors import UserError
from pixmim.utils.memory import total_memory
from pixmim.utils.threads import ordered_map

CacheLocation = Literal["gpu", "ram", "none"]

MEMORY_FRACTION = 0.25
"""Largest fraction of a memory that decoded images take by default."""

_NOT_CROPPABLE = (
    "--cache-images gpu needs a cache at --size and --crop.kind simple-resized or center, because GPU crops do not "
    "resize"
)
_CROPS_AT_ONCE = 64  # bounds the memory of the pixel indices of a GPU batch
_UPLOADS_AHEAD = 256  # images that are read ahead while they are copied to the GPU


def choose_cache_location(
    dataset: ImageDataset,
    crop: Crop,
    cache_images: Literal["auto", "gpu", "ram", "none"],
    device: torch.device,
    processes: int = 1,
) -> tuple[CacheLocation, str]:
    """Return where decoded images are cached, and a line that explains it; "" if there was no choice.

    Args:
        dataset: The images.
        crop: The crop of the run.
        cache_images: The user's choice, `--cache-images`.
        device: Device of the run.
        processes: Processes of the run on this machine. Each caches images of its own, in the same RAM.

    Raises:
        UserError: If images cannot be cached on the GPU as requested.
    """
    size = decoded_bytes(dataset)
    croppable = _is_croppable(dataset, crop)
    if cache_images == "gpu" and not croppable:
        raise UserError(_NOT_CROPPABLE)
    if size is None:
        return ("ram", "cached in RAM once decoded, of unknown total size") if cache_images == "ram" else ("none", "")
    decoded = f"{size / 2**30:.1f} GiB decoded"
    fits_gpu = croppable and device.type != "cpu" and size <= MEMORY_FRACTION * _gpu_memory(device)
    if cache_images == "gpu" or (cache_images == "auto" and fits_gpu):
        return "gpu", f"cached on the GPU, {decoded} (--cache-images ram or none: do not)"
    fits_ram = size <= MEMORY_FRACTION * (total_memory() or 0) / processes
    if cache_images == "ram" or (cache_images == "auto" and fits_ram):
        return "ram", f"cached in RAM once decoded, {decoded} (--cache-images none: do not)"
    if cache_images == "none":
        return "none", "read from disk each time"
    shared = f", which {processes} processes share" if processes > 1 else ""
    return "none", (
        f"read from disk each time: {decoded} is more than a quarter of the RAM{shared} (--cache-images ram: cache)"
    )


def create_loader(
    dataset: ImageDataset,
    crop: Crop,
    shard: BatchShard | int,
    location: CacheLocation = "none",
    **options: Unpack[LoaderOptions],
) -> BatchLoader[Any, Batch]:
    """Create an endless loader of random crops, which threads prepare ahead. Use it in a `with` statement.

        with pixmim.create_loader(pixmim.open_dataset("photos"), pixmim.SimpleResizedCrop(224), 64) as loader:
            batch = next(loader)  # images (b c h w) as stored, flip (b), indices (b): copy what you keep

    Args:
        dataset: The images.
        crop: The crop. Flips are drawn, but left to the device.
        shard: Images per batch, or the positions that a rank of a run computes.
        location: Where decoded images are kept: "none", "ram" or "gpu" (see `choose_cache_location`).
        **options: Keyword arguments of `BatchLoader`: `flip` (probability, 0.5), `seed`, `threads`, `device`, `masks`,
            and `skipped`, the log of unreadable images, of which a quarter is allowed by default.

    Raises:
        UserError: If images cannot be kept on the GPU; from the loader, if too many images are unreadable.
    """
    shard = shard if isinstance(shard, BatchShard) else BatchShard(shard)
    options.setdefault(
        "skipped", BadImageLog(None, len(dataset), PretrainConfig.max_bad_fraction, "that a loader allows by default")
    )
    if location == "gpu":
        return GpuLoader(dataset, crop, shard, **options)
    return Loader(InMemoryDataset(dataset) if location == "ram" else dataset, crop, shard, **options)


def decoded_bytes(dataset: ImageDataset) -> int | None:
    """Return the bytes of all images once decoded, or None if their sizes are unknown."""
    if dataset.sizes is None:
        return None
    return int(dataset.sizes.prod(axis=1).sum()) * dataset.image_spec.channels * dataset.image_spec.itemsize


def _is_croppable(dataset: ImageDataset, crop: Crop) -> bool:
    """Return True if a crop only slices the images of a dataset, whose sizes are known."""
    return dataset.sizes is not None and all(
        crop.offset_without_resize((h, w), (0.0,) * crop.num_uniforms) is not None
        for h, w in np.unique(dataset.sizes, axis=0).tolist()
    )


def _gpu_memory(device: torch.device) -> int:
    """Return the bytes of a GPU's own memory; 0 for a device that shares the RAM."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


class GpuLoader(BatchLoader[None, Batch]):
    """Read all images onto the device once and crop them there. Yields bitwise the batches of `Loader`.

    The sizes of all images must be known, and the crop must not resize them: see `Crop.offset_without_resize`. Raises
    UserError otherwise.
    """

    def __init__(self, dataset: ImageDataset, crop: Crop, shard: BatchShard, **options: Unpack[LoaderOptions]) -> None:
        if dataset.sizes is None or not _is_croppable(dataset, crop):
            raise UserError(_NOT_CROPPABLE)
        super().__init__(dataset, crop.num_uniforms, shard, **options)
        self._crop, self._sizes, self._dtype = crop, dataset.sizes, dataset.image_spec.torch_dtype
        self._ends = np.cumsum(self._sizes.prod(axis=1))
        shape = int(self._ends[-1]), dataset.image_spec.channels
        self._pixels = as_int16_view(torch.empty(shape, dtype=self._dtype, device=self._device))
        indices = range(len(dataset))
        uploads = ordered_map(self._pool, self._upload, indices, _UPLOADS_AHEAD)
        try:
            for _ in zip(prefetch_in_order(dataset, indices), uploads, strict=True):
                pass
        except BaseException:
            self.close()
            raise

    def _upload(self, index: int) -> None:
        end, count = int(self._ends[index]), int(self._sizes[index].prod())
        with self._skipped.attempt(self._dataset, index):
            image = as_int16_view(self._dataset.image(index)).permute(1, 2, 0)
            self._pixels[end - count : end] = image.reshape(count, -1).to(self._device)

    def _read(self, index: int, flip: bool, u: list[float]) -> None:
        """Do nothing: the image is on the device."""

    def _start(self, samples: SampleBatch, number: int) -> tuple[Callable[[int], None], Finish[Batch]]:
        count = len(samples.indices)
        indices = torch.empty(count, dtype=torch.int64)
        flip = torch.empty(count, dtype=torch.bool, pin_memory=self._pin)
        windows = torch.empty(5, count, dtype=torch.int64, pin_memory=self._pin)
        numpy_indices, numpy_flip, numpy_windows = indices.numpy(), flip.numpy(), windows.numpy()

        def prepare(row: int) -> None:
            _, index, numpy_flip[row], u = self._read_row(samples, row)
            h, w = self._sizes[index].tolist()
            offset = self._crop.offset_without_resize((h, w), u)
            assert offset is not None
            numpy_indices[row] = index
            numpy_windows[:, row] = self._ends[index] - h * w, *offset, h, w

        def finish(mask: Mask | None, weight: float) -> Batch:
            on_device = windows.to(self._device, non_blocking=True)
            crops = torch.cat([self._crop_windows(part) for part in on_device.split(_CROPS_AT_ONCE, dim=1)])
            return Batch(crops.view(self._dtype), flip, indices, mask, weight)

        return prepare, finish

    def _crop_windows(self, windows: Tensor) -> Tensor:
        """Return crops (b c h w), given first pixel, top, left, height and width of each image as rows (5 b)."""
        first, tops, lefts, heights, widths = windows[:, :, None].unbind()
        h, w = self._crop.shape
        rows, columns = reflect_indices(tops, h, heights), reflect_indices(lefts, w, widths)
        pixels = (first + rows * widths)[:, :, None] + columns[:, None, :]
        return self._pixels[pixels].permute(0, 3, 1, 2)
