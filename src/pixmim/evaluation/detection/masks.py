"""Masks as COCO writes them, and the evaluator's own code that draws and packs them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pixmim.data.dataset import BadImage
from pixmim.data.decode.limits import max_pixels
from pixmim.evaluation.annotations import Mask, is_number
from pixmim.utils.errors import UserError

Segmentation = Any
"""Polygons [[x, y, x, y ...] ...] in pixels, a run-length code {"size": [h, w], "counts": ...}, or bool (h w)."""

_MAX_DISTANCE = 10  # times an image's longer side: no polygon reaches farther


@dataclass(frozen=True)
class View:
    """What is seen of an image: flipped or not, resized, moved, and cut out as a square.

    image    (h, w) of the image
    resized  (h, w) that it is resized to
    corner   (row, column) of the resized image where the square begins
    size     side of the square; what lies beyond the image is filled
    flip     whether the image is mirrored, left for right, before all else
    """

    image: tuple[int, int]
    resized: tuple[int, int]
    corner: tuple[int, int]
    size: int
    flip: bool = False

    @property
    def scale(self) -> tuple[float, float]:
        """Pixels of the view for one of the image, down and across."""
        return self.resized[0] / self.image[0], self.resized[1] / self.image[1]

    @property
    def seen(self) -> tuple[int, int]:
        """(h, w) of the square that the image covers, from its upper left corner."""
        return min(self.size, self.resized[0] - self.corner[0]), min(self.size, self.resized[1] - self.corner[1])

    def boxes(self, boxes: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Boxes (k 4) of the image, left, top, right, bottom, as they lie in the view, cut at its edges."""
        down, across = self.scale
        if self.flip:
            boxes = np.stack([self.image[1] - boxes[:, 2], boxes[:, 1], self.image[1] - boxes[:, 0], boxes[:, 3]], 1)
        moved = boxes * [across, down, across, down] - np.asarray([self.corner[1], self.corner[0]] * 2)
        h, w = self.seen
        return moved.clip(0, [w, h, w, h]).astype(np.float32)

    def mask(self, segmentation: Segmentation) -> Mask:
        """A mask of the image as it lies in the view (size size)."""
        (down, across), (h, w) = self.scale, self.seen
        found = np.zeros((self.size, self.size), bool)
        if isinstance(segmentation, list):
            moved = []
            for polygon in segmentation:
                points = np.asarray(polygon, np.float64).reshape(-1, 2)
                x = self.image[1] - points[:, 0] if self.flip else points[:, 0]
                at = np.stack([x * across - self.corner[1], points[:, 1] * down - self.corner[0]], 1)
                moved.append(at.reshape(-1).tolist())
            found[:h, :w] = filled(moved, (h, w))
            return found
        mask = bitmap(segmentation, self.image)
        mask = mask[:, ::-1] if self.flip else mask
        rows = ((np.arange(h) + self.corner[0] + 0.5) / down).astype(np.int64)
        columns = ((np.arange(w) + self.corner[1] + 0.5) / across).astype(np.int64)
        found[:h, :w] = mask[rows[:, None], columns]
        return found


def bitmap(segmentation: Segmentation, size: tuple[int, int]) -> Mask:
    """Return the pixels of a mask of an image of (h, w).

    Raises:
        BadImage: If its code is damaged.
    """
    if isinstance(segmentation, np.ndarray):
        return segmentation
    if isinstance(segmentation, list):
        return filled(segmentation, size)
    tools = coco().mask
    counts = segmentation["counts"]
    try:
        packed = tools.frPyObjects(segmentation, *size) if isinstance(counts, list) else segmentation
        return np.asarray(tools.decode(packed), bool)
    except (ValueError, RuntimeError) as error:
        raise BadImage(f"one of its masks is damaged: {error}") from None


def filled(polygons: Sequence[Sequence[float]], size: tuple[int, int]) -> Mask:
    """Return the pixels inside any of some polygons, in an image of (h, w), by COCO's rule for edges.

    Raises:
        BadImage: If they cannot be drawn.
    """
    tools = coco().mask
    try:
        return np.asarray(tools.decode(tools.merge(tools.frPyObjects(list(polygons), *size))), bool)
    except (ValueError, RuntimeError) as error:
        raise BadImage(f"one of its masks cannot be drawn: {error}") from None


def packed(mask: Mask) -> dict[str, Any]:
    """A mask as a compressed run-length code."""
    return dict(coco().mask.encode(np.asfortranarray(mask, np.uint8)))


def check_segmentation(segmentation: Any, size: tuple[int, int]) -> tuple[Segmentation | None, str]:
    """Check a segmentation of a COCO file.

    Args:
        segmentation: Polygons or a run-length code.
        size: (h, w) of the image.

    Returns:
        The usable part, or None; and what is wrong with the rest as the name of a kind, or an empty string.
    """
    if segmentation is None or segmentation == []:
        return None, ""
    if isinstance(segmentation, list):
        reasons = [_check_polygon(polygon, _MAX_DISTANCE * max(size)) for polygon in segmentation]
        usable = [polygon for polygon, reason in zip(segmentation, reasons, strict=True) if not reason]
        reason = next(filter(None, reasons), "")
        return usable or None, f"masks have a polygon {reason}" if reason else ""
    if not isinstance(segmentation, dict):
        return None, "masks are neither polygons nor a run-length code"
    if segmentation.get("size") != list(size):
        return None, "masks have another size than their image"
    counts = segmentation.get("counts")
    if isinstance(counts, list):
        if not all(type(count) is int and count >= 0 for count in counts) or sum(counts) != size[0] * size[1]:
            return None, "masks have counts that do not add up to their pixels"
        return (segmentation, "") if any(counts[1::2]) else (None, "masks have no pixel")
    if not isinstance(counts, str) or size[0] * size[1] > max_pixels():
        return None, "masks have no counts that can be read"
    try:
        return (segmentation, "") if bitmap(segmentation, size).any() else (None, "masks have no pixel")
    except BadImage:
        return None, "masks have counts that do not add up to their pixels"


def _check_polygon(polygon: Any, limit: float) -> str:
    """Return what is wrong with a polygon [x, y, x, y ...]; empty if nothing is."""
    if not isinstance(polygon, list) or not all(map(is_number, polygon)):
        return "that is not numbers"
    if len(polygon) < 6 or len(polygon) % 2:
        return "with fewer than three corners, or half a corner"
    if min(polygon) < -limit or max(polygon) > limit:
        return f"that reaches {_MAX_DISTANCE} times as far as its image"
    if min(polygon[::2]) == max(polygon[::2]) or min(polygon[1::2]) == max(polygon[1::2]):
        return "without an area"
    return ""


def coco() -> Any:
    """The package that reads masks and measures as COCO does. Raises UserError if it is not installed."""
    try:
        import faster_coco_eval
    except ImportError as error:
        raise UserError("detection needs a COCO evaluator: pip install 'pixmim[detection]'") from error
    return faster_coco_eval
