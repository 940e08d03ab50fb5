"""Numbers that say how good a prediction is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a share `correct` / `total` (Wilson's score interval), both ends in [0, 1]."""
    if total == 0:
        return 0.0, 1.0
    share = correct / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return (centre - spread) / (1 + z * z / total), (centre + spread) / (1 + z * z / total)


def recalls(right: Int[Tensor, " k"], total: Int[Tensor, " k"]) -> Float[Tensor, " k"]:
    """Return the share of each class's images that are answered rightly, in float64; NaN for a class without images."""
    return torch.where(total > 0, right.double() / total.double(), math.nan)


def average_distance(hidden: Bool[Tensor, "b 1 h w"]) -> float:
    """SimMIM's AvgDist: the mean Euclidean distance, in pixels, from each hidden pixel to the nearest visible one.

    Source: SimMIM (arXiv 2111.09886), section 4.2; fine-tuning is best between 10 and 20. Exact: the squared distance
    down each column first, then over all columns of a row. Memory is b*h*w*w numbers. NaN if nothing is hidden.
    """
    h, w = hidden.shape[-2:]
    y, far = torch.arange(h).view(1, h, 1), 4 * (h + w)
    visible = ~hidden[:, 0].cpu()
    above = torch.where(visible, y, -far).cummax(dim=1).values
    below = torch.where(visible, y, far).flip(1).cummin(dim=1).values.flip(1)
    down = torch.minimum(y - above, below - y).double().square()
    across = (torch.arange(w)[:, None] - torch.arange(w)[None, :]).double().square()
    squared = torch.stack([(row[:, :, None] + across).amin(dim=1) for row in down])
    return float(squared.sqrt()[hidden[:, 0].cpu()].mean())


def confusion(
    predicted: Int[Tensor, "*shape"], true: Int[Tensor, "*shape"], classes: int, ignore: int = 255
) -> Int[Tensor, "k k"]:
    """Pixels of each true class (row) that were predicted as each class (column); those truly `ignore` do not count."""
    counts = true != ignore
    pairs = true[counts].long() * classes + predicted[counts].long()
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


@dataclass(frozen=True)
class Overlap:
    """What a confusion matrix says of a segmentation, as shares; NaN where nothing can be said.

    iou             of each class (k): pixels in both truth and prediction / pixels in either; NaN for a class without
                    a true pixel
    mean_iou        mean over the classes with a true pixel (mIoU)
    pixel_accuracy  share of right pixels (aAcc)
    mean_accuracy   mean over those classes of the share of their pixels that were found (mAcc)
    """

    iou: Float[Tensor, " k"]
    mean_iou: float
    pixel_accuracy: float
    mean_accuracy: float


def overlap(matrix: Int[Tensor, "k k"]) -> Overlap:
    """The measures of a segmentation out of the confusion matrix of all its pixels (rows true, columns predicted)."""
    m = matrix.double()
    right, true, predicted = m.diagonal(), m.sum(dim=1), m.sum(dim=0)
    there = true > 0
    iou = torch.where(there, right / (true + predicted - right), math.nan)
    found = torch.where(there, right / true, math.nan)
    return Overlap(iou, float(iou.nanmean()), float(right.sum() / m.sum()), float(found.nanmean()))


ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""AlexNet's error on each corruption of ImageNet-C, the mean of its five severities (arXiv 1903.12261)."""


def corruption_errors(errors: Mapping[str, Sequence[float]]) -> tuple[dict[str, float], float | None]:
    """ImageNet-C's CE of each corruption and their mean, mCE, in per cent of AlexNet's errors.

    errors  of corruptions by name, at each of the five severities, in [0, 1]

    CE is the sum of the errors over the severities, divided by the same sum of AlexNet's. mCE is None unless all 15
    are there: a mean of some of them is another number. Raises ValueError for other than five severities.
    """
    for name, each in errors.items():
        if len(each) != 5:
            raise ValueError(f"CE takes the errors of five severities, and {name} has {len(each)}")
    found = {name: 100 * sum(each) / (5 * ALEXNET[name]) for name, each in errors.items()}
    return found, sum(found.values()) / len(found) if found.keys() == ALEXNET.keys() else None


def shape_decisions(
    answers: Int[Tensor, " n"], shapes: Int[Tensor, " n"], textures: Int[Tensor, " n"]
) -> tuple[float, float, float]:
    """Shares of answers that name the shape and the texture, and shape bias: the first in their sum. All in [0, 1].

    Stimuli whose shape and texture agree are left out. Shape bias is NaN where no answer names either; all three are
    where no stimulus is left (arXiv 1811.12231).
    """
    conflict = shapes != textures
    total = int(conflict.sum())
    by_shape = int((conflict & (answers == shapes)).sum())
    by_texture = int((conflict & (answers == textures)).sum())
    named = by_shape + by_texture
    if not total:
        return math.nan, math.nan, math.nan
    return by_shape / total, by_texture / total, by_shape / named if named else math.nan


def window_cover(edge: npt.ArrayLike, window: npt.ArrayLike, length: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """How much of [0, edge] a random window covers in expectation, along one axis, in pixels.

    The window, `window` of `length` pixels long, begins at any whole pixel where it lies inside, each as likely. So it
    covers pixel j with probability min(j + 1, length - j, window, length - window + 1) / (length - window + 1). This
    is the sum over what lies before `edge`, in [0, length], which may lie within a pixel. What is covered of [a, b] is
    the difference of two. Arguments are broadcast against each other.
    """
    t, w, n = (np.asarray(value, np.float64) for value in (edge, window, length))
    top = np.minimum(w, n - w + 1)  # starts that cover a pixel of the middle; also the pixels of either ramp
    whole = np.floor(t)
    up = np.minimum(whole, top)
    risen = up * (up + 1) / 2 + (whole - up) * top + (t - whole) * np.minimum(whole + 1, top)
    down = np.maximum(t - (n - top), 0)
    whole = np.floor(down)
    lost = whole * (whole - 1) / 2 + (down - whole) * whole
    return np.asarray((risen - lost) / (n - w + 1))
