"""Read object annotations: boxes and masks from CSV, COCO and VOC files, mask images, and synthetic shapes."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from pixmim.data.dataset import BadImage
from pixmim.data.decode.image import read_numbers
from pixmim.data.decode.limits import max_bytes
from pixmim.data.image_folder import EXTENSIONS
from pixmim.data.synthetic import SyntheticShapes
from pixmim.utils.errors import UserError
from pixmim.utils.files import read_file, read_text
from pixmim.utils.memory import free_memory
from pixmim.utils.process import killable

Box = tuple[float, float, float, float]
"""(left, top, right, bottom) in pixels."""

Mask = npt.NDArray[np.bool_]

_CSV_COLUMNS = ("width", "height", "x", "y", "w", "h")
_MAX_BYTES = 2**32  # of a file of annotations
_MAX_SIDE = 2**20  # of an image, in pixels
_MAX_BROKEN = 1 / 4  # of a COCO file's annotations


@dataclass(frozen=True)
class ImageObject:
    """One object of an image, for object coverage.

    Attributes:
        image: Name of the image.
        size: (h, w) of the image in pixels.
        box: Box inside the image.
        mask: Pixels of the object (h w), if they are known; the box is then the box around them.
    """

    image: str
    size: tuple[int, int]
    box: Box
    mask: Mask | None = None


def read_objects(spec: str) -> tuple[list[ImageObject], int]:
    """Read all objects that `spec` names; boxes that reach beyond their image are clipped.

    Args:
        spec: One of
            .csv: columns width, height, x, y, w, h (corner and size of the box in pixels), and `image` if several
            boxes are of one image; without that column each line is an image;
            .json: a COCO file; crowds are ignored;
            a folder of VOC .xml files, whose corners count from 1 and are inclusive, or of masks, images in which all
            pixels that are not 0 are one object;
            shapes: with the masks of the shapes.

    Returns:
        The objects, and how many were left out because no part of them is in their image.

    Raises:
        UserError: If the file cannot be read, naming the line or entry.
    """
    path = Path(spec).expanduser()
    if spec.startswith("shapes:"):
        found: list[ImageObject | None] = list(_read_shapes(spec))
    elif path.is_dir():
        found = list(_read_folder(path))
    elif path.is_file() and path.suffix.lower() == ".csv":
        found = list(_read_csv(path))
    elif path.is_file() and path.suffix.lower() == ".json":
        coco = read_coco(path)
        entries = [(coco.images[each.image], each.box) for each in coco.objects if not each.crowd]
        found = [ImageObject(image.name, image.size, box) for image, box in entries]
        found += [None] * coco.problems.ignored_keys
    else:
        raise UserError(f"{spec} is not a .csv, a COCO .json, a folder of VOC .xml or of masks, or shapes:")
    objects = [each for each in found if each is not None]
    if not objects:
        raise UserError(f"{spec} has no object inside its images")
    return objects, len(found) - len(objects)


def _clip(
    image: str, size: tuple[float, float], corner: tuple[float, float], extent: tuple[float, float], where: str
) -> ImageObject | None:
    """Return an object with its box clipped to the image; None if nothing is left. All pairs are (x, y)."""
    (width, height), (x, y), (w, h) = size, corner, extent
    if not all(np.isfinite([width, height, x, y, w, h])):
        raise UserError(f"{where}: a size or a box is not finite")
    if not (1 <= width <= _MAX_SIDE and 1 <= height <= _MAX_SIDE):
        raise UserError(f"{where}: an image of {width:g}x{height:g} pixels")
    if w < 0 or h < 0:
        raise UserError(f"{where}: a box of {w:g}x{h:g} pixels")
    box = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
    if box[0] >= box[2] or box[1] >= box[3]:
        return None
    return ImageObject(image, (round(height), round(width)), box)


def _read_csv(path: Path) -> Iterator[ImageObject | None]:
    try:
        text = read_text(path, _MAX_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    rows, needed = csv.DictReader(io.StringIO(text, newline="")), ", ".join(_CSV_COLUMNS)
    try:
        missing = [name for name in _CSV_COLUMNS if name not in (rows.fieldnames or ())]
        if missing:
            raise UserError(f"{path} lacks the columns {', '.join(missing)}; needed: {needed}[, image]")
        for line, row in enumerate(rows, 2):
            where = f"{path}, line {line}"
            try:
                width, height, x, y, w, h = (float(row[name]) for name in _CSV_COLUMNS)
            except (TypeError, ValueError):
                raise UserError(f"{where}: six numbers are needed: {needed}") from None
            yield _clip(row.get("image") or f"line {line}", (width, height), (x, y), (w, h), where)
    except csv.Error as error:
        raise UserError(f"{path} is not a CSV file: {error}") from error


def _read_folder(path: Path) -> Iterator[ImageObject | None]:
    files = sorted(path.rglob("*.xml"))
    if files:
        for file in files:
            yield from _read_voc(file)
        return
    files = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in EXTENSIONS]
    if not files:
        raise UserError(f"{path} contains neither VOC .xml files nor masks")
    budget = (free_memory() or 2**62) // 2
    for file in files:
        try:
            mask = read_numbers(read_file(file, max_bytes()), color=True) != 0
        except (OSError, BadImage) as error:
            raise UserError(f"the mask {file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
        budget -= mask.nbytes
        if budget < 0:
            raise UserError(f"the masks in {path} take more than half of the free memory: measure them in parts")
        yield _masked_object(str(file.relative_to(path)), mask)


def _read_voc(file: Path) -> Iterator[ImageObject | None]:
    try:
        text = read_file(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    if b"<!ENTITY" in text.replace(b"\0", b""):  # in UTF-16 as well; entities expand to any length
        raise UserError(f"{file} is refused: it defines entities, which VOC annotations do not need")
    try:
        with killable():
            root = ElementTree.fromstring(text)
        width, height = (float(root.findtext(f"size/{side}", "")) for side in ("width", "height"))
        for box in root.iterfind("object/bndbox"):
            left, top, right, bottom = (float(box.findtext(side, "")) for side in ("xmin", "ymin", "xmax", "ymax"))
            extent = right - left + 1, bottom - top + 1
            yield _clip(root.findtext("filename", file.stem), (width, height), (left - 1, top - 1), extent, str(file))
    except (ElementTree.ParseError, ValueError, LookupError, OverflowError, RecursionError) as error:
        raise UserError(f"{file} is not a VOC annotation with a size and boxes: {error}") from error


def _read_shapes(spec: str) -> Iterator[ImageObject | None]:
    shapes = SyntheticShapes.from_spec(spec)
    for index in range(len(shapes)):
        yield _masked_object(shapes.path_of(index), shapes.sample(index).mask)


def _masked_object(image: str, mask: Mask) -> ImageObject | None:
    box = box_around(mask)
    return None if box is None else ImageObject(image, (mask.shape[0], mask.shape[1]), box, mask)


def box_around(mask: Mask) -> tuple[int, int, int, int] | None:
    """Return the box around a mask, right and bottom exclusive; None for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


