"""Batches of jittered images with their objects, as a function of (seed, position)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Shaped
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from pixmim.data.loader import BatchLoader, Finish, LoaderOptions
from pixmim.data.sampler import BatchShard, SampleBatch
from pixmim.evaluation.annotations import BinaryMask, bounding_box
from pixmim.evaluation.detection.dataset import DetectionDataset, Objects, Segmentation, decode_mask
from pixmim.masking import Mask

Target = dict[str, Tensor]
"""Target of torchvision's detectors: boxes float (k 4), labels int64 (k) from 1, and perhaps masks uint8 (k h w)."""


@dataclass(frozen=True)
class SquareCrop:
    """A geometric transform of an image: flip, resize, and crop a square, padded at the right and the bottom."""

    image: tuple[int, int]  # (h, w) of the image
    resized: tuple[int, int]  # (h, w) of the resized image
    corner: tuple[int, int]  # (row, column) of the square in the resized image
    size: int
    flip: bool = False  # True to mirror the image horizontally first

    @property
    def scale(self) -> tuple[float, float]:
        """Factors of the resize, vertical and horizontal."""
        return self.resized[0] / self.image[0], self.resized[1] / self.image[1]

    @property
    def covered(self) -> tuple[int, int]:
        """(h, w) of the part of the square that the image covers."""
        return min(self.size, self.resized[0] - self.corner[0]), min(self.size, self.resized[1] - self.corner[1])

    def crop_image(self, image: Shaped[Tensor, "c h w"], fill: Sequence[float]) -> Shaped[Tensor, "c size size"]:
        """Transform an image, bilinear with antialias; padding has the value `fill` of each channel, in [0, 1]."""
        image = image.flip(-1) if self.flip else image
        image = V.resize(image, list(self.resized), interpolation=V.InterpolationMode.BILINEAR, antialias=True)
        padding = torch.tensor(fill) if image.is_floating_point() else (255 * torch.tensor(fill)).round()
        out = padding.to(image.dtype).view(-1, 1, 1).repeat(1, self.size, self.size)
        (row, column), (h, w) = self.corner, self.covered
        out[:, :h, :w] = image[:, row : row + h, column : column + w]
        return out

    def crop_boxes(self, boxes: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Transform boxes (k 4), clipped to the square."""
        down, across = self.scale
        if self.flip:
            boxes = np.stack([self.image[1] - boxes[:, 2], boxes[:, 1], self.image[1] - boxes[:, 0], boxes[:, 3]], 1)
        moved = boxes * [across, down, across, down] - np.asarray([self.corner[1], self.corner[0]] * 2)
        h, w = self.covered
        return moved.clip(0, [w, h, w, h]).astype(np.float32)

    def crop_mask(self, segmentation: Segmentation) -> BinaryMask:
        """Transform a mask to (size size). Raises BadImage for a damaged one."""
        (down, across), (h, w) = self.scale, self.covered
        out = np.zeros((self.size, self.size), bool)
        if isinstance(segmentation, list):
            moved = []
            for polygon in segmentation:
                points = np.asarray(polygon, np.float64).reshape(-1, 2)
                x = self.image[1] - points[:, 0] if self.flip else points[:, 0]
                xy = np.stack([x * across - self.corner[1], points[:, 1] * down - self.corner[0]], 1)
                moved.append(xy.reshape(-1).tolist())
            out[:h, :w] = decode_mask(moved, (h, w))
            return out
        mask = decode_mask(segmentation, self.image)
        mask = mask[:, ::-1] if self.flip else mask
        rows = ((np.arange(h) + self.corner[0] + 0.5) / down).astype(np.int64)
        columns = ((np.arange(w) + self.corner[1] + 0.5) / across).astype(np.int64)
        out[:h, :w] = mask[rows[:, None], columns]
        return out


def fit_to_square(image: tuple[int, int], size: float) -> SquareCrop:
    """Resize an image of (h, w) so that its longer edge has `size` pixels."""
    ratio = size / max(image)
    resized = max(1, round(image[0] * ratio)), max(1, round(image[1] * ratio))
    return SquareCrop(image, resized, (0, 0), round(size))


def jitter(image: tuple[int, int], size: int, scale: tuple[float, float], u: Sequence[float], flip: bool) -> SquareCrop:
    """Apply large-scale jitter (arXiv 2012.07177) to an image of (h, w), by three uniform numbers in [0, 1).

    Resize the image to fit into `size` times a random factor, and crop a random part if it is larger than the square.
    """
    h, w = fit_to_square(image, size * (scale[0] + u[0] * (scale[1] - scale[0]))).resized
    corner = int(u[1] * (max(h - size, 0) + 1)), int(u[2] * (max(w - size, 0) + 1))
    return SquareCrop(image, (h, w), corner, size, flip)


def make_target(objects: Objects, crop: SquareCrop, masks: bool) -> Target:
    """Return the target of a crop, without crowds and objects of which less than a pixel is visible.

    With masks, boxes are recomputed from the visible part of the masks.
    """
    boxes = crop.crop_boxes(objects.boxes)
    used = [i for i, box in enumerate(boxes) if not objects.crowd[i] and box[2] - box[0] >= 1 and box[3] - box[1] >= 1]
    cropped = []
    for i in used if masks else ():
        mask = crop.crop_mask(objects.masks[i])
        box = bounding_box(mask)
        if box is not None:
            boxes[i] = box
            cropped.append((i, mask))
    used = [i for i, _ in cropped] if masks else used
    target = {"boxes": torch.from_numpy(boxes[used]), "labels": torch.from_numpy(objects.labels[used] + 1)}
    if masks:
        stack = np.stack([mask for _, mask in cropped]) if cropped else np.zeros((0, crop.size, crop.size), bool)
        target["masks"] = torch.from_numpy(stack.astype(np.uint8))
    return target


@dataclass(frozen=True)
class DetectionBatch:
    """Images with their targets."""

    images: Shaped[Tensor, "b c h w"]
    targets: list[Target]


class DetectionLoader(BatchLoader[tuple[Tensor, Target], DetectionBatch]):
    """Load batches of images with their objects, jittered by `jitter`.

    Padding has the value `fill` of each channel, in [0, 1]. Options: see `BatchLoader`.
    """

    def __init__(
        self,
        data: DetectionDataset,
        shard: BatchShard,
        *,
        size: int,
        scale: tuple[float, float],
        with_masks: bool,
        fill: Sequence[float],
        **options: Unpack[LoaderOptions],
    ) -> None:
        super().__init__(data.images, 3, shard, **options)
        self._data, self._size, self._scale, self._with_masks, self._fill = data, size, scale, with_masks, fill

    def _read(self, index: int, flip: bool, u: list[float]) -> tuple[Tensor, Target]:
        image = self._data.read(index)
        crop = jitter((int(image.shape[-2]), int(image.shape[-1])), self._size, self._scale, u, flip)
        return crop.crop_image(image, self._fill), make_target(self._data.objects(index), crop, self._with_masks)

    def _start(self, samples: SampleBatch, number: int) -> tuple[Callable[[int], None], Finish[DetectionBatch]]:
        rows: dict[int, tuple[Tensor, Target]] = {}

        def prepare(row: int) -> None:
            rows[row] = self._read_row(samples, row)[0]

        def finish(mask: Mask | None, weight: float) -> DetectionBatch:
            images, targets = zip(*(rows[row] for row in range(len(rows))), strict=True)
            return DetectionBatch(torch.stack(images), list(targets))

        return prepare, finish
