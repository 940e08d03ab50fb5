"""Images with boxes and masks from COCO files, VOC, YOLO or synthetic shapes."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pixmim.data.dataset import BadImage, ImageDataset, ImageSpec
from pixmim.data.decode.limits import max_pixels
from pixmim.data.image_folder import ImageFolder, check_inside
from pixmim.data.synthetic import SHAPES, SyntheticShapes
from pixmim.evaluation.annotations import BinaryMask, CocoFile, CocoObject, is_number, read_coco
from pixmim.evaluation.box_formats import read_boxes
from pixmim.utils.errors import UserError

Segmentation = Any
"""A mask: polygons [[x, y ...] ...] in pixels, a run-length code {"size": [h, w], "counts": ...}, or bool (h w)."""

_MAX_DISTANCE = 10  # of a polygon, in multiples of the longer side of its image


@dataclass(frozen=True)
class Objects:
    """The k objects of an image."""

    boxes: npt.NDArray[np.float32]  # float32 (k 4): left, top, right, bottom in pixels
    labels: npt.NDArray[np.int64]  # int64 (k): class indices
    # bool (k): True for a region of many objects, which is neither learned nor has to be detected
    crowd: npt.NDArray[np.bool_]
    areas: npt.NDArray[np.float64]  # float64 (k) in square pixels, as COCO defines them
    masks: list[Segmentation | None]  # k segmentations, None for an object without a usable one; or an empty list


@dataclass(frozen=True)
class DetectionDataset:
    """Images with objects."""

    images: ImageDataset
    # (h, w) of each image according to its annotations; None if every size is right
    sizes: list[tuple[int, int]] | None
    objects: Callable[[int], Objects]  # returns the objects of an image index
    classes: list[str]
    counts: list[int]  # objects of each class, without crowds
    unmasked: list[Any]  # names of the objects without a usable mask
    problems: str = ""  # problems of the file and their consequences, one per line

    @cached_property
    def truth(self) -> str:
        """Digest of the images' names and of all objects."""
        digest = sha256(f"{self.images.fingerprint()} {self.classes}".encode())
        for index in range(len(self.images)):
            objects = self.objects(index)
            for values in (objects.boxes, objects.labels, objects.crowd, objects.areas):
                digest.update(values.tobytes())
            digest.update(
                b"".join(m.tobytes() if isinstance(m, np.ndarray) else repr(m).encode() for m in objects.masks)
            )
        return digest.hexdigest()

    def read(self, index: int) -> Tensor:
        """Read an image (c h w), 16 bits as floats in [0, 1]. Raises BadImage, also for another size."""
        image = self.images.image(index)
        if image.dtype == torch.uint16:  # torch lacks most operators for it
            image = image.float() / 65535
        h, w = image.shape[-2:]
        if self.sizes is not None and (h, w) != self.sizes[index]:
            raise BadImage("size {}x{} differs from its annotations: {}x{}".format(h, w, *self.sizes[index]))
        return image


def open_detection(spec: str, folder: str, image_spec: ImageSpec, flag: str = "--train-images") -> DetectionDataset:
    """Open and check a COCO file, a dataset in the layout of VOC or YOLO (`box_formats`), or `shapes:`.

    The images are in `folder`, which messages call `flag`; if empty, in that of the layout; in ROOT/NAME for
    ROOT/annotations/instances_NAME.json; otherwise in the folder of the file. Raises UserError.
    """
    if spec.startswith("shapes:"):
        return _from_shapes(SyntheticShapes.from_spec(spec, image_spec))
    file = Path(spec).expanduser()
    boxes = None
    if file.suffix != ".json":
        boxes = read_boxes(file, "test" if flag == "--test-images" else "train", folder)
        if boxes is None and file.is_dir():
            raise UserError(f"{file} has no boxes in the layout of VOC or YOLO: see docs/evaluate.md")
    if boxes is not None:
        root = boxes[1]
        if folder and root.resolve() != Path(folder).expanduser().resolve():
            raise UserError(f"{flag} {folder}: the images of {file} are in {root}: leave the flag out")
    elif folder:
        root = Path(folder).expanduser()
    elif file.parent.name == "annotations" and file.stem.startswith("instances_"):
        root = file.parent.parent / file.stem.removeprefix("instances_")
    else:
        root = file.parent
    if file.is_file() and not root.is_dir():
        raise UserError(f"there is no folder {root} with the images of {file}: add {flag} FOLDER")
    coco = read_coco(file, check_segmentation, content=None if boxes is None else boxes[0])
    _check_files(coco, file, root, flag)
    objects: list[list[CocoObject]] = [[] for _ in coco.images]
    for each in coco.objects:
        objects[each.image].append(each)
    true = [each for each in coco.objects if not each.crowd]
    return DetectionDataset(
        ImageFolder(spec, root, [image.name for image in coco.images], image_spec),
        [image.size for image in coco.images],
        [_to_arrays(group) for group in objects].__getitem__,
        coco.classes,
        np.bincount([each.label for each in true], minlength=len(coco.classes)).tolist(),
        [each.name for each in true if each.mask is None],
        str(coco.problems),
    )


