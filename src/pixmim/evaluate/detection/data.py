"""Images with boxes, and masks where there are any: COCO's JSON, or the drawn shapes."""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixmim.data.folders.files import Files, check_inside
from pixmim.data.shapes import SHAPES, Shapes
from pixmim.data.source import Form, Source
from pixmim.disk import read_file
from pixmim.errors import UserError
from pixmim.evaluate.detection.masks import Segmentation
from pixmim.process import killable

_MOST_BYTES = 2**32  # of a file of annotations
_MOST_SIDE = 2**20  # of an image, in pixels
_NEAR = 10  # times an image's longer side: no polygon reaches farther


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
    file = Path(os.path.expanduser(spec))
    if folder:
        root = Path(os.path.expanduser(folder))
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
    categories = _entries(file, content, "categories", {"id": _name, "name": _text})
    categories = sorted(categories, key=lambda entry: (isinstance(entry["id"], str), entry["id"]))
    label = {entry["id"]: number for number, entry in enumerate(categories)}
    keys = {"id": _name, "file_name": _text, "height": _side, "width": _side}
    images = _entries(file, content, "images", keys)
    place = {entry["id"]: index for index, entry in enumerate(images)}
    if not images or not categories:
        raise UserError(f"{file} names no {'categories' if images else 'images'}")
    names = [entry["file_name"] for entry in images]
    way_out = "name the folder that holds them all as --test-images or --train-images"
    check_inside(names, [root], str(file), len(names), way_out)
    sizes = [(int(entry["height"]), int(entry["width"])) for entry in images]

    found: list[list[tuple[dict[str, Any], list[float]]]] = [[] for _ in images]
    clipped, dropped = 0, 0
    keys = {"image_id": _name, "category_id": _name, "bbox": _box}
    for number, entry in enumerate(_entries(file, content, "annotations", keys)):
        for key, known in (("image_id", place), ("category_id", label)):
            if entry[key] not in known:
                raise UserError(f"{file}: annotation {number} has {key} {entry[key]}, which the file does not list")
        index, box, mask = place[entry["image_id"]], entry["bbox"], entry.get("segmentation")
        if isinstance(mask, dict) and mask.get("size") != list(sizes[index]):
            raise UserError(
                f"{file}: annotation {number} has a mask of {mask.get('size')}, and its image {sizes[index]}"
            )
        wrong = _wrong_mask(mask, sizes[index])
        if not wrong and not _number(entry.get("area") or 0):
            wrong = f"the area {str(entry['area'])[:60]}"
        if wrong:
            raise UserError(f"{file}: annotation {number} has {wrong}")
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
            np.asarray([_area(entry.get("area"), box) for entry, box in entries], np.float64),
            [entry.get("segmentation") or _rectangle(box) for entry, box in entries] if masks else [],
        )
        for entries in found
    ]
    said = [f"{clipped} boxes reach beyond their image and were cut"] * bool(clipped)
    said += [f"{dropped} boxes are empty, or outside their image, and were left out"] * bool(dropped)
    about = f"{file.name}: {'; '.join(said)}" if said else ""
    files = Files(spec, root, names, form)
    return Annotated(files, sizes, objects.__getitem__, [entry["name"] for entry in categories], masks, about)


def _read(file: Path) -> dict[str, Any]:
    try:
        data = read_file(file, _MOST_BYTES)
        with killable():
            content = json.loads(data)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is no COCO file: it holds no object with images, annotations and categories")
    return content


def _entries(
    file: Path, content: dict[str, Any], kind: str, keys: Mapping[str, Callable[[Any], bool]]
) -> list[dict[str, Any]]:
    """Return the entries of one list of the file.

    Raises:
        UserError: If one lacks a key, or has a value that the key's function refuses; with the first one's number.
    """
    entries = content.get(kind)
    if not isinstance(entries, list):
        raise UserError(f"{file} is no COCO file: it lacks '{kind}'")
    for number, entry in enumerate(entries):
        for key, is_right in keys.items():
            if not isinstance(entry, dict) or key not in entry:
                raise UserError(f"{file}: number {number} of its {kind} lacks '{key}'")
            if not is_right(entry[key]):
                raise UserError(f"{file}: number {number} of its {kind} has the {key} {str(entry[key])[:60]}")
    return entries


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63  # NaN is not


def _name(value: Any) -> bool:
    """Return True for what an image, or a category, can be called in the file: a number or a text."""
    return isinstance(value, str) or _number(value)


def _side(value: Any) -> bool:
    return _number(value) and 1 <= value <= _MOST_SIDE


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _box(value: Any) -> bool:
    """Return True for [left, top, width, height]."""
    return isinstance(value, list) and len(value) == 4 and all(map(_number, value))


def _wrong_mask(mask: Any, size: tuple[int, int]) -> str:
    """Describe a mask that cannot be drawn, or only with a memory beyond all measure; empty if there is none."""
    if isinstance(mask, list):
        most = _NEAR * max(size)
        for part in mask:
            try:
                inside = not part or (math.isfinite(sum(part)) and -most <= min(part) and max(part) <= most)
            except (TypeError, OverflowError):
                return "a polygon that is not of numbers"
            if not inside:
                return f"a polygon that reaches {_NEAR} times as far as its image"
    if isinstance(mask, dict) and isinstance(counts := mask.get("counts"), list):
        if not all(type(count) is int and count >= 0 for count in counts) or sum(counts) != size[0] * size[1]:
            return "a mask whose counts are not those of its pixels"
    elif isinstance(mask, dict) and not isinstance(counts, str):
        return "a mask without counts"
    return ""


def _is_mask(segmentation: Any) -> bool:
    if isinstance(segmentation, dict):
        return "counts" in segmentation and "size" in segmentation
    if not isinstance(segmentation, list) or not segmentation:
        return False
    return all(isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0 for part in segmentation)


def _area(stated: float | None, box: list[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1]) if stated is None else stated


def _rectangle(box: list[float]) -> list[list[float]]:
    """A box as a polygon: for a crowd without a mask."""
    left, top, right, bottom = box
    return [[left, top, right, top, right, bottom, left, bottom]]
