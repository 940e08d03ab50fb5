"""Images with boxes, and masks where there are any: COCO's JSON, or the drawn shapes."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixmim.data.folders.files import Files
from pixmim.data.shapes import SHAPES, Shapes
from pixmim.data.source import Form, Source
from pixmim.errors import UserError
from pixmim.evaluate.detection.masks import Segmentation


@dataclass(frozen=True)
class Objects:
    """What is known of k objects in an image.

    boxes   float32 (k 4): left, top, right, bottom in pixels
    labels  int64 (k): indices into the classes
    crowd   bool (k): a region of many, which is neither learnt nor to be found
    areas   float64 (k) in square pixels, as COCO states them
    masks   k segmentations; empty where there are none
    """

    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    crowd: npt.NDArray[np.bool_]
    areas: npt.NDArray[np.float64]
    masks: list[Segmentation]


@dataclass(frozen=True)
class Annotated:
    """A data set of images with objects.

    sizes    (h, w) of each image that its boxes were made for; None where any size is right
    objects  of the image with an index
    masks    whether every object has one
    about    what a user should know of how it was read, in a line, or nothing
    """

    images: Source
    sizes: list[tuple[int, int]] | None
    objects: Callable[[int], Objects]
    classes: list[str]
    masks: bool
    about: str = ""


def open_annotated(spec: str, folder: str, form: Form) -> Annotated:
    """The data set that `spec` names: a JSON file in COCO's format, or `shapes:`.

    folder  of the images; if empty, ROOT/NAME for ROOT/annotations/instances_NAME.json, and otherwise the file's own

    Raises UserError.
    """
    if spec.startswith("shapes:"):
        return _shapes(Shapes.from_spec(spec, form))
    file = Path(spec).expanduser()
    if folder:
        root = Path(folder).expanduser()
    elif file.parent.name == "annotations" and file.stem.startswith("instances_"):
        root = file.parent.parent / file.stem.removeprefix("instances_")
    else:
        root = file.parent
    if file.is_file() and not root.is_dir():
        raise UserError(f"the images of {file} should be in {root}, and there is no such folder")
    return _coco(spec, file, root, form)


def _shapes(shapes: Shapes) -> Annotated:
    def objects(index: int) -> Objects:
        sample = shapes.sample(index)
        return Objects(
            np.asarray([sample.box], np.float32),
            np.asarray([sample.shape]),
            np.zeros(1, bool),
            np.asarray([sample.mask.sum()], np.float64),
            [sample.mask],
        )

    return Annotated(shapes, None, objects, list(SHAPES), True)


def _coco(spec: str, file: Path, root: Path, form: Form) -> Annotated:
    content = _read(file)
    categories = sorted(_entries(file, content, "categories", ("id", "name")), key=lambda entry: entry["id"])
    label = {entry["id"]: number for number, entry in enumerate(categories)}
    images = _entries(file, content, "images", ("id", "file_name", "height", "width"))
    place = {entry["id"]: index for index, entry in enumerate(images)}
    if not images or not categories:
        raise UserError(f"{file} names no {'categories' if images else 'images'}")
    sizes = [(int(entry["height"]), int(entry["width"])) for entry in images]

    found: list[list[tuple[dict[str, Any], list[float]]]] = [[] for _ in images]
    clipped, dropped = 0, 0
    for number, entry in enumerate(_entries(file, content, "annotations", ("image_id", "category_id", "bbox"))):
        for key, known in (("image_id", place), ("category_id", label)):
            if entry[key] not in known:
                raise UserError(f"{file}: annotation {number} has {key} {entry[key]}, which the file does not list")
        box = entry["bbox"]
        if (
            not isinstance(box, list)
            or len(box) != 4
            or not all(isinstance(v, int | float) and math.isfinite(v) for v in box)
        ):
            raise UserError(f"{file}: annotation {number} has the bbox {box}, and not [left, top, width, height]")
        index, mask = place[entry["image_id"]], entry.get("segmentation")
        if isinstance(mask, dict) and tuple(mask.get("size", ())) != sizes[index]:
            raise UserError(
                f"{file}: annotation {number} has a mask of {mask.get('size')}, and its image {sizes[index]}"
            )
        (height, width), (x, y, w, h) = sizes[index], box
        cut = [max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))]
        if cut[2] <= cut[0] or cut[3] <= cut[1]:
            dropped += 1
            continue
        clipped += x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1  # rounding is no news
        found[index].append((entry, cut))

    everything = [entry for entries in found for entry, _ in entries if not entry.get("iscrowd")]
    masks = bool(everything) and all(_is_mask(entry.get("segmentation")) for entry in everything)
    objects = [
        Objects(
            np.asarray([box for _, box in entries], np.float32).reshape(-1, 4),
            np.asarray([label[entry["category_id"]] for entry, _ in entries], np.int64),
            np.asarray([bool(entry.get("iscrowd")) for entry, _ in entries], bool),
            np.asarray([entry.get("area", (b[2] - b[0]) * (b[3] - b[1])) for entry, b in entries], np.float64),
            [entry.get("segmentation") or _rectangle(box) for entry, box in entries] if masks else [],
        )
        for entries in found
    ]
    said = [f"{clipped} boxes reach beyond their image and were cut"] * bool(clipped)
    said += [f"{dropped} boxes are empty, or outside their image, and were left out"] * bool(dropped)
    about = f"{file.name}: {'; '.join(said)}" if said else ""
    files = Files(spec, root, [entry["file_name"] for entry in images], form)
    return Annotated(files, sizes, objects.__getitem__, [entry["name"] for entry in categories], masks, about)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is no COCO file: it holds no object with images, annotations and categories")
    return content


def _entries(file: Path, content: dict[str, Any], kind: str, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """The entries of one list of the file. Raises UserError naming the first one that lacks a key."""
    if kind not in content:
        raise UserError(f"{file} is no COCO file: it lacks '{kind}'")
    for number, entry in enumerate(content[kind]):
        for key in keys:
            if key not in entry:
                raise UserError(f"{file}: number {number} of its {kind} lacks '{key}'")
    return list(content[kind])


def _is_mask(segmentation: Any) -> bool:
    if isinstance(segmentation, dict):
        return "counts" in segmentation and "size" in segmentation
    if not isinstance(segmentation, list) or not segmentation:
        return False
    return all(isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0 for part in segmentation)


def _rectangle(box: list[float]) -> list[list[float]]:
    """A box as a polygon: for a crowd without a mask."""
    left, top, right, bottom = box
    return [[left, top, right, top, right, bottom, left, bottom]]
