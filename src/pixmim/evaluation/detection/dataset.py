"""Images with boxes, and masks where there are any: COCO's JSON, or the drawn shapes."""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixmim.data.dataset import BadImage, Form, Source
from pixmim.data.decode.limits import max_pixels
from pixmim.data.image_folder import Files, check_inside
from pixmim.data.synthetic import SHAPES, Shapes
from pixmim.evaluation.detection.masks import Segmentation, bitmap
from pixmim.utils.errors import UserError
from pixmim.utils.files import read_file
from pixmim.utils.process import killable

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
    masks   k segmentations, None for an object without one that can be used; or none at all
    """

    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    crowd: npt.NDArray[np.bool_]
    areas: npt.NDArray[np.float64]
    masks: list[Segmentation | None]


@dataclass(frozen=True)
class Annotated:
    """A data set of images with objects.

    sizes     (h, w) of each image that its boxes were made for; None where any size is right
    objects   of the image with an index
    counts    objects of each class, without crowds
    unmasked  ids of those without a mask that can be used
    about     what was found wrong, and what follows, in lines
    """

    images: Source
    sizes: list[tuple[int, int]] | None
    objects: Callable[[int], Objects]
    classes: list[str]
    counts: list[int]
    unmasked: list[Any]
    about: str = ""

    @property
    def masks(self) -> bool:
        """Whether every object has a mask."""
        return not self.unmasked and sum(self.counts) > 0


def open_annotated(spec: str, folder: str, form: Form, flag: str = "--train-images") -> Annotated:
    """The data set that `spec` names: a JSON file in COCO's format, or `shapes:`.

    folder  of the images; if empty, ROOT/NAME for ROOT/annotations/instances_NAME.json, and otherwise the file's own
    flag    that names another one

    All of a file is checked here; what cannot be used is left out, and counted in `about`. Raises UserError.
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
        raise UserError(
            f"the images of {file} should be in {root}, and there is no such folder: name it as {flag} FOLDER"
        )
    return _coco(spec, file, root, form, flag)


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

    counts = np.bincount(shapes.labels, minlength=len(SHAPES)).tolist()
    return Annotated(shapes, None, objects, list(SHAPES), counts, [])


class _Problems:
    """What is wrong with annotations: for each kind how many, the first one, and what follows.

    `broken` counts what cannot have been meant, unlike a box that reaches beyond its image.
    """

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str, str]] = {}
        self.broken = 0

    def add(self, kind: str, first: object, follows: str, *, broken: bool = False) -> None:
        self.broken += broken
        count, before, _ = self._found.get(kind, (0, str(first)[:60], ""))
        self._found[kind] = count + 1, before, follows

    def __str__(self) -> str:
        return "\n".join(
            f"{count:,} {kind}: {follows} (the first is {first})"
            for kind, (count, first, follows) in self._found.items()
        )


