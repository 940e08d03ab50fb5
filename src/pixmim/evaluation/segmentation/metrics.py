"""Metrics of semantic segmentation, from the confusion matrix of all pixels."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


def confusion_matrix(
    predicted: Int[Tensor, "*shape"], true: Int[Tensor, "*shape"], classes: int, ignore: int = 255
) -> Int[Tensor, "k k"]:
    """Count the pixels of each true class (row) by predicted class (column); pixels truly `ignore` do not count."""
    counts = true != ignore
    pairs = true[counts].long() * classes + predicted[counts].long()
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


@dataclass(frozen=True)
class SegmentationMetrics:
    """Metrics as shares; NaN where they are undefined.

    Attributes:
        iou: Intersection over union of each class (k); NaN for a class without a true pixel.
        mean_iou: Mean over the classes with a true pixel (mIoU).
        pixel_accuracy: Share of right pixels (aAcc).
        mean_accuracy: Mean recall of those classes (mAcc).
    """

    iou: Float[Tensor, " k"]
    mean_iou: float
    pixel_accuracy: float
    mean_accuracy: float


def segmentation_metrics(matrix: Int[Tensor, "k k"]) -> SegmentationMetrics:
    """Compute the metrics of a confusion matrix (rows true, columns predicted)."""
    m = matrix.double()
    right, true, predicted = m.diagonal(), m.sum(dim=1), m.sum(dim=0)
    iou = torch.where(true > 0, right / (true + predicted - right), math.nan)
    recall = torch.where(true > 0, right / true, math.nan)
    return SegmentationMetrics(iou, float(iou.nanmean()), float(right.sum() / m.sum()), float(recall.nanmean()))
