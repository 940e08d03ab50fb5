"""Augmentation of batches on the device: random erasing, mixup, CutMix, soft labels.

Randomness is a function of (seed, number of the batch), so that a resumed run repeats it.
"""

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from pixmim.utils import rng

Box = tuple[int, int, int, int]
"""(top, left, height, width) in pixels."""


def erase(images: Float[Tensor, "b c h w"], probability: float, seed: int, number: int) -> Float[Tensor, "b c h w"]:
    """Replace a random box by standard normal noise, in place: random erasing in pixel mode (arXiv 1708.04896).

    As in the recipes of DeiT, MAE and SimMIM (timm): a box with `probability` in each image, of 0.02 to 1/3 of its
    area, aspect ratio log-uniform in [0.3, 1/0.3], ten tries. Returns the same tensor.
    """
    rows = np.arange(len(images))
    numbers = rng.uniform(seed, "erase", number, rows, 23)
    noise = torch.Generator(images.device).manual_seed(rng.key(seed, "erase noise", number))
    for row in np.flatnonzero(numbers[:, 0] < probability).tolist():
        box = erased_box((images.shape[-2], images.shape[-1]), numbers[row, 1:].tolist())
        if box is not None:
            top, left, h, w = box
            images[row, :, top : top + h, left : left + w].normal_(generator=noise)
    return images


def erased_box(size: tuple[int, int], u: list[float]) -> Box | None:
    """Return the box for 22 uniform numbers in an image of size (h, w); None if no try fits."""
    height, width = size
    low, high = math.log(0.3), math.log(1 / 0.3)
    for k in range(10):
        area = height * width * (0.02 + u[2 * k] * (1 / 3 - 0.02))
        aspect = math.exp(low + u[2 * k + 1] * (high - low))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            return int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w
    return None


def mix(
    images: Float[Tensor, "b c h w"], mixup: float, cutmix: float, seed: int, number: int
) -> tuple[Float[Tensor, "b c h w"], float]:
    """Mix a batch with itself in reverse order, by mixup (arXiv 1710.09412) or CutMix (arXiv 1905.04899).

    As in timm: one ratio per batch, and CutMix's ratio corrected for boxes that cross the border. With both, half of
    the batches each. `mixup` and `cutmix` are the parameters a of the ratios' distributions Beta(a, a); 0: none.

    Returns:
        The mixed images, and the weight of each image's own label.
    """
    if not (mixup or cutmix):
        return images, 1.0
    cut, *center = rng.uniform(seed, "mix", number, [0], 3)[0].tolist()
    boxed = bool(cutmix) and (not mixup or cut < 0.5)
    a = cutmix if boxed else mixup
    share = float(np.random.default_rng(rng.key(seed, "mix share", number)).beta(a, a))
    if not boxed:
        return images * share + images.flip(0) * (1 - share), share
    h, w = images.shape[-2:]
    top, left, down, across = cut_box((h, w), share, center)
    mixed = images.clone()
    mixed[..., top : top + down, left : left + across] = images.flip(0)[..., top : top + down, left : left + across]
    return mixed, 1 - down * across / (h * w)


def cut_box(size: tuple[int, int], share: float, center: list[float]) -> Box:
    """Return CutMix's box: the image's aspect ratio, 1 - share of its area, around `center`, clipped to the image."""
    ends = []
    for side, u in zip(size, center, strict=True):
        length, middle = int(side * math.sqrt(1 - share)), int(u * side)
        ends.append((max(0, middle - length // 2), min(side, middle + (length + 1) // 2)))
    (top, bottom), (left, right) = ends
    return top, left, bottom - top, right - left


def soft_labels(labels: Int[Tensor, " b"], classes: int, share: float, smoothing: float) -> Float[Tensor, "b classes"]:
    """Return target probabilities of a mixed batch: share * own label + (1 - share) * label in the reversed batch.

    Labels are smoothed: (1 - smoothing) * one-hot + smoothing / classes.
    """
    own = F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes
    return own * share + own.flip(0) * (1 - share)
