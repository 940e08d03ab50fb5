"""Images with a class for each pixel: folders of images and masks, masks next to images, ADE20K's layout, or shapes.

The mask is the last channel of its image, so loaders and crops treat both together.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from jaxtyping import Shaped

from pixmim.data.dataset import BadImage, DatasetWrapper, ImageDataset, ImageSpec
from pixmim.data.image_folder import ImageFolder, from_folder
from pixmim.data.synthetic import SHAPES, SyntheticShapes
from pixmim.evaluation.mask_files import MASK_FOLDERS, MASK_SUFFIXES, MaskFiles, find_masks, read_mask
from pixmim.transforms.crops import Array
from pixmim.utils.console import status_counter
from pixmim.utils.errors import UserError, did_you_mean
from pixmim.utils.files import read_text, readable
from pixmim.utils.threads import ThreadPool, num_threads, ordered_map

IGNORE = 255  # class index of pixels that do not count
NO_CLASS = 254  # entry of a class table for values that do not belong to a class

SHAPE_CLASSES = ("background", *SHAPES)  # of the masks of `shapes:`

Split = Literal["training", "validation"]
ClassMap = npt.NDArray[np.uint8]

_MAX_NAMES_BYTES = 2**20


@dataclass(frozen=True)
class MaskValues:
    """Values found in mask files."""

    counts: npt.NDArray[np.int64]  # pixels of each value (256)
    solid: npt.NDArray[np.bool_]  # True for values that fill 2 x 2 pixels anywhere (256)

    def __str__(self) -> str:
        values = [v for v in np.argsort(-self.counts, kind="stable") if self.counts[v]]
        listed = ", ".join(f"{v} ({100 * self.counts[v] / self.counts.sum():.1f} %)" for v in values[:6])
        return f"{len(values)} values, {listed}{', ...' if len(values) > 6 else ''}"


class SegmentationDataset(DatasetWrapper):
    """A dataset of images (h, w, c + 1) whose last channel is the mask: class indices or IGNORE.

    `table` has the class index, IGNORE or NO_CLASS of each value in a mask file (256); `values` returns the values
    found.
    """

    def __init__(
        self,
        source: ImageDataset,
        read_mask: Callable[[int], ClassMap],
        classes: Sequence[str],
        table: ClassMap | None = None,
        values: Callable[[], MaskValues] | None = None,
    ) -> None:
        spec = replace(source.image_spec, channels=source.image_spec.channels + 1)
        super().__init__(source, image_spec=spec, classes=classes)
        self._read_mask, self.table, self.values = read_mask, table, values

    @property
    def labels(self) -> None:
        """None: classes belong to pixels."""

    def read_array(self, index: int) -> Shaped[Array, "h w c"]:
        image, mask = self.source.read_array(index), self._read_mask(index)
        if image.shape[:2] != mask.shape:
            sizes = "mask {1}x{0}, image {3}x{2}".format(*mask.shape, *image.shape[:2])
            raise BadImage(f"image and mask differ in size: {sizes}")
        return np.concatenate([image, mask[..., None].astype(image.dtype)], axis=2)


def open_segmentation(
    spec: str,
    image_spec: ImageSpec,
    split: Split,
    classes: Sequence[str] | None = None,
    *,
    ignore: str = "auto",
    foreground: int | None = None,
    table: ClassMap | None = None,
) -> SegmentationDataset:
    """Open images with masks. A mask has the path of its image below `images/`, except for the suffix.

    `spec` is `shapes:`, or a folder with `images/` and `masks/` (or `annotations/`). In ADE20K's layout both contain
    `training/` and `validation/`; mask value 0 is then ignored, and 1 is the first class. Or a folder with masks beside
    the images: see `mask_files`. Masks of single objects become background (0) and object (1). By default, the classes
    are lines of classes.txt, the table objectInfo150.txt of ADE20K, or else "class 0" up to the largest value in the
    masks. `ignore` and `foreground` are those of `SegmentationSettings`; `table` is the class table of the train data,
    for test data. Raises UserError for another layout, if classes.txt differs from `classes`, or if mask values are not
    class numbers.
    """
    if spec.startswith("shapes:"):
        _check_same_classes(spec, SHAPE_CLASSES, classes)
        shapes = SyntheticShapes.from_spec(spec, image_spec)

        def draw_mask(index: int) -> ClassMap:
            sample = shapes.sample(index)
            return (sample.mask * (sample.shape + 1)).astype(np.uint8)

        return SegmentationDataset(shapes, draw_mask, SHAPE_CLASSES)
    layout = _find_layout(spec, split)
    beside, left_out = layout.beside, ""
    if beside is None:
        folder = from_folder(layout.images, image_spec)
        paths = [str(Path(folder.path_of(i)).relative_to(layout.images)) for i in range(len(folder))]
    else:
        paths = list(beside.masks)
        left_out = f"{beside.without:,} images without a mask beside them are left out" * bool(beside.without)
    images = ImageFolder(spec, layout.images, paths, image_spec, left_out=left_out)
    listed = _read_class_names(layout.root)
    _check_same_classes(str(layout.root), listed, classes)
    names = list(classes or listed or (["background", "object"] if beside and beside.instances else []))
    values = lru_cache(1)(lambda: _count_values(spec, layout, paths))
    if table is None:
        table, names = _class_table(spec, layout, names, ignore, foreground, values)
    lookup = table

    def read_classes(index: int) -> ClassMap:
        raw = layout.read_mask(paths[index])
        mask = lookup[raw]
        if (mask == NO_CLASS).any():
            raise BadImage(
                f"mask value without a class: {raw[mask == NO_CLASS][0]}, of {len(names)} classes (see --ignore and "
                "--foreground)"
            )
        return mask

    return SegmentationDataset(images, read_classes, names, lookup, values)


def _check_same_classes(spec: str, listed: Sequence[str] | None, classes: Sequence[str] | None) -> None:
    """Raise UserError if data list other classes than those of the train data. None: unknown."""
    if listed is not None and classes is not None and list(listed) != list(classes):
        pairs = zip_longest(listed, classes)
        first = next(f"number {i} is '{a}' instead of '{b}'" for i, (a, b) in enumerate(pairs) if a != b)
        difference = first if len(listed) == len(classes) else f"{len(listed)} instead of {len(classes)}"
        raise UserError(f"{spec} and the train data differ in their classes: {difference}")


@dataclass(frozen=True)
class _Layout:
    """Folders of a dataset, or the masks next to its images. ignore_zero: mask value 0 does not count."""

    root: Path
    images: Path
    masks: Path
    ignore_zero: bool
    beside: MaskFiles | None = None

    def read_mask(self, image: str) -> ClassMap:
        """Read the values of an image's mask; of a palette image the indices instead of the colors."""
        if self.beside is None:
            stem = self.masks / image
            path = next((p for suffix in MASK_SUFFIXES if os.path.isfile(p := stem.with_suffix(suffix))), None)
            if path is None:
                raise BadImage(f"mask not found: {stem.with_suffix('.png')}")
            return self._read_values(path)
        masks = [self.root / mask for mask in self.beside.masks[image]]
        if not self.beside.instances:
            return self._read_values(masks[0])
        union = np.zeros((0, 0), np.uint8)
        for path in masks:
            mask = read_mask(path, color=True) != 0
            if union.size and mask.shape != union.shape:
                raise BadImage(f"masks of one image differ in size: {path}")
            union = mask.astype(np.uint8) | union if union.size else mask.astype(np.uint8)
        return union

    def _read_values(self, path: Path) -> ClassMap:
        values = read_mask(path)
        low, high = values.min(), values.max()
        if low < 0 or high > IGNORE:
            raise BadImage(f"mask value outside 0 to 255: {low if low < 0 else high} in {path}")
        return values.astype(np.uint8)


