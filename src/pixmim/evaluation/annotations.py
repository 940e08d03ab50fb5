"""Read object annotations: boxes and masks from CSV, COCO and VOC files, mask images, and synthetic shapes."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixmim.data.dataset import BadImage
from pixmim.data.label_table import open_csv
from pixmim.data.synthetic import SyntheticShapes
from pixmim.evaluation.box_formats import read_boxes
from pixmim.evaluation.mask_files import MASK_FOLDERS, MASK_SUFFIXES, find_masks, read_mask
from pixmim.utils.errors import UserError
from pixmim.utils.files import read_file, readable
from pixmim.utils.memory import free_memory
from pixmim.utils.process import killable

Box = tuple[float, float, float, float]  # (left, top, right, bottom) in pixels

BinaryMask = npt.NDArray[np.bool_]

_CSV_COLUMNS = ("width", "height", "x", "y", "w", "h")
_MAX_BYTES = 2**32  # of a file of annotations
_MAX_SIDE = 2**20  # of an image, in pixels
_MAX_BROKEN = 1 / 4  # of a COCO file's annotations
_MAX_COVERED = 0.99  # of the pixels of all masks: above, they are images


@dataclass(frozen=True)
class ImageObject:
    """One object of an image, for object coverage."""

    image: str
    size: tuple[int, int]  # (h, w) of the image in pixels
    box: Box  # box inside the image
    mask: BinaryMask | None = None  # pixels of the object (h w), if they are known; the box is then the box around them


def read_objects(spec: str) -> tuple[list[ImageObject], "Problems"]:
    """Read all objects, boxes clipped to their image, and the problems of those that are not used or changed.

    `spec` is a .csv file with the columns width, height, x, y, w, h (corner and size of the box in pixels), and `image`
    if an image has several boxes; a COCO .json file, whose crowds are ignored; a dataset in the layout of VOC or YOLO
    (`box_formats`); a folder of masks, of images/ and masks/, or of images with masks beside them (`mask_files`), in
    each of which all nonzero pixels are one object; or shapes:. Raises UserError, naming the line or entry.
    """
    path, boxes, problems = Path(spec).expanduser(), None, Problems()
    if spec.startswith("shapes:"):
        shapes = SyntheticShapes.from_spec(spec)
        samples = ((shapes.path_of(i), shapes.sample(i)) for i in range(len(shapes)))
        objects = [_masked_object(name, sample.box, sample.mask) for name, sample in samples]
    elif path.is_file() and path.suffix.lower() == ".csv":
        objects = list(_read_csv(path, problems))
    elif (path.is_file() and path.suffix.lower() == ".json") or (boxes := read_boxes(path)) is not None:
        coco = read_coco(path, content=boxes[0]) if boxes else read_coco(path)
        used = [(coco.images[each.image], each.box) for each in coco.objects if boxes or not each.crowd]
        objects, problems = [ImageObject(image.name, image.size, box) for image, box in used], coco.problems
    elif path.is_dir():
        objects = list(_read_masks(path, problems))
    else:
        raise UserError(f"{spec} is not a .csv, a COCO .json, VOC's or YOLO's boxes, a folder of masks, or shapes:")
    if not objects:
        raise UserError("\n".join(filter(None, (f"{spec} has no object inside its images", str(problems)))))
    return objects, problems


def _clip(xywh: Sequence[float], width: float, height: float) -> Box | None:
    """Return the part of a box that is inside its image; None if nothing is left."""
    x, y, w, h = xywh
    box = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
    return None if box[0] >= box[2] or box[1] >= box[3] else box


def _read_csv(path: Path, problems: "Problems") -> Iterator[ImageObject]:
    (header, rows), needed = open_csv(path), ", ".join(_CSV_COLUMNS)
    missing = [name for name in _CSV_COLUMNS if name not in header]
    if missing:
        raise UserError(f"{path} lacks the columns {', '.join(missing)}; needed: {needed}[, image]")
    named = header.index("image") if "image" in header else 0
    for line, (*numbers, image) in enumerate(rows([*map(header.index, _CSV_COLUMNS), named]), 2):
        where = f"{path}, line {line}"
        try:
            width, height, *xywh = map(float, numbers)
        except ValueError:
            raise UserError(f"{where}: six numbers are needed: {needed}") from None
        if not all(np.isfinite([width, height, *xywh])):
            raise UserError(f"{where}: the size or the box is not finite")
        if not (1 <= width <= _MAX_SIDE and 1 <= height <= _MAX_SIDE):
            raise UserError(f"{where}: invalid image size {width:g}x{height:g}")
        if min(xywh[2:]) < 0:
            raise UserError(f"{where}: invalid box size {xywh[2]:g}x{xywh[3]:g}")
        box, size = _clip(xywh, width, height), (round(height), round(width))
        if box is None:
            problems.add("boxes are outside their image or empty", f"line {line}")
        else:
            yield ImageObject((image if "image" in header else "") or f"line {line}", size, box)


def _read_masks(path: Path, problems: "Problems") -> Iterator[ImageObject]:
    masks = next((path / name for name in MASK_FOLDERS if (path / name).is_dir()), None)
    where = masks if masks is not None and (path / "images").is_dir() else path
    files = [(file, file) for file in sorted(where.rglob("*")) if file.suffix.lower() in MASK_SUFFIXES]
    if files and where == path and (beside := find_masks(path)) is not None:
        files = [(path / mask, path / image) for image, masks in beside.masks.items() for mask in masks]
    if not files:
        raise UserError(
            f"{path} contains neither VOC .xml files, YOLO labels nor masks, which are PNG, TIFF, BMP, GIF or PGM: "
            "JPEG changes values at the edges"
        )
    budget, covered, pixels = (free_memory() or 2**62) // 2, 0, 0
    for file, image in files:
        try:
            mask = read_mask(file, color=True) != 0
        except BadImage as error:
            raise UserError(str(error)) from error
        budget -= mask.nbytes
        if budget < 0:
            raise UserError(f"the masks in {path} take more than half of the free memory: split the folder")
        covered, pixels = covered + int(mask.sum()), pixels + mask.size
        name, box = str(image.relative_to(path)), bounding_box(mask)
        if box is None:
            problems.add("masks have no pixel", name)
        else:
            yield _masked_object(name, box, mask)
    if covered > _MAX_COVERED * pixels:
        raise UserError(
            f"the masks in {path} have no background, which is 0: {100 * covered / pixels:.1f} % of their pixels are "
            "objects. If they are images, pass a folder with images/ and masks/, or the masks alone"
        )


def _masked_object(image: str, box: Box, mask: BinaryMask) -> ImageObject:
    return ImageObject(image, (mask.shape[0], mask.shape[1]), box, mask)


def bounding_box(mask: BinaryMask) -> tuple[int, int, int, int] | None:
    """Return the bounding box of a mask, right and bottom exclusive; None for an empty mask."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)).tolist() for axis in (1, 0))
    return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if rows else None