class Problems:
    """Count what is wrong with annotations: per kind how many, the first one, and the consequence.

    Attributes:
        broken: Annotations that cannot have been meant so, unlike a box that reaches beyond its image.
        left_out: Annotations that are not used.
    """

    def __init__(self) -> None:
        self._kinds: dict[str, tuple[int, str, str]] = {}
        self.broken = self.ignored_keys = 0

    def add(self, kind: str, first: object, consequence: str = "left out", *, broken: bool = False) -> None:
        """Count one problem; the consequence "left out" counts as an annotation that is not used."""
        self.broken += broken
        self.ignored_keys += consequence == "left out"
        count, before, _ = self._kinds.get(kind, (0, str(first)[:60], ""))
        self._kinds[kind] = count + 1, before, consequence

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
    """A usable annotation of a COCO file.

    Attributes:
        name: What messages call it.
        image: Index of its image.
        box: Box, clipped to the image.
        label: Index of its class.
        crowd: True for a region of many objects.
        area: Square pixels, as the file states them.
        mask: What `read_mask` returned.
    """

    name: str
    image: int
    box: Box
    label: int
    crowd: bool
    area: float
    mask: Any = None


@dataclass(frozen=True)
class CocoFile:
    """The contents of a COCO file, objects in the order of the file."""

    images: list[CocoImage]
    classes: list[str]
    objects: list[CocoObject] = field(default_factory=list)
    problems: Problems = field(default_factory=Problems)


ReadMask = Callable[[Any, tuple[int, int]], tuple[Any, str]]
"""From an annotation's segmentation and its image's (h, w): a mask or None, and what is wrong with it."""


