"""What happens to a whole batch on the device before it is learnt from: erasing, mixup and CutMix, soft labels.

All randomness is a function of (seed, number of the batch), so that an interrupted run goes on exactly.
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
    """Random erasing, pixel mode: a box of normalized images becomes standard normal noise, in place.

    Its area is 0.02 to 1/3 of the image's and its aspect 0.3 to 1/0.3, log-uniform; ten tries to fit it in.
    Source: arXiv 1708.04896, as timm applies it in the recipes of DeiT, MAE and SimMIM.
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
    """The box that 22 uniform numbers choose in an image of `size` (h, w); None if no try fits."""
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
    """Mixup or CutMix of a batch with itself in reverse order; and the share that each image keeps of its own label.

    mixup, cutmix  the share is drawn from Beta(a, a) with this a; 0: never. With both, one half of the batches each.

    Sources: arXiv 1710.09412 and 1905.04899; one share for a batch, and the share of CutMix corrected for boxes that
    leave the image, as timm does.
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
    """CutMix's box of the image's aspect and 1 - `share` of its area, around a uniform center, cut at the edges."""
    ends = []
    for side, u in zip(size, center, strict=True):
        length, middle = int(side * math.sqrt(1 - share)), int(u * side)
        ends.append((max(0, middle - length // 2), min(side, middle + (length + 1) // 2)))
    (top, bottom), (left, right) = ends
    return top, left, bottom - top, right - left


def soft_labels(labels: Int[Tensor, " b"], classes: int, share: float, smoothing: float) -> Float[Tensor, "b classes"]:
    """Probabilities to learn: `share` of an image's own label, the rest of its partner's (the batch in reverse order).

    Each label is smoothed first: smoothing / classes for every class, and 1 - smoothing more for its own.
    """
    own = F.one_hot(labels, classes).float() * (1 - smoothing) + smoothing / classes
    return own * share + own.flip(0) * (1 - share)