class Problems:
    """Count problems of annotations by kind, with the first example and the consequence.

    `broken` annotations are certainly wrong, unlike a box that extends beyond its image; those `left_out` are not used.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[int, str, str]] = {}
        self.broken = self.left_out = 0

    def add(self, kind: str, example: object, consequence: str = "left out", *, broken: bool = False) -> None:
        self.broken += broken
        self.left_out += consequence == "left out"
        count, first, _ = self._kinds.get(kind, (0, str(example)[:60], ""))
        self._kinds[kind] = count + 1, first, consequence

    def __str__(self) -> str:
        return "\n".join(
            f"{count:,} {kind}: {consequence} (the first is {first})"
            for kind, (count, first, consequence) in self._kinds.items()
        )


@dataclass(frozen=True)
class CocoImage:
    """An image of a COCO file. size: (h, w) in pixels."""

    name: str
    size: tuple[int, int]


@dataclass(frozen=True)
class CocoObject:
    """A usable annotation of a COCO file."""

    name: str  # name in messages
    image: int  # index of its image
    box: Box  # box, clipped to the image
    label: int  # index of its class
    crowd: bool  # True for a region of many objects
    area: float  # square pixels, as the file states them
    mask: Any = None  # result of `read_mask`


@dataclass(frozen=True)
class CocoFile:
    """The contents of a COCO file, objects in the order of the file."""

    images: list[CocoImage]
    classes: list[str]
    objects: list[CocoObject] = field(default_factory=list)
    problems: Problems = field(default_factory=Problems)


ReadMask = Callable[[Any, tuple[int, int]], tuple[Any, str]]
"""Function of a segmentation and its image's (h, w) that returns a mask or None, and the kind of problem, or ""."""


