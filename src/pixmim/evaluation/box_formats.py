"""Read boxes of PASCAL VOC and YOLO as the content of a COCO file, whose checks then apply to them.

VOC    a folder with Annotations/*.xml and JPEGImages/; a list of it, ImageSets/Main/train.txt; or a folder of .xml.
       Corners count from 1 and are inclusive. Difficult objects become crowds. A size that is missing or 0, as some
       programs write it, is that of the image.
YOLO   a folder with images/ and labels/*.txt; a folder below images/, as in images/train; a folder of images with a
       .txt next to each; or a data.yaml. Lines are `class cx cy w h`, or `class x y x y x y ...` for a polygon, in
       shares of the image's width and height. Key points after a box, which `kpt_shape` in data.yaml declares, are
       ignored.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from pixmim.data.dataset import BadImage
from pixmim.data.decode.headers import JPEG_MAGIC, exif_orientation, read_jpeg_header
from pixmim.data.decode.image import open_image, read
from pixmim.data.decode.limits import max_bytes
from pixmim.data.image_folder import EXTENSIONS, check_inside, from_folder
from pixmim.utils.console import status_counter
from pixmim.utils.errors import UserError, first_line, shown
from pixmim.utils.files import open_regular, read_file, read_text, readable
from pixmim.utils.process import killable
from pixmim.utils.threads import ThreadPool, ordered_map

Part = Literal["train", "test"]
Content = dict[str, Any]  # images, annotations and categories, as in COCO's JSON

_MAX_TEXT_BYTES, _MAX_CLASSES = 2**22, 10_000
_NAME_FILES = ("data.yaml", "dataset.yaml", "classes.txt", "obj.names")


def read_boxes(path: Path, part: Part = "train", images: str = "") -> tuple[Content, Path] | None:
    """Read the boxes of a VOC or YOLO dataset, and return them with the folder of the images; None for anything else.

    `images` is the folder of VOC's images: by default JPEGImages/, or that of the .xml files. Of a data.yaml, `part`
    reads its `train`, or its `test` or else `val`. Raises UserError if a file cannot be read or used.
    """
    is_list = path.suffix == ".txt" and path.parent.name == "Main" and path.parent.parent.name == "ImageSets"
    if is_list and path.is_file():
        root = path.parents[2]
        with readable(path):
            names = [line.split()[0] for line in read_text(path).splitlines() if line.strip()]
        files = [root / "Annotations" / f"{name}.xml" for name in names]
        check_inside(map(str, files), [root], str(path), len(files), "an entry is the name of an image")
        return _read_voc(files, Path(images) if images else root / "JPEGImages")
    if path.is_dir() and (files := _find_voc(path)):
        folder = next((f for f in (path / "JPEGImages", path.parent / "JPEGImages") if f.is_dir()), files[0].parent)
        return _read_voc(files, Path(images) if images else folder)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return _read_yolo(_yaml_folder(path, part), path)
    if path.is_dir():
        return _read_yolo(path / "images" if (path / "labels").is_dir() else path, None)
    return None


def _find_voc(path: Path) -> list[Path]:
    """Return the annotations in a folder's Annotations/, or else all below it: not what other programs leave there."""
    files = sorted((path / "Annotations").glob("*.xml"))
    if files:
        return [file for file in files if not file.name.startswith(".")]
    found = (file.relative_to(path) for file in sorted(path.rglob("*.xml")))
    shown = [path / file for file in found if not any(part.startswith(".") for part in file.parts)]
    return [file for file in shown if not file.name.endswith(".aux.xml") and _is_annotation(file)]


def _is_annotation(file: Path) -> bool:
    """Return True if XML begins like VOC's."""
    with suppress(OSError), open(open_regular(file), "rb") as content:
        return b"<annotation" in content.read(4096).replace(b"\0", b"")  # also finds UTF-16
    return False


