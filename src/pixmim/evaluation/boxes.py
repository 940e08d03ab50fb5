"""Where objects lie in images, from whatever says so: a table, COCO or VOC annotations, masks, or drawn shapes."""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

from pixmim.data.dataset import BadImage
from pixmim.data.decode.image import read_numbers
from pixmim.data.decode.limits import max_bytes
from pixmim.data.image_folder import EXTENSIONS
from pixmim.data.synthetic import Shapes
from pixmim.utils.available_memory import free_memory
from pixmim.utils.errors import UserError
from pixmim.utils.files import parse_json, read_file, read_text
from pixmim.utils.process import killable

_COLUMNS = ("width", "height", "x", "y", "w", "h")
_MAX_BYTES = 2**30  # of a file of annotations
_MAX_SIDE = 2**20  # of an image, in pixels


@dataclass(frozen=True)
class Object:
    """One object of an image.

    image  the image's name
    size   (h, w) of the image in pixels
    box    (left, top, right, bottom) in pixels, inside the image
    mask   bool (h w), where its pixels are known; the box then goes around it
    """

    image: str
    size: tuple[int, int]
    box: tuple[float, float, float, float]
    mask: npt.NDArray[np.bool_] | None = None


def read_objects(spec: str) -> tuple[list[Object], int]:
    """All objects that `spec` tells of, and how many were left out because nothing of them lies in their image.

    .csv      columns width, height, x, y, w, h (the box's corner and size, pixels), and image where several boxes are
              of one image; without it each line is an image
    .json     COCO's: images and annotations; crowds are no objects
    a folder  of VOC's .xml, whose corners count from 1 and are inclusive; or of masks, pictures in which all that is
              not 0 is one object
    shapes:   with its masks

    A box that reaches beyond its image is cut to it. Raises UserError for what cannot be read, naming the place.
    """
    path = Path(spec).expanduser()
    if spec.startswith("shapes:"):
        return list(_shapes(spec)), 0
    if path.is_dir():
        found = list(_folder(path))
    elif path.is_file() and path.suffix.lower() == ".csv":
        found = list(_csv(path))
    elif path.is_file() and path.suffix.lower() == ".json":
        found = list(_coco(path))
    else:
        raise UserError(f"{spec} is no .csv, COCO .json, folder of VOC .xml or of masks, and not shapes:")
    whole = [each for each in found if each is not None]
    if not whole:
        raise UserError(f"{spec} tells of no object")
    return whole, len(found) - len(whole)


def _cut(
    image: str, size: tuple[float, float], corner: tuple[float, float], extent: tuple[float, float], where: str
) -> Object | None:
    """An object with its box cut to the image; None if nothing is left of it. All pairs are (x, y)."""
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
    return Object(image, (round(height), round(width)), box)


def _csv(path: Path) -> Iterator[Object | None]:
    rows = csv.DictReader(io.StringIO(_text(path), newline=""))
    try:
        lacks = [name for name in _COLUMNS if name not in (rows.fieldnames or ())]
        if lacks:
            raise UserError(f"{path} lacks the columns {', '.join(lacks)}; needed: {', '.join(_COLUMNS)}[, image]")
        for line, row in enumerate(rows, 2):
            where = f"{path}, line {line}"
            try:
                width, height, x, y, w, h = (float(row[name]) for name in _COLUMNS)
            except (TypeError, ValueError):
                raise UserError(f"{where}: six numbers are needed: {', '.join(_COLUMNS)}") from None
            yield _cut(row.get("image") or f"line {line}", (width, height), (x, y), (w, h), where)
    except csv.Error as error:
        raise UserError(f"{path} is not a CSV file: {error}") from error


def _text(path: Path) -> str:
    try:
        return read_text(path, _MAX_BYTES)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _coco(path: Path) -> Iterator[Object | None]:
    try:
        content: dict[str, Any] = parse_json(_text(path), str(path))
        images = {each["id"]: each for each in content["images"]}
        for each in content["annotations"]:
            if not each.get("iscrowd"):
                image, (x, y, w, h) = images[each["image_id"]], map(float, each["bbox"])
                where, name = f"{path}, annotation {each.get('id')}", str(image.get("file_name", image["id"]))
                yield _cut(name, (image["width"], image["height"]), (x, y), (w, h), where)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} is no COCO file of images and annotations with boxes: {error!r}") from error


def _folder(path: Path) -> Iterator[Object | None]:
    notes = sorted(path.rglob("*.xml"))
    if notes:
        for note in notes:
            yield from _voc(note)
        return
    masks = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in EXTENSIONS]
    if not masks:
        raise UserError(f"{path} holds neither VOC's .xml nor masks")
    left = (free_memory() or 2**62) // 2
    for file in masks:
        try:
            mask = read_numbers(read_file(file, max_bytes()), colour=True) != 0
        except (OSError, BadImage) as error:
            raise UserError(f"the mask {file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
        left -= mask.nbytes
        if left < 0:
            raise UserError(f"the masks in {path} take more than half of the memory: measure them in parts")
        yield _masked(str(file.relative_to(path)), mask)


def _voc(note: Path) -> Iterator[Object | None]:
    try:
        text = read_file(note)
    except OSError as error:
        raise UserError(f"{note} cannot be read: {error.strerror}") from error
    if b"<!ENTITY" in text.replace(b"\0", b""):  # in UTF-16 as well; entities expand to any length
        raise UserError(f"{note} is refused: it defines entities, which VOC annotations do not need")
    try:
        with killable():
            root = ElementTree.fromstring(text)
        width, height = (float(root.findtext(f"size/{side}", "")) for side in ("width", "height"))
        for box in root.iterfind("object/bndbox"):
            left, top, right, bottom = (float(box.findtext(side, "")) for side in ("xmin", "ymin", "xmax", "ymax"))
            extent = right - left + 1, bottom - top + 1
            yield _cut(root.findtext("filename", note.stem), (width, height), (left - 1, top - 1), extent, str(note))
    except (ElementTree.ParseError, ValueError, LookupError, OverflowError, RecursionError) as error:
        raise UserError(f"{note} is no VOC annotation with a size and boxes: {error}") from error


def _shapes(spec: str) -> Iterator[Object]:
    data = Shapes.from_spec(spec)
    for index in range(len(data)):
        found = _masked(data.locate(index), data.sample(index).mask)
        if found is not None:
            yield found


def _masked(image: str, mask: npt.NDArray[np.bool_]) -> Object | None:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    box = float(columns[0]), float(rows[0]), columns[-1] + 1.0, rows[-1] + 1.0
    return Object(image, (mask.shape[0], mask.shape[1]), box, mask)