def _coco(spec: str, file: Path, root: Path, form: Form, flag: str) -> Annotated:
    content, problems = _read(file), _Problems()
    names, label = _categories(file, content, problems)
    images = _images(file, content, root, problems, flag)
    place = {entry["id"]: index for index, entry in enumerate(images)}
    sizes = [(int(entry["height"]), int(entry["width"])) for entry in images]

    annotations = content.get("annotations")
    if not isinstance(annotations, list):
        raise UserError(f"{file} is no COCO file: it lacks 'annotations'")
    found: list[list[_Object]] = [[] for _ in images]
    seen, twins = set[str](), dict[tuple[Any, ...], _Object]()
    for number, entry in enumerate(annotations):
        name = f"annotation {entry.get('id', number)}" if isinstance(entry, dict) else f"number {number}"
        wrong = _unusable(entry, place, label)
        if wrong:
            problems.add(wrong, name, "left out", broken=True)
            continue
        if "id" in entry:
            if repr(entry["id"]) in seen:
                problems.add("annotations have the id of another one", name, "all are used")
            seen.add(repr(entry["id"]))
        index = place[entry["image_id"]]
        one = _object(entry, label[entry["category_id"]], sizes[index], name, problems)
        if one is None:
            continue
        twin = twins.setdefault((index, one.box, one.label), one)
        if twin is not one and (twin.mask, twin.crowd) == (one.mask, one.crowd):
            problems.add("objects are listed twice", name, "the second is left out")
            continue
        if one.crowd:
            problems.add("objects are crowds", name, "neither learned nor measured")
        found[index].append(one)

    if problems.broken > len(annotations) / 4:
        raise UserError(f"{file}: more than a quarter of its {len(annotations):,} annotations are broken:\n{problems}")
    everything = [one for objects in found for one in objects]
    unmasked = [one.name for one in everything if not one.crowd and one.mask is None]
    counts = np.bincount([one.label for one in everything if not one.crowd], minlength=len(names)).tolist()
    objects = [
        Objects(
            np.asarray([one.box for one in mine], np.float32).reshape(-1, 4),
            np.asarray([one.label for one in mine], np.int64),
            np.asarray([one.crowd for one in mine], bool),
            np.asarray([one.area for one in mine], np.float64),
            [one.mask for one in mine],
        )
        for mine in found
    ]
    files = Files(spec, root, [entry["file_name"] for entry in images], form)
    return Annotated(files, sizes, objects.__getitem__, names, counts, unmasked, str(problems))


@dataclass(frozen=True)
class _Object:
    name: str
    box: tuple[float, ...]
    label: int
    crowd: bool
    area: float
    mask: Segmentation | None


def _categories(file: Path, content: dict[str, Any], problems: _Problems) -> tuple[list[str], dict[Any, int]]:
    """The classes, and the number of each category's id. Raises UserError."""
    entries = _entries(file, content, "categories", {"id": _name, "name": _text})
    entries = sorted(entries, key=lambda entry: (isinstance(entry["id"], str), entry["id"]))
    if not entries:
        raise UserError(f"{file} names no categories")
    names, label = list[str](), dict[Any, int]()
    for entry in entries:
        number, name = entry["id"], entry["name"]
        if number in label and names[label[number]] != name:
            raise UserError(f"{file}: two categories have the id {number}: '{names[label[number]]}' and '{name}'")
        if name in names and number not in label:
            problems.add("categories have the name of another one", f"{number}, '{name}'", "they are one class")
        elif name not in names:
            names.append(name)
        label[number] = names.index(name)
    return names, label


def _images(file: Path, content: dict[str, Any], root: Path, problems: _Problems, flag: str) -> list[dict[str, Any]]:
    """The images, each once. Raises UserError, also if more than a quarter are not there."""
    keys = {"id": _name, "file_name": _text, "height": _side, "width": _side}
    entries = _entries(file, content, "images", keys)
    if not entries:
        raise UserError(f"{file} names no images")
    kept, names = dict[Any, dict[str, Any]](), set[str]()
    for entry in entries:
        number, name = entry["id"], entry["file_name"]
        if number in kept:
            if kept[number]["file_name"] != name:
                raise UserError(f"{file}: two images have the id {number}: {kept[number]['file_name']} and {name}")
            problems.add("images are listed twice", name, "once is enough")
            continue
        if name in names:
            problems.add("images have the file of another one", name, "each is an image of its own")
        kept[number] = entry
        names.add(name)
    paths = [entry["file_name"] for entry in kept.values()]
    check_inside(paths, [root], str(file), len(paths), f"name the folder that holds them all as {flag}")
    missing = [path for path in paths if not os.path.isfile(root / path)]
    if len(missing) > len(paths) / 4:
        raise UserError(
            f"{len(missing):,} of the {len(paths):,} images of {file} are not in {root}, such as {missing[0]}: name "
            f"the folder that they are in as {flag} FOLDER"
        )
    for path in missing:
        problems.add(f"images are not in {root}", path, "left out")
    return list(kept.values())


