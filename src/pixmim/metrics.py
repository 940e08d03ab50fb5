"""Numbers that say how good a prediction is."""

import math
from dataclasses import dataclass

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