def _find_layout(spec: str, split: Split) -> _Layout:
    root = Path(spec).expanduser()
    if not root.is_dir():
        if root.exists():
            raise UserError(f"{root} is a file: segmentation reads a folder of images and masks, or shapes:")
        siblings = [path.name for path in root.parent.iterdir()] if root.parent.is_dir() else []
        raise UserError(f"there is no folder {root}{did_you_mean(root.name, siblings)}")
    images = root / "images"
    masks = next((root / name for name in MASK_FOLDERS if (root / name).is_dir()), None)
    if masks is None or not images.is_dir():
        if (beside := find_masks(root)) is not None:
            return _Layout(root, root, root, ignore_zero=False, beside=beside)
        raise UserError(
            f"{root} lacks images/ or masks/: put images into {images}, and masks of the same names into "
            f"{root / 'masks'} (or annotations), or x_mask.png beside each x.jpg"
        )
    if all((folder / part).is_dir() for folder in (images, masks) for part in ("training", "validation")):
        return _Layout(root, images / split, masks / split, ignore_zero=True)
    return _Layout(root, images, masks, ignore_zero=False)


def _count_values(spec: str, layout: _Layout, paths: Sequence[str]) -> MaskValues:
    """Count the values of all readable masks. Raises UserError if no mask is readable."""

    def count(path: str) -> npt.NDArray[np.int64]:
        try:
            v = layout.read_mask(path)
        except BadImage:  # logged when the pair is used
            return np.zeros((2, 256), np.int64)
        corner = v[:-1, :-1]
        solid = corner[(corner == v[1:, :-1]) & (corner == v[:-1, 1:]) & (corner == v[1:, 1:])]
        return np.stack([np.bincount(x.ravel(), minlength=256) for x in (v, solid)])

    total = np.zeros((2, 256), np.int64)
    with status_counter(f"reads the masks of {spec}", "masks") as advance, ThreadPool(0, "pixmim-read") as pool:
        for counts in ordered_map(pool, count, paths, 2 * num_threads(0)):
            advance(1)
            total += counts
    if not total.any():
        raise UserError(f"no image of {spec} has a mask that can be read")
    return MaskValues(total[0], total[1] > 0)


