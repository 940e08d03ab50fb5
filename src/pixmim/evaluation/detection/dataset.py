"""Images with boxes, and masks where they have any: COCO files, or synthetic shapes."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixmim.data.dataset import ImageDataset, ImageSpec
from pixmim.data.image_folder import ImageFolder, check_inside
from pixmim.data.synthetic import SHAPES, SyntheticShapes
from pixmim.evaluation.annotations import CocoFile, CocoObject, read_coco
from pixmim.evaluation.detection.masks import Segmentation, check_segmentation
from pixmim.utils.errors import UserError


@dataclass(frozen=True)
class Objects:
    """The k objects of an image.

    Attributes:
        boxes: float32 (k 4): left, top, right, bottom in pixels.
        labels: int64 (k): class indices.
        crowd: bool (k): True for a region of many objects, which is neither learned nor has to be found.
        areas: float64 (k) in square pixels, as COCO states them.
        masks: k segmentations, None for an object without a usable one; or an empty list.
    """

    boxes: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    crowd: npt.NDArray[np.bool_]
    areas: npt.NDArray[np.float64]
    masks: list[Segmentation | None]


@dataclass(frozen=True)
class Annotated:
    """A dataset of images with objects.

    Attributes:
        images: The images.
        sizes: (h, w) of each image that its boxes were made for; None if any size is right.
        objects: Returns the objects of the image with an index.
        classes: Names of the classes.
        counts: Objects of each class, without crowds.
        unmasked: Names of the objects without a usable mask.
        about: Problems of the file and their consequences, in lines.
    """

    images: ImageDataset
    sizes: list[tuple[int, int]] | None
    objects: Callable[[int], Objects]
    classes: list[str]
    counts: list[int]
    unmasked: list[Any]
    about: str = ""

    @property
    def masks(self) -> bool:
        """True if every object has a mask."""
        return not self.unmasked and sum(self.counts) > 0


def open_annotated(spec: str, folder: str, form: ImageSpec, flag: str = "--train-images") -> Annotated:
    """Open a COCO file, or `shapes:`. The whole file is checked here.

    Args:
        spec: The JSON file, or shapes:.
        folder: Folder of the images. If empty: ROOT/NAME for ROOT/annotations/instances_NAME.json, otherwise the
            folder of the file.
        form: Channels and dtype of the images.
        flag: The flag that names `folder`, for messages.

    Raises:
        UserError: If the file or its images cannot be used.
    """
    if spec.startswith("shapes:"):
        return _open_shapes(SyntheticShapes.from_spec(spec, form))
    file = Path(os.path.expanduser(spec))
    if folder:
        root = Path(os.path.expanduser(folder))
    elif file.parent.name == "annotations" and file.stem.startswith("instances_"):
        root = file.parent.parent / file.stem.removeprefix("instances_")
    else:
        root = file.parent
    if file.is_file() and not root.is_dir():
        raise UserError(f"there is no folder {root} with the images of {file}: name it with {flag} FOLDER")
    coco = read_coco(file, check_segmentation)
    _check_files(coco, file, root, flag)
    objects: list[list[CocoObject]] = [[] for _ in coco.images]
    for one in coco.objects:
        objects[one.image].append(one)
    true = [one for one in coco.objects if not one.crowd]
    return Annotated(
        ImageFolder(spec, root, [image.name for image in coco.images], form),
        [image.size for image in coco.images],
        [_to_arrays(group) for group in objects].__getitem__,
        coco.classes,
        np.bincount([one.label for one in true], minlength=len(coco.classes)).tolist(),
        [one.name for one in true if one.mask is None],
        str(coco.problems),
    )


def rectangle(box: Sequence[float]) -> list[list[float]]:
    """Return a box as a polygon, for a crowd without a mask."""
    left, top, right, bottom = box
    return [[left, top, right, top, right, bottom, left, bottom]]


def _open_shapes(shapes: SyntheticShapes) -> Annotated:
    def objects(index: int) -> Objects:
        sample = shapes.sample(index)
        area = float(sample.mask.sum())
        return _to_arrays([CocoObject("", index, sample.box, sample.shape, False, area, sample.mask)])

    counts = np.bincount(shapes.labels, minlength=len(SHAPES)).tolist()
    return Annotated(shapes, None, objects, list(SHAPES), counts, [])


def _to_arrays(objects: Sequence[CocoObject]) -> Objects:
    return Objects(
        np.asarray([one.box for one in objects], np.float32).reshape(-1, 4),
        np.asarray([one.label for one in objects], np.int64),
        np.asarray([one.crowd for one in objects], bool),
        np.asarray([one.area for one in objects], np.float64),
        [rectangle(one.box) if one.crowd and one.mask is None else one.mask for one in objects],
    )


def _check_files(coco: CocoFile, file: Path, root: Path, flag: str) -> None:
    """Raise UserError if images are outside of the folder, or more than a quarter of them are missing."""
    names = [image.name for image in coco.images]
    check_inside(names, [root], str(file), len(names), f"name the folder that holds them all as {flag}")
    missing = [name for name in names if not os.path.isfile(root / name)]
    if len(missing) > len(names) / 4:
        raise UserError(
            f"{len(missing):,} of the {len(names):,} images of {file} are not in {root}, such as {missing[0]}: name "
            f"their folder with {flag} FOLDER"
        )
    for name in missing:
        coco.problems.add(f"images are not in {root}", name)