def _read_voc(files: list[Path], folder: Path) -> tuple[Content, Path]:
    names_in_folder = sorted(os.listdir(folder)) if folder.is_dir() else []
    by_stem = {
        stem: stem + suffix for stem, suffix in map(os.path.splitext, names_in_folder) if suffix.lower() in EXTENSIONS
    }
    images, annotations, names = list[Content](), list[Content](), set[str]()
    for number, file in enumerate(files):
        size, filename, objects = _parse_voc(file)
        name = next((name for name in (filename, by_stem.get(file.stem, "")) if (folder / name).is_file()), filename)
        known = size if min(size) > 0 else _size_of(str(folder / name))
        height, width = known or (1, 1)
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for entry in objects:
            names.add(entry["category_id"])
            entry |= {} if known else {"bbox": None, "unreadable": True}
            annotations.append({"id": f"{len(annotations)} ({file.name})", "image_id": number, **entry})
    categories = [{"id": name, "name": name} for name in sorted(names)]
    return {"images": images, "annotations": annotations, "categories": categories}, folder


def _parse_voc(file: Path) -> tuple[tuple[float, float], str, list[Content]]:
    """Return (h w), the name of the image, and its objects. Raises UserError."""
    with readable(file):
        text = read_file(file, _MAX_TEXT_BYTES)
    plain = text.replace(b"\0", b"")  # also finds UTF-16
    if b"<!ENTITY" in plain or b"<!DOCTYPE" in plain:  # entities expand to any length, or name other files
        raise UserError(f"{file} is refused: it defines entities or a document type, which VOC annotations do not need")
    try:
        with killable():
            root = ElementTree.fromstring(text)
        height, width = (float(root.findtext(f"size/{side}") or 0) for side in ("height", "width"))
        objects = []
        for each in root.iterfind("object"):
            box = each.find("bndbox")
            if box is None:
                continue
            left, top, right, bottom = (float(box.findtext(side, "")) for side in ("xmin", "ymin", "xmax", "ymax"))
            entry = {"bbox": [left - 1, top - 1, right - left + 1, bottom - top + 1]}
            name, difficult = each.findtext("name", "").strip() or "object", each.findtext("difficult", "0").strip()
            objects.append(entry | {"category_id": name, "iscrowd": int(difficult == "1")})
        if not objects and root.find("size") is None:
            raise ValueError("it has neither")
    except (ElementTree.ParseError, ValueError, LookupError, OverflowError, RecursionError) as error:
        raise UserError(f"{file} is not a VOC annotation with a size and boxes: {error}") from error
    return (height, width), os.path.basename(root.findtext("filename", "").replace("\\", "/")) or file.stem, objects


def _load_yaml(file: Path) -> Content:
    from yaml import YAMLError, safe_load  # a dependency of timm; builds plain data only

    try:
        with killable():
            content = safe_load(read_text(file, _MAX_TEXT_BYTES))
    except (OSError, YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}") from None
    return content if isinstance(content, dict) else {}


def _yaml_folder(file: Path, part: Part) -> Path:
    """Return the folder of images that a data.yaml names for a part. Raises UserError."""
    content = _load_yaml(file)
    keys = ("train",) if part == "train" else ("test", "val")
    key = next((key for key in keys if content.get(key)), "")
    value = content.get(key)
    if not isinstance(value, str):
        raise UserError(f"{file} has no folder of images as {' or '.join(keys)}: pass the folder itself")
    base = str(content.get("path") or "")
    value = value.removeprefix("../")  # as some tools write it, although it is next to the file
    choices = [file.parent / value, file.parent / base / value]
    folder = next((choice for choice in choices if choice.is_dir()), choices[0])
    check_inside([str(folder)], [file.parent], str(file), 1, "pass the folder itself")
    if not folder.is_dir():
        raise UserError(f"{file} names {shown(value)} as {key}, which is not a folder: pass the folder itself")
    return folder


