"""Batches of images with their objects, as a function of (seed, position)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from pixmim.data.dataset import BadImage
from pixmim.data.loader import BatchLoader, Finish, LoaderOptions
from pixmim.data.sampler import BatchShard, SampleBatch
from pixmim.evaluation.annotations import box_around
from pixmim.evaluation.detection.dataset import Annotated, Objects
from pixmim.evaluation.detection.masks import View
from pixmim.masking import Mask


@dataclass(frozen=True)
class DetectionBatch:
    """Images with the targets of torchvision's detectors.

    Each target has boxes float (k 4), labels int64 (k) from 1, and masks uint8 (k h w) where they are learned.
    """

    images: Shaped[Tensor, "b c h w"]
    targets: list[dict[str, Tensor]]


def jitter(image: tuple[int, int], size: int, scale: tuple[float, float], u: Sequence[float], flip: bool) -> View:
    """Large-scale jitter (arXiv 2012.07177), decided by three numbers in [0, 1).

    The image is resized to fit into `size` times a scale between the two given ones; where it is then larger than the
    square, a random part is cut out, and where smaller, it is filled on the right and below.
    """
    view = fitted(image, size * (scale[0] + u[0] * (scale[1] - scale[0])))
    h, w = view.resized
    corner = int(u[1] * (max(h - size, 0) + 1)), int(u[2] * (max(w - size, 0) + 1))
    return View(image, view.resized, corner, size, flip)


def fitted(image: tuple[int, int], size: float) -> View:
    """The whole image, resized so that its longer edge has `size` pixels."""
    ratio = size / max(image)
    resized = max(1, round(image[0] * ratio)), max(1, round(image[1] * ratio))
    return View(image, resized, (0, 0), round(size))


def picture(image: Shaped[Tensor, "c h w"], view: View, fill: Sequence[float]) -> Shaped[Tensor, "c h2 w2"]:
    """What is seen of an image, bilinear and with antialias; beyond it each channel has the value `fill`, of [0, 1]."""
    image = image.flip(-1) if view.flip else image
    image = V.resize(image, list(view.resized), interpolation=V.InterpolationMode.BILINEAR, antialias=True)
    beyond = torch.tensor(fill) if image.is_floating_point() else (255 * torch.tensor(fill)).round()
    out = beyond.to(image.dtype).view(-1, 1, 1).repeat(1, view.size, view.size)
    (row, column), (h, w) = view.corner, view.seen
    out[:, :h, :w] = image[:, row : row + h, column : column + w]
    return out


def target(objects: Objects, view: View, masks: bool) -> dict[str, Tensor]:
    """What there is to learn in a view: no crowds, and nothing that lies outside, or less than a pixel of it inside.

    With masks, a box is drawn anew around what is seen of its mask.
    """
    boxes = view.boxes(objects.boxes)
    kept = [i for i, box in enumerate(boxes) if not objects.crowd[i] and box[2] - box[0] >= 1 and box[3] - box[1] >= 1]
    drawn = []
    if masks:
        drawn = [view.mask(objects.masks[i]) for i in kept]
        found = [box_around(mask) for mask in drawn]
        for i, box in zip(kept, found, strict=True):
            boxes[i] = box or 0
        kept, drawn = [i for i, box in zip(kept, found, strict=True) if box], [m for m in drawn if m.any()]
    targets = {"boxes": torch.from_numpy(boxes[kept]), "labels": torch.from_numpy(objects.labels[kept] + 1)}
    if masks:
        stack = np.stack(drawn) if drawn else np.zeros((0, view.size, view.size), bool)
        targets["masks"] = torch.from_numpy(stack.astype(np.uint8))
    return targets


def read(data: Annotated, index: int) -> Tensor:
    """An image, one of 16 bits as floats in [0, 1].

    Raises BadImage if it is not there, or not of the size that its boxes were made for.
    """
    image = data.images.image(index)
    if image.dtype == torch.uint16:  # for which torch has few operators
        image = image.float() / 65535
    size = int(image.shape[-2]), int(image.shape[-1])
    if data.sizes is not None and size != data.sizes[index]:
        raise BadImage("it has {}x{} pixels, and its boxes were made for {}x{}".format(*size, *data.sizes[index]))
    return image


class DetectionLoader(BatchLoader[tuple[Tensor, dict[str, Tensor]], DetectionBatch]):
    """Batches of jittered images with their objects.

    Args:
        data: Annotated images.
        shard: Positions to train on.
        size: Side of the square, see `jitter`.
        scale: Range of the jitter, see `jitter`.
        instances: Whether masks are learned besides boxes.
        fill: Value of each channel beyond an image, in [0, 1].
        options: See `BatchLoader`.
    """

    def __init__(
        self,
        data: Annotated,
        shard: BatchShard,
        *,
        size: int,
        scale: tuple[float, float],
        instances: bool,
        fill: Sequence[float],
        **options: Unpack[LoaderOptions],
    ) -> None:
        super().__init__(data.images, 3, shard, **options)
        self._data, self._size, self._scale, self._instances, self._fill = data, size, scale, instances, fill

    def _read(self, index: int, flip: bool, u: list[float]) -> tuple[Tensor, dict[str, Tensor]]:
        image = read(self._data, index)
        view = jitter((int(image.shape[-2]), int(image.shape[-1])), self._size, self._scale, u, flip)
        return picture(image, view, self._fill), target(self._data.objects(index), view, self._instances)

    def _start(self, samples: SampleBatch, number: int) -> tuple[Callable[[int], None], Finish[DetectionBatch]]:
        views: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}

        def prepare(row: int) -> None:
            views[row] = self._read_row(samples, row)[0]

        def finish(mask: Mask | None, weight: float) -> DetectionBatch:
            images, targets = zip(*(views[row] for row in range(len(views))), strict=True)
            return DetectionBatch(torch.stack(images), list(targets))

        return prepare, finish