def _unusable(entry: Any, place: Mapping[Any, int], label: Mapping[Any, int]) -> str:
    """Why nothing can be made of an annotation, as the name of a kind; empty if something can."""
    if not isinstance(entry, dict):
        return "annotations are no objects of JSON"
    for key, known in (("image_id", place), ("category_id", label)):
        if not _name(entry.get(key)) or entry[key] not in known:
            return f"annotations have a {key} that the file does not list"
    if not _box(entry.get("bbox")):
        return "annotations have a bbox that is not four numbers"
    return ""


def _object(entry: dict[str, Any], label: int, size: tuple[int, int], name: str, problems: _Problems) -> _Object | None:
    """An annotation as an object; None if it has no box in its image."""
    (height, width), (x, y, w, h) = size, entry["bbox"]
    box = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    if box[2] <= box[0] or box[3] <= box[1]:
        problems.add("boxes are empty, or outside their image", name, "left out")
        return None
    if x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:  # rounding is no news
        problems.add("boxes reach beyond their image", name, "cut")
    area, crowd = entry.get("area"), bool(entry.get("iscrowd"))
    if area is not None and not (_number(area) and area >= 0):
        problems.add("areas are not numbers from 0 on", name, "the box's is taken", broken=True)
        area = None
    mask, wrong = _usable(entry.get("segmentation"), size)
    if wrong:
        problems.add(wrong, name, "a part is left out" if mask else "no mask", broken=True)
    if crowd and mask is None:
        mask = rectangle(box)
    return _Object(name, box, label, crowd, (box[2] - box[0]) * (box[3] - box[1]) if area is None else area, mask)


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


def _usable(mask: Any, size: tuple[int, int]) -> tuple[Segmentation | None, str]:
    """What can be drawn of a mask, within a bound of memory, and what is wrong with the rest as the name of a kind."""
    if mask is None or mask == []:
        return None, ""
    if isinstance(mask, list):
        wrong, parts = Counter[str](), []
        for part in mask:
            reason = _wrong_polygon(part, _NEAR * max(size))
            wrong[reason] += 1
            if not reason:
                parts.append(part)
        del wrong[""]
        return parts or None, f"masks have a polygon {next(iter(wrong))}" if wrong else ""
    if not isinstance(mask, dict):
        return None, "masks are neither polygons nor a run-length code"
    if mask.get("size") != list(size):
        return None, "masks are of another size than their image"
    counts = mask.get("counts")
    if isinstance(counts, list):
        if not all(type(count) is int and count >= 0 for count in counts) or sum(counts) != size[0] * size[1]:
            return None, "masks have counts that are not those of their pixels"
        return (mask, "") if any(counts[1::2]) else (None, "masks have no pixel")
    if not isinstance(counts, str) or size[0] * size[1] > max_pixels():
        return None, "masks have no counts that can be read"
    try:
        return (mask, "") if bitmap(mask, size).any() else (None, "masks have no pixel")
    except BadImage:
        return None, "masks have counts that are not those of their pixels"


def _wrong_polygon(part: Any, most: float) -> str:
    """What is wrong with a polygon [x, y, x, y ...]; empty if nothing is."""
    if not isinstance(part, list) or not all(map(_number, part)):
        return "that is not of numbers"
    if len(part) < 6 or len(part) % 2:
        return "of fewer than three corners, or of half a one"
    if min(part) < -most or max(part) > most:
        return f"that reaches {_NEAR} times as far as its image"
    if min(part[::2]) == max(part[::2]) or min(part[1::2]) == max(part[1::2]):
        return "without an area"
    return ""


def rectangle(box: Sequence[float]) -> list[list[float]]:
    """A box as a polygon: for a crowd without a mask."""
    left, top, right, bottom = box
    return [[left, top, right, top, right, bottom, left, bottom]]