def read_coco(file: Path, read_mask: ReadMask | None = None, content: dict[str, Any] | None = None) -> CocoFile:
    """Read and check a file in COCO's format; annotations that cannot be used are left out and counted in `problems`.

    Without `read_mask`, categories and masks are not read. `content` is what the file holds, if it was read from
    another format. Raises UserError for another format, or if more than a quarter of the annotations are broken.
    """
    content, problems = _read_json(file) if content is None else content, Problems()
    classes, label_of = _read_categories(file, content, problems) if read_mask else ([], {})
    images = _read_images(file, content, problems)
    coco = CocoFile(list(images.values()), classes, problems=problems)
    index_of = {key: index for index, key in enumerate(images)}
    annotations = content.get("annotations")
    if not isinstance(annotations, list):
        raise UserError(f"{file} is not a COCO file: it lacks 'annotations'")
    ids, seen = set[str](), dict[tuple[Any, ...], CocoObject]()
    for number, entry in enumerate(annotations):
        name = f"annotation {entry.get('id', number)}" if isinstance(entry, dict) else f"number {number}"
        reason = _broken(entry, index_of, label_of if read_mask else None)
        if reason:
            problems.add(reason, name, broken=True)
            continue
        if "id" in entry:
            if repr(entry["id"]) in ids:
                problems.add("annotations have the id of another one", name, "all are used")
            ids.add(repr(entry["id"]))
        index = index_of[entry["image_id"]]
        label = label_of[entry["category_id"]] if read_mask else 0
        obj = _read_annotation(entry, name, index, label, coco, read_mask)
        if obj is None:
            continue
        if read_mask:
            first = seen.setdefault((index, obj.box, obj.label), obj)
            if first is not obj and (first.mask, first.crowd) == (obj.mask, obj.crowd):
                problems.add("objects are listed twice", name, "the second is left out")
                continue
            if obj.crowd:
                problems.add("objects are crowds", name, "neither learned nor measured")
        coco.objects.append(obj)
    if problems.broken > _MAX_BROKEN * len(annotations):
        raise UserError(f"{file}: more than a quarter of its {len(annotations):,} annotations are broken:\n{problems}")
    return coco


def _read_json(file: Path) -> dict[str, Any]:
    with readable(file):
        data = read_file(file, _MAX_BYTES)
    try:
        with killable():
            content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a COCO file: it is not an object with images, annotations and categories")
    return content


def _read_categories(file: Path, content: dict[str, Any], problems: Problems) -> tuple[list[str], dict[Any, int]]:
    """Return the class names, and the class index of each category id."""
    entries = _read_entries(file, content, "categories", {"id": _is_key, "name": _is_text})
    index_of, label_of = dict[str, int](), dict[Any, int]()
    for entry in sorted(entries, key=lambda entry: (isinstance(entry["id"], str), entry["id"])):
        key, name = entry["id"], entry["name"]
        if key in label_of and index_of.get(name) != label_of[key]:
            other = list(index_of)[label_of[key]]
            raise UserError(f"{file}: two categories have the id {key}: '{other}' and '{name}'")
        if name in index_of and key not in label_of:
            problems.add("categories have the name of another one", f"{key}, '{name}'", "merged into one class")
        label_of[key] = index_of.setdefault(name, len(index_of))
    return list(index_of), label_of