def read_coco(file: Path, read_mask: ReadMask | None = None) -> CocoFile:
    """Read and check a file in COCO's format.

    Annotations that cannot be used are left out and counted in `problems`.

    Args:
        file: The JSON file.
        read_mask: Checks masks. Without it, categories and masks are not read.

    Raises:
        UserError: If the file is not in COCO's format, or more than a quarter of its annotations are broken.
    """
    content, problems = _read_json(file), Problems()
    classes, label_of = _read_categories(file, content, problems) if read_mask else ([], {})
    images = _read_images(file, content, problems)
    coco = CocoFile(list(images.values()), classes, problems=problems)
    index_of = {key: index for index, key in enumerate(images)}
    annotations = content.get("annotations")
    if not isinstance(annotations, list):
        raise UserError(f"{file} is not a COCO file: it lacks 'annotations'")
    ids, twins = set[str](), dict[tuple[Any, ...], CocoObject]()
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
        one = _read_annotation(
            entry, name, index, label_of[entry["category_id"]] if read_mask else 0, coco, read_mask or _no_mask
        )
        if one is None:
            continue
        if read_mask:
            twin = twins.setdefault((index, one.box, one.label), one)
            if twin is not one and (twin.mask, twin.crowd) == (one.mask, one.crowd):
                problems.add("objects are listed twice", name, "the second is left out")
                continue
            if one.crowd:
                problems.add("objects are crowds", name, "neither learned nor measured")
        coco.objects.append(one)
    if problems.broken > _MAX_BROKEN * len(annotations):
        raise UserError(f"{file}: more than a quarter of its {len(annotations):,} annotations are broken:\n{problems}")
    return coco


def _no_mask(segmentation: Any, size: tuple[int, int]) -> tuple[None, str]:
    return None, ""


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = read_file(file, _MAX_BYTES)
        with killable():
            content = json.loads(data)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a COCO file: it is not an object with images, annotations and categories")
    return content


def _read_categories(file: Path, content: dict[str, Any], problems: Problems) -> tuple[list[str], dict[Any, int]]:
    """Return the class names, and the class index of each category id."""
    entries = _read_entries(file, content, "categories", {"id": _is_key, "name": _is_text})
    classes, label_of = list[str](), dict[Any, int]()
    for entry in sorted(entries, key=lambda entry: (isinstance(entry["id"], str), entry["id"])):
        key, name = entry["id"], entry["name"]
        if key in label_of and classes[label_of[key]] != name:
            raise UserError(f"{file}: two categories have the id {key}: '{classes[label_of[key]]}' and '{name}'")
        if name in classes and key not in label_of:
            problems.add("categories have the name of another one", f"{key}, '{name}'", "they are one class")
        elif name not in classes:
            classes.append(name)
        label_of[key] = classes.index(name)
    return classes, label_of


def _read_images(file: Path, content: dict[str, Any], problems: Problems) -> dict[Any, CocoImage]:
    """Return the images by id."""
    keys = {"id": _is_key, "file_name": _is_text, "height": _is_side, "width": _is_side}
    images, names = dict[Any, CocoImage](), set[str]()
    for entry in _read_entries(file, content, "images", keys):
        key, name = entry["id"], entry["file_name"]
        if key in images:
            if images[key].name != name:
                raise UserError(f"{file}: two images have the id {key}: {images[key].name} and {name}")
            problems.add("images are listed twice", name, "once is enough")
            continue
        if name in names:
            problems.add("images have the file of another one", name, "each is an image of its own")
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
    """Return why an annotation cannot be used, as the name of a kind; empty if it can."""
    if not isinstance(entry, dict):
        return "annotations are not JSON objects"
    for key, known in (("image_id", index_of), ("category_id", label_of)):
        if known is not None and (not _is_key(entry.get(key)) or entry[key] not in known):
            return f"annotations have a {key} that the file does not list"
    box = entry.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and all(map(is_number, box))):
        return "annotations have a bbox that is not four numbers"
    return ""


def _read_annotation(
    entry: dict[str, Any], name: str, index: int, label: int, coco: CocoFile, read_mask: ReadMask
) -> CocoObject | None:
    """Return an annotation as an object; None if its box is not in its image."""
    size, problems, (x, y, w, h) = coco.images[index].size, coco.problems, entry["bbox"]
    height, width = size
    box = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    if box[2] <= box[0] or box[3] <= box[1]:
        problems.add("boxes are empty, or outside their image", name)
        return None
    if x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:  # less is rounding
        problems.add("boxes reach beyond their image", name, "clipped")
    area = entry.get("area")
    if area is not None and not (is_number(area) and area >= 0):
        problems.add("areas are not numbers from 0", name, "the area of the box is taken", broken=True)
        area = None
    mask, reason = read_mask(entry.get("segmentation"), size)
    if reason:
        problems.add(reason, name, "a part is ignored" if mask else "no mask", broken=True)
    box_area = (box[2] - box[0]) * (box[3] - box[1])
    return CocoObject(name, index, box, label, bool(entry.get("iscrowd")), box_area if area is None else area, mask)


def is_number(value: Any) -> bool:
    """Return True for a JSON number of usual size; NaN is none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63


def _is_key(value: Any) -> bool:
    return isinstance(value, str) or is_number(value)


def _is_side(value: Any) -> bool:
    return is_number(value) and 1 <= value <= _MAX_SIDE


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
