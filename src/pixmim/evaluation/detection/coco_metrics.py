"""Average precision as COCO measures it, by its evaluator."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pixmim.evaluation.annotations import Mask
from pixmim.evaluation.detection.dataset import Objects
from pixmim.evaluation.detection.masks import Segmentation, bitmap, coco, packed


@dataclass(frozen=True)
class Found:
    """k objects that a model sees in an image: boxes (k 4) as in Objects, labels (k), scores (k), masks (k) or none."""

    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    masks: list[Segmentation]


@dataclass
class Tally:
    """What was found, image by image, beside what is there.

    classes  names, in the order of the labels
    masks    whether masks are measured as well
    """

    classes: list[str]
    masks: bool
    _images: list[dict[str, Any]] = field(default_factory=list)
    _truth: list[dict[str, Any]] = field(default_factory=list)
    _found: list[dict[str, Any]] = field(default_factory=list)

    def add(self, size: tuple[int, int], truth: Objects, found: Found) -> None:
        """Count an image of (h, w)."""
        image = len(self._images) + 1
        self._images.append({"id": image, "height": size[0], "width": size[1]})
        for i, box in enumerate(truth.boxes):
            entry = {
                "id": len(self._truth) + 1,
                "image_id": image,
                "category_id": int(truth.labels[i]) + 1,
                "bbox": _corner_and_size(box),
                "area": float(truth.areas[i]),
                "iscrowd": int(truth.crowd[i]),
            }
            mask = {"segmentation": packed(bitmap(truth.masks[i], size))} if self.masks else {}
            self._truth.append(entry | mask)
        for i, box in enumerate(found.boxes):
            entry = {
                "image_id": image,
                "category_id": int(found.labels[i]) + 1,
                "bbox": _corner_and_size(box),
                "score": float(found.scores[i]),
            }
            mask = {"segmentation": found.masks[i]} if self.masks else {}
            self._found.append(entry | mask)

    def values(self) -> Iterator[tuple[str, float]]:
        """Average precision in per cent: box/AP (the mean over overlaps of 0.5 to 0.95), box/AP50, box/AP75, the same
        of masks, and each class's box/AP as ap/NAME and mask/AP as mask_ap/NAME.

        Where there is nothing to find (no object, or none but crowds), it is not a number; where there is, and
        nothing is found, it is 0.
        """
        for kind, each, iou in (("box", "ap", "bbox"), ("mask", "mask_ap", "segm"))[: 1 + self.masks]:
            precision = self._precision(iou)
            yield f"{kind}/AP", _mean(precision)
            yield f"{kind}/AP50", _mean(precision[0])
            yield f"{kind}/AP75", _mean(precision[5])
            for label, name in enumerate(self.classes):
                yield f"{each}/{name}", _mean(precision[:, :, label])

    def _precision(self, kind: str) -> npt.NDArray[np.float64]:
        """Precision (10 overlaps, 101 recalls, classes) of objects of any area; -1 where there is nothing to find."""
        package = coco()
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(self.classes)]
        truth = package.COCO({"images": self._images, "annotations": self._truth, "categories": categories})
        found = truth.loadRes([dict(entry) for entry in self._found])
        evaluator = package.COCOeval_faster(truth, found, kind, print_function=_silent)
        evaluator.evaluate()
        evaluator.accumulate()
        return np.asarray(evaluator.eval["precision"])[:, :, :, 0, -1]


def pack(masks: list[Mask]) -> list[Segmentation]:
    """Masks in the form that a Tally takes them in; some hundred bytes each."""
    return [packed(mask) for mask in masks]


def _corner_and_size(box: npt.NDArray[np.float32]) -> list[float]:
    left, top, right, bottom = box.tolist()
    return [left, top, right - left, bottom - top]


def _mean(precision: npt.NDArray[np.float64]) -> float:
    known = precision[precision > -1]
    return 100 * float(known.mean()) if len(known) else float("nan")


def _silent(*words: object) -> None:
    """In place of print."""