def _read_images(file: Path, content: dict[str, Any], problems: Problems) -> dict[Any, CocoImage]:
    """Return the images by id."""
    keys = {"id": _is_key, "file_name": _is_text, "height": _is_side, "width": _is_side}
    images, names = dict[Any, CocoImage](), set[str]()
    for entry in _read_entries(file, content, "images", keys):
        key, name = entry["id"], entry["file_name"]
        if key in images:
            if images[key].name != name:
                raise UserError(f"{file}: two images have the id {key}: {images[key].name} and {name}")
            problems.add("images are listed twice", name, "used once")
            continue
        if name in names:
            problems.add("images have the file of another one", name, "each is used")
        images[key] = CocoImage(name, (int(entry["height"]), int(entry["width"])))
        names.add(name)
    return images


def _read_entries(
    file: Path, content: dict[str, Any], kind: str, keys: Mapping[str, Callable[[Any], bool]]
) -> list[dict[str, Any]]:
    """Return the entries of one list of the file. Raises UserError if one lacks a key or has a wrong value."""
    entries = content.get(kind)
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{file} is not a COCO file: it lists no {kind}")
    for number, entry in enumerate(entries):
        for key, is_valid in keys.items():
            if not isinstance(entry, dict) or key not in entry:
                raise UserError(f"{file}: number {number} of its {kind} lacks '{key}'")
            if not is_valid(entry[key]):
                raise UserError(f"{file}: number {number} of its {kind} has the {key} {str(entry[key])[:60]}")
    return entries


def _broken(entry: Any, index_of: Mapping[Any, int], label_of: Mapping[Any, int] | None) -> str:
    """Return the kind of problem that makes an annotation unusable; empty for a usable one."""
    if not isinstance(entry, dict):
        return "annotations are not JSON objects"
    for key, known in (("image_id", index_of), ("category_id", label_of)):
        if known is not None and (not _is_key(entry.get(key)) or entry[key] not in known):
            return f"annotations have no {key} that the file lists"
    box = entry.get("bbox")
    if box is None and entry.get("unreadable"):
        return "objects are in images that cannot be read"
    if not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box))):
        return "annotations have a bbox that is not four numbers"
    return ""


def _read_annotation(
    entry: dict[str, Any], name: str, index: int, label: int, coco: CocoFile, read_mask: ReadMask | None
) -> CocoObject | None:
    """Return an annotation as an object; None if its box is outside its image."""
    size, problems, (x, y, w, h) = coco.images[index].size, coco.problems, entry["bbox"]
    height, width = size
    box = _clip(entry["bbox"], float(width), float(height))
    if box is None and min(w, h) > 0:
        problems.add("boxes are outside their image", name, broken=True)
    elif box is None:
        problems.add("boxes are empty", name)
    if box is None:
        return None
    if x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:  # otherwise a rounding error
        problems.add("boxes extend beyond their image", name, "clipped")
    area = entry.get("area")
    if area is not None and not (is_number(area) and area >= 0):
        problems.add("areas are not numbers from 0", name, "the area of the box is used", broken=True)
        area = None
    mask, reason = read_mask(entry.get("segmentation"), size) if read_mask else (None, "")
    if reason:
        problems.add(reason, name, "a part is ignored" if mask else "no mask", broken=True)
    box_area = (box[2] - box[0]) * (box[3] - box[1])
    return CocoObject(name, index, box, label, bool(entry.get("iscrowd")), box_area if area is None else area, mask)


def is_number(value: Any) -> bool:
    """Return True for a finite JSON number below 2**63."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_key(value: Any) -> bool:
    return isinstance(value, str) or is_number(value)


def _is_side(value: Any) -> bool:
    return is_number(value) and 1 <= value <= _MAX_SIDE