def box_polygon(box: Sequence[float]) -> list[list[float]]:
    """Return a box as a polygon, the mask of a crowd without one."""
    left, top, right, bottom = box
    return [[left, top, right, top, right, bottom, left, bottom]]


def _from_shapes(shapes: SyntheticShapes) -> DetectionDataset:
    def objects(index: int) -> Objects:
        sample = shapes.sample(index)
        area = float(sample.mask.sum())
        return _to_arrays([CocoObject("", index, sample.box, sample.shape, False, area, sample.mask)])

    counts = np.bincount(shapes.labels, minlength=len(SHAPES)).tolist()
    return DetectionDataset(shapes, None, objects, list(SHAPES), counts, [])


def _to_arrays(objects: Sequence[CocoObject]) -> Objects:
    return Objects(
        np.asarray([each.box for each in objects], np.float32).reshape(-1, 4),
        np.asarray([each.label for each in objects], np.int64),
        np.asarray([each.crowd for each in objects], bool),
        np.asarray([each.area for each in objects], np.float64),
        [box_polygon(each.box) if each.crowd and each.mask is None else each.mask for each in objects],
    )


def _check_files(coco: CocoFile, file: Path, root: Path, flag: str) -> None:
    """Raise UserError if images are outside of the folder, or more than a quarter of them are missing."""
    names = [image.name for image in coco.images]
    check_inside(names, [root], str(file), len(names), f"name the folder that holds them all as {flag}")
    missing = [name for name in names if not os.path.isfile(root / name)]
    if len(missing) > len(names) / 4:
        raise UserError(
            f"{len(missing):,} of the {len(names):,} images of {file} are not in {root}, such as {missing[0]}: add "
            f"{flag} FOLDER"
        )
    for name in missing:
        coco.problems.add(f"images are not in {root}", name)


def load_evaluator() -> Any:
    """Return the package that decodes masks and computes AP as COCO does. Raises UserError if it is not installed."""
    try:
        import faster_coco_eval
    except ImportError as error:
        raise UserError("detection needs a COCO evaluator: pip install 'pixmim[detection]'") from error
    return faster_coco_eval


def decode_mask(segmentation: Segmentation, size: tuple[int, int]) -> BinaryMask:
    """Return the pixels of a mask in an image of `size` (h, w). Raises BadImage if its code is damaged."""
    if isinstance(segmentation, np.ndarray):
        return segmentation
    tools = load_evaluator().mask
    try:
        if isinstance(segmentation, list):  # pixels in any of the polygons, by COCO's rule for edges
            return np.asarray(tools.decode(tools.merge(tools.frPyObjects(segmentation, *size))), bool)
        if isinstance(segmentation["counts"], list):
            segmentation = tools.frPyObjects(segmentation, *size)
        return np.asarray(tools.decode(segmentation), bool)
    except (ValueError, RuntimeError) as error:
        raise BadImage(f"a mask is damaged: {error}") from None


def encode_mask(mask: BinaryMask) -> dict[str, Any]:
    """Return a mask as a compressed run-length code of some hundred bytes."""
    return dict(load_evaluator().mask.encode(np.asfortranarray(mask, np.uint8)))


def check_segmentation(segmentation: Any, size: tuple[int, int]) -> tuple[Segmentation | None, str]:
    """Return the usable part of a segmentation in a COCO file, or None, and the kind of problem with the rest or ""."""
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
        return None, "masks and images differ in size"
    counts, wrong_sum = segmentation.get("counts"), "masks have counts that do not add up to their pixels"
    if isinstance(counts, list):
        if not all(type(count) is int and count >= 0 for count in counts) or sum(counts) != size[0] * size[1]:
            return None, wrong_sum
        return (segmentation, "") if any(counts[1::2]) else (None, "masks have no pixel")
    if not isinstance(counts, str) or size[0] * size[1] > max_pixels():
        return None, "masks have no readable counts"
    try:
        return (segmentation, "") if decode_mask(segmentation, size).any() else (None, "masks have no pixel")
    except BadImage:
        return None, wrong_sum


def _check_polygon(polygon: Any, limit: float) -> str:
    """Return the problem of a polygon [x, y, x, y, ...]; empty for a valid one."""
    if not isinstance(polygon, list) or not all(map(is_number, polygon)):
        return "that is not numbers"
    if len(polygon) < 6 or len(polygon) % 2:
        return "with fewer than three corners, or half a corner"
    if min(polygon) < -limit or max(polygon) > limit:
        return f"that extends beyond {_MAX_DISTANCE} times its image"
    if min(polygon[::2]) == max(polygon[::2]) or min(polygon[1::2]) == max(polygon[1::2]):
        return "without an area"
    return ""
