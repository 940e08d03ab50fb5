"""Average precision as COCO defines it, computed by its evaluator."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pixmim.evaluation.detection.dataset import Objects, Segmentation, decode_mask, encode_mask, load_evaluator


@dataclass(frozen=True)
class Detections:
    """The k detections of an image: boxes (k 4) in pixels, labels (k), scores (k), and encoded masks, k or none."""

    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    masks: list[Segmentation]


@dataclass
class CocoMetrics:
    """Collect objects and detections image by image, and compute average precision."""

    classes: list[str]  # names of the classes, in the order of the labels
    masks: bool  # True to measure masks as well as boxes
    _images: list[dict[str, Any]] = field(default_factory=list)
    _objects: list[dict[str, Any]] = field(default_factory=list)
    _detections: list[dict[str, Any]] = field(default_factory=list)

    def update(self, size: tuple[int, int], objects: Objects, detections: Detections) -> None:
        """Add an image of `size` (h, w)."""
        image = len(self._images) + 1
        self._images.append({"id": image, "height": size[0], "width": size[1]})
        for i, label in enumerate(objects.labels.tolist()):
            entry = _entry(image, label, objects.boxes[i]) | {"area": float(objects.areas[i])}
            mask = {"segmentation": encode_mask(decode_mask(objects.masks[i], size))} if self.masks else {}
            number = {"id": len(self._objects) + 1, "iscrowd": int(objects.crowd[i])}
            self._objects.append(entry | mask | number)
        for i, label in enumerate(detections.labels.tolist()):
            mask = {"segmentation": detections.masks[i]} if self.masks else {}
            score = {"score": float(detections.scores[i])}
            self._detections.append(_entry(image, label, detections.boxes[i]) | score | mask)

    def compute(self) -> Iterator[tuple[str, float]]:
        """Yield average precision in per cent.

        box/AP is the mean over IoU thresholds of 0.5 to 0.95, box/AP50 and box/AP75 have one threshold, and ap/NAME is
        the box/AP of a class; mask/AP, mask/AP50, mask/AP75 and mask_ap/NAME are the same for masks. Values are NaN
        without an object (crowds do not count), and 0 if nothing is detected.
        """
        for kind, prefix, iou in (("box", "ap", "bbox"), ("mask", "mask_ap", "segm"))[: 1 + self.masks]:
            precision = self._precision(iou)
            yield f"{kind}/AP", _mean(precision)
            yield f"{kind}/AP50", _mean(precision[0])
            yield f"{kind}/AP75", _mean(precision[5])
            for label, name in enumerate(self.classes):
                yield f"{prefix}/{name}", _mean(precision[:, :, label])

    def _precision(self, kind: str) -> npt.NDArray[np.float64]:
        """Return precision (10 thresholds, 101 recalls, classes) of objects of any area; -1 where undefined."""
        package = load_evaluator()
        categories = [{"id": i + 1, "name": name} for i, name in enumerate(self.classes)]
        truth = package.COCO({"images": self._images, "annotations": self._objects, "categories": categories})
        results = truth.loadRes([dict(entry) for entry in self._detections])
        evaluator = package.COCOeval_faster(truth, results, kind, print_function=lambda *args: None)
        evaluator.evaluate()
        evaluator.accumulate()
        return np.asarray(evaluator.eval["precision"])[:, :, :, 0, -1]


def _entry(image: int, label: int, box: npt.NDArray[np.float32]) -> dict[str, Any]:
    left, top, right, bottom = box.tolist()
    return {"image_id": image, "category_id": label + 1, "bbox": [left, top, right - left, bottom - top]}


def _mean(precision: npt.NDArray[np.float64]) -> float:
    defined = precision[precision > -1]
    return 100 * float(defined.mean()) if len(defined) else float("nan")