def _read_yolo(folder: Path, yaml_file: Path | None) -> tuple[Content, Path] | None:
    """Read the labels of the images in a folder; None if no image has any."""
    label_of = _label_finder(folder)
    if next(label_of("x").parent.rglob("*.txt"), None) is None:
        return None
    files = from_folder(folder)
    paths = [os.path.relpath(files.path_of(i), folder) for i in range(len(files))]
    if not any(label_of(path).is_file() for path in paths):
        return None
    images, annotations = list[Content](), list[Content]()
    names, keypoints = _yolo_names(folder, yaml_file)
    with status_counter(f"reading the labels of {folder}", "images") as add, ThreadPool(0, "pixmim-read") as pool:
        for path, size in zip(
            paths, ordered_map(pool, _size_of, map(files.path_of, range(len(files))), 64), strict=True
        ):
            height, width = size or (1, 1)
            images.append({"id": path, "file_name": path, "height": height, "width": width})
            for entry in _parse_yolo(label_of(path), height, width, keypoints):
                entry |= {} if size else {"bbox": None, "unreadable": True}
                annotations.append({"id": f"{len(annotations)} ({path})", "image_id": path, **entry})
            add(1)
    used = [entry["category_id"] for entry in annotations if isinstance(entry["category_id"], int)]
    names = names or [f"class {i}" for i in range(min(max(used, default=-1) + 1, _MAX_CLASSES))]
    categories = [{"id": number, "name": name} for number, name in enumerate(names)]
    return {"images": images, "annotations": annotations, "categories": categories}, folder


def _label_finder(folder: Path) -> Callable[[str], Path]:
    """Return a function from an image's path below the folder to its file of labels."""
    parts = list(folder.absolute().parts)
    if "images" in parts:
        parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    base = Path(*parts) if Path(*parts).is_dir() else folder
    return lambda path: (base / path).with_suffix(".txt")


def _size_of(path: str) -> tuple[int, int] | None:
    """Return (h w) of an image as it is decoded; None if it cannot be read."""
    try:
        data = read_file(path, max_bytes())
        if data.startswith(JPEG_MAGIC):
            header = read_jpeg_header(data)
            return (header.width, header.height) if header.orientation >= 5 else (header.height, header.width)
        try:
            with open_image(data) as image:
                turned = exif_orientation(image.info.get("exif", b"")) >= 5
                return image.size if turned else (image.size[1], image.size[0])
        except BadImage:  # not one of Pillow's formats
            height, width, _ = read(data).shape
            return height, width
    except (OSError, BadImage):
        return None


def _parse_yolo(file: Path, height: int, width: int, keypoints: bool) -> Iterator[Content]:
    """Yield the objects of an image; an object that cannot be read has no box. Raises UserError."""
    lines = list[str]()
    with readable(file), suppress(FileNotFoundError):  # an image without objects has no file
        lines = read_text(file).splitlines()
    for words in filter(None, map(str.split, lines)):
        try:
            number, *values = map(float, words)
        except ValueError:
            number, values = -1.0, []
        entry: Content = {"category_id": int(number) if number.is_integer() else None, "bbox": None}
        if len(values) == 4 or (keypoints and len(values) > 4):
            x, y, w, h = values[:4]
            entry["bbox"] = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
        elif len(values) >= 6 and len(values) % 2 == 0:
            xs, ys = [x * width for x in values[::2]], [y * height for y in values[1::2]]
            entry["bbox"] = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
            entry["area"] = abs(sum(xs[i - 1] * y - ys[i - 1] * xs[i] for i, y in enumerate(ys))) / 2
            entry["segmentation"] = [[value for corner in zip(xs, ys, strict=True) for value in corner]]
        yield entry


def _yolo_names(folder: Path, yaml_file: Path | None) -> tuple[list[str], bool]:
    """Return the names of the classes, and whether boxes have key points.

    Both are from a file in the folder or up to two above it; without one, there are no names.
    """
    places = [place / name for place in (folder, *folder.absolute().parents[:2]) for name in _NAME_FILES]
    file = yaml_file or next((place for place in places if place.is_file()), None)
    if file is None:
        return [], False
    if file.suffix not in (".yaml", ".yml"):
        return [line.strip() for line in read_text(file, _MAX_TEXT_BYTES).splitlines() if line.strip()], False
    content = _load_yaml(file)
    names = content.get("names")
    if isinstance(names, dict) and all(isinstance(key, int) and 0 <= key < _MAX_CLASSES for key in names):
        names = [names.get(i, f"class {i}") for i in range(max(names, default=-1) + 1)]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{file} has no list of class names as `names`")
    return names, "kpt_shape" in content