def _class_table(
    spec: str,
    layout: _Layout,
    names: list[str],
    ignore: str,
    foreground: int | None,
    values: Callable[[], MaskValues],
) -> tuple[ClassMap, list[str]]:
    """Return the class index of each mask value, and the names of the classes. Raises UserError."""
    table = np.full(256, NO_CLASS, np.uint8)
    if ignore not in ("auto", "none") and not (ignore.isascii() and ignore.isdigit() and int(ignore) < 256):
        raise UserError(f"--ignore takes auto, none, or a value from 0 to 255, not '{ignore}'")
    if foreground is not None:
        if not 0 <= foreground < 256 or ignore != "auto" or len(names) not in (0, 2):
            raise UserError(
                f"--foreground takes a value from 0 to 255, without --ignore, and two names in classes.txt or none: "
                f"got {foreground}, --ignore {ignore}, {len(names)} names"
            )
        table[:], table[foreground] = 0, 1
        return table, names or ["background", "foreground"]
    if ignore == "auto":
        first = int(layout.ignore_zero)
        table[[IGNORE, *range(first)]] = IGNORE
        names = names or [f"class {i}" for i in range(_count_classes(spec, first, values()))]
        used = np.arange(first, first + len(names))
    else:
        used = np.flatnonzero(values().counts)
        if ignore != "none":
            table[int(ignore)] = IGNORE
            used = used[used != int(ignore)]
        _check_solid(spec, used, values())
        if names and len(used) and used[-1] < len(names):
            used = np.arange(len(names))
        if len(names) not in (0, len(used)) or not 0 < len(used) < NO_CLASS:
            raise UserError(
                f"the masks of {spec} contain {values()}: {len(used)} classes with --ignore {ignore}, but "
                f"{f'classes.txt names {len(names)}' if names else 'at most 253 are possible'}"
            )
        names = names or [f"value {value}" for value in used]
    table[used] = np.arange(len(used))
    return table, names


def _count_classes(spec: str, first: int, values: MaskValues) -> int:
    """Return the number of classes, if mask values are class numbers from `first`. Raises UserError otherwise."""
    used = np.flatnonzero(values.counts[:IGNORE])
    used, found = used[used >= first], f"the masks of {spec} contain {values}"
    if not len(used):
        fix = "--foreground 255 if 255 is the object, or --ignore none if each value is a class"
        raise UserError(f"{found}, and {'0 and 255 do' if first else '255 does'} not count: add {fix}")
    _check_solid(spec, used, values)
    count = int(used[-1]) + 1 - first
    if 2 * len(used) < count:
        fix = "--ignore none to make each value a class, or name all classes in classes.txt"
        raise UserError(f"{found}, which are not class numbers counted from {first}: add {fix}")
    return count


def _check_solid(spec: str, used: npt.NDArray[np.int64], values: MaskValues) -> None:
    """Raise UserError for values of smoothed edges: most of them never fill 2 x 2 pixels."""
    thin = [value for value in used if values.counts[value] and not values.solid[value]]
    if len(thin) > max(2, len(used) // 2):
        raise UserError(
            f"the masks of {spec} contain {values}, of which {len(thin)} never fill even 2 x 2 pixels: smoothed edges "
            "(antialiased, or resized by interpolation) are not class numbers. Save the masks with hard edges, add "
            "--foreground VALUE, or list the classes in classes.txt if these values are classes"
        )


def _read_class_names(root: Path) -> list[str] | None:
    """Read the names of the classes; None without a file. Raises UserError for a file without usable names."""
    file = next((root / name for name in ("classes.txt", "objectInfo150.txt") if os.path.lexists(root / name)), None)
    if file is None:
        return None
    with readable(file):
        lines = read_text(file, _MAX_NAMES_BYTES).splitlines()
    if file.name == "classes.txt":
        names = [line.strip() for line in lines if line.strip()]
    else:  # a table whose last column, NAME, lists synonyms
        names = [line.split("\t")[-1].split(",")[0].strip() for line in lines[1:] if line.strip()]
    if not 0 < len(names) < IGNORE:
        raise UserError(f"{file} names {len(names)} classes; 1 to 254 are possible")
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names)]
