"""Batches of images with their objects, made by threads ahead of the loop; a function of (seed, position) alone."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from pixmim.data.bad_images import Skipped
from pixmim.data.dataset import BadImage
from pixmim.data.sampler import Plan, Stream
from pixmim.evaluation.detection.dataset import Annotated, Objects
from pixmim.evaluation.detection.masks import View, around
from pixmim.utils.threads import workers

_AHEAD = 2  # batches that are in the making while the loop uses one


@dataclass(frozen=True)
class Part:
    """Part number `number` of all batches: images, and what torchvision's detectors call their targets.

    Of each target: boxes float (k 4), labels int64 (k) from 1, and masks uint8 (k h w) where they are learnt.
    """

    number: int
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
        found = [around(mask) for mask in drawn]
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


class Feed(Iterator[Part]):
    """Batches of `batch` images from number `first` on; the end of its `with` statement lets go of its threads.

    size, scale  of the square and of the jitter, see `jitter`
    fill         each channel's value beyond an image, in [0, 1]

    `waited` counts the seconds that it was waited for.
    """

    def __init__(
        self,
        data: Annotated,
        skipped: Skipped,
        *,
        size: int,
        scale: tuple[float, float],
        masks: bool,
        fill: Sequence[float],
        batch: int,
        seed: int,
        first: int = 0,
        threads: int = 0,
    ) -> None:
        self._data, self._pool, self._skipped = data, workers(threads, "pixmim-boxes"), skipped
        self._size, self._scale, self._masks, self._fill, self._batch = size, scale, masks, fill, batch
        self._stream = Stream(seed, len(data.images), None, 3, 0.5)
        self._next = first
        self._pending: deque[tuple[int, list[Future[tuple[Tensor, dict[str, Tensor]]]]]] = deque()
        self.waited = 0.0

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __next__(self) -> Part:
        while len(self._pending) <= _AHEAD:
            plan = self._stream.plan(np.arange(self._next * self._batch, (self._next + 1) * self._batch))
            self._pending.append((self._next, [self._pool.submit(self._one, plan, i) for i in range(self._batch)]))
            self._next += 1
        number, futures = self._pending.popleft()
        began = perf_counter()
        made = [future.result() for future in futures]
        self.waited += perf_counter() - began
        return Part(number, torch.stack([image for image, _ in made]), [wanted for _, wanted in made])

    def _one(self, plan: Plan, row: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The image of a row, or the first after it in the order that can be read."""
        for step in range(len(self._data.images)):
            here = self._stream.instead(plan, row, step)
            index = int(here.indices[0])
            if index in self._skipped:
                continue
            try:
                image = read(self._data, index)
                size = int(image.shape[-2]), int(image.shape[-1])
                view = jitter(size, self._size, self._scale, here.u[0].tolist(), bool(here.flip[0]))
                wanted = target(self._data.objects(index), view, self._masks)
            except BadImage as error:
                self._skipped.add(index, self._data.images.locate(index), str(error))
                continue
            self._skipped.passed(index)
            return picture(image, view, self._fill), wanted
        raise self._skipped.too_many()
