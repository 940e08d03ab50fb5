"""Pictures with a mask that gives each pixel a class: folders of pairs, ADE20K's layout, or drawn shapes.

A pair is a picture whose last channel is its mask, so that all that feeds a loop with pictures feeds it with pairs.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from jaxtyping import Shaped

from pixmim.data.dataset import BadImage, ImageDataset, ImageSpec
from pixmim.data.decode.image import read_numbers
from pixmim.data.decode.limits import max_bytes
from pixmim.data.image_folder import ImageFolder, from_folder
from pixmim.data.synthetic import SHAPES, SyntheticShapes
from pixmim.data.wrappers import DatasetWrapper
from pixmim.transforms.crops import Array
from pixmim.utils.console import status_counter
from pixmim.utils.errors import UserError, did_you_mean
from pixmim.utils.files import read_file, read_text
from pixmim.utils.threads import ThreadPool, num_threads, ordered_map

IGNORE = 255
"""The value of pixels that do not count."""

NO_CLASS = 254
"""In a table of values: one that no class has."""

Split = Literal["training", "validation"]
Mask = npt.NDArray[np.uint8]

_MASKS = (".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm")  # formats that keep numbers as they are
_FOLDERS = ("masks", "annotations")
_MAX_NAMES_BYTES = 2**20


class SegmentationDataset(DatasetWrapper):
    """Pictures of a data set with their masks: `array` gives (h, w, c + 1), the mask last.

    mask     of an index: uint8 (h w), class numbers or IGNORE; raises BadImage
    classes  names of the classes of pixels
    table    what each value of a mask file stands for (256): a class number, IGNORE or NO_CLASS
    values   counts what the mask files hold
    """

    def __init__(
        self,
        pictures: ImageDataset,
        mask: Callable[[int], Mask],
        classes: Sequence[str],
        table: Mask | None = None,
        values: "Callable[[], _Values] | None" = None,
    ) -> None:
        form = replace(pictures.image_spec, channels=pictures.image_spec.channels + 1)
        super().__init__(pictures, form=form, classes=classes)
        self._mask, self.table, self.values = mask, table, values

    @property
    def labels(self) -> None:
        """Pictures as wholes have no class here."""

    def read_array(self, index: int) -> Shaped[Array, "h w c"]:
        picture, mask = self.source.read_array(index), self._mask(index)
        if picture.shape[:2] != mask.shape:
            sizes = [f"{w}x{h}" for h, w in (mask.shape, picture.shape[:2])]
            raise BadImage(f"its mask is of another size: {sizes[0]} pixels, and the picture {sizes[1]}")
        return np.concatenate([picture, mask[..., None].astype(picture.dtype)], axis=2)


def open_segmentation(
    spec: str,
    form: ImageSpec,
    split: Split,
    classes: Sequence[str] | None = None,
    *,
    ignore: str = "auto",
    foreground: int | None = None,
    table: Mask | None = None,
) -> SegmentationDataset:
    """The pairs that `spec` names: `shapes:`, or a folder with `images/` and `masks/` (or `annotations/`).

    A picture's mask has its path below `images/`, but for the ending. If both folders hold `training/` and
    `validation/`, it is ADE20K's layout: `split` says which, and 0 is no class but ignored, so that 1 is the first.

    classes     names of the classes; None: those of classes.txt, one in a line, of ADE20K's objectInfo150.txt, or else
                as many as the largest number in the masks tells
    ignore      "auto", "none" or a value, see `SegmentationSettings`
    foreground  the value of the one class beside the background
    table       of the train data, whose masks decide what a value stands for

    Raises UserError for a folder of another kind, for other classes in classes.txt than `classes`, and for masks whose
    values are no class numbers.
    """
    if spec.startswith("shapes:"):
        return _drawn(SyntheticShapes.from_spec(spec, form))
    layout = _layout(spec, split)
    pictures = from_folder(layout.images, form)
    names = [str(Path(pictures.path_of(i)).relative_to(layout.images)) for i in range(len(pictures))]
    pictures = ImageFolder(spec, layout.images, names, form)
    found = _names(layout.root)
    if found is not None and classes is not None and found != list(classes):
        raise UserError(f"{layout.root} has other classes than the train data: {_difference(found, classes)}")
    read = _mask_reader(pictures, layout)
    values = lru_cache(1)(lambda: _values(spec, len(pictures), read))
    names = list(classes or found or [])
    meaning, names = _meaning(spec, layout, names, ignore, foreground, values) if table is None else (table, names)

    def mask(index: int) -> Mask:
        raw = read(index)
        result = meaning[raw]
        if (result == NO_CLASS).any():
            raise BadImage(
                f"its mask holds a value that is no class: {raw[result == NO_CLASS][0]}, and there are {len(names)} "
                "classes (see --ignore and --foreground)"
            )
        return result

    return SegmentationDataset(pictures, mask, names, meaning, values)


@dataclass(frozen=True)
class _Values:
    """What mask files hold. counts: pixels of each value (256); solid: which values fill 2 x 2 pixels anywhere."""

    counts: npt.NDArray[np.int64]
    solid: npt.NDArray[np.bool_]

    def __str__(self) -> str:
        found = [v for v in np.argsort(-self.counts, kind="stable") if self.counts[v]]
        some = ", ".join(f"{v} ({100 * self.counts[v] / self.counts.sum():.1f} %)" for v in found[:6])
        return f"{len(found)} values, {some}{', ...' if len(found) > 6 else ''}"


def _values(spec: str, count: int, read: Callable[[int], Mask]) -> _Values:
    """Read all masks; one that cannot be read has its line in the account once it is used. Raises UserError if all."""

    def one(index: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None:
        try:
            v = read(index)
        except BadImage:
            return None
        corner = v[:-1, :-1]
        same = (corner == v[1:, :-1]) & (corner == v[:-1, 1:]) & (corner == v[1:, 1:])
        return np.bincount(v.ravel(), minlength=256), np.bincount(corner[same], minlength=256)

    counts, solid = np.zeros(256, np.int64), np.zeros(256, np.int64)
    with status_counter(f"reads the masks of {spec}", "masks") as more, ThreadPool(0, "pixmim-read") as pool:
        for found in ordered_map(pool, one, range(count), 2 * num_threads(0)):
            more(1)
            if found is not None:
                counts, solid = counts + found[0], solid + found[1]
    if not counts.any():
        raise UserError(f"not one picture of {spec} has a mask with a class in it")
    return _Values(counts, solid > 0)


def _meaning(
    spec: str,
    layout: "_Layout",
    names: list[str],
    ignore: str,
    foreground: int | None,
    values: Callable[[], _Values],
) -> tuple[Mask, list[str]]:
    """What each value of a mask stands for, and the names of the classes. Raises UserError."""
    table = np.full(256, NO_CLASS, np.uint8)
    if ignore not in ("auto", "none") and not (ignore.isascii() and ignore.isdigit() and int(ignore) < 256):
        raise UserError(f"--ignore takes auto, none, or a value from 0 to 255, not '{ignore}'")
    if foreground is not None:
        if not 0 <= foreground < 256 or ignore != "auto" or len(names) not in (0, 2):
            raise UserError(
                f"--foreground takes a value from 0 to 255, without --ignore, and with two names in classes.txt or "
                f"none: not {foreground}, --ignore {ignore}, {len(names)} names"
            )
        table[:], table[foreground] = 0, 1
        return table, names or ["background", "foreground"]
    if ignore == "auto":
        table[IGNORE] = IGNORE
        if layout.zero:
            table[0] = IGNORE
        first = int(layout.zero)
        if names:
            table[first : first + len(names)] = np.arange(len(names))
            return table, names
        held = values().counts > 0
        found = np.flatnonzero(held[:IGNORE])
        found = found[found >= first]
        if not len(found):
            raise UserError(
                f"not one picture of {spec} has a mask with a class in it: they hold {values()}. {_way_out(layout)}"
            )
        _check_solid(spec, found, values())
        count = int(found[-1]) + 1 - first
        if 2 * len(found) < count:
            raise UserError(
                f"the masks of {spec} hold {values()}, which are no class numbers counted from {first}: --ignore none "
                "takes the values found for the classes, in their order, and classes.txt names all classes"
            )
        table[first : first + count] = np.arange(count)
        names = [f"class {i}" for i in range(count)]
    else:
        found = np.flatnonzero(values().counts)
        if ignore != "none":
            table[int(ignore)] = IGNORE
            found = found[found != int(ignore)]
        _check_solid(spec, found, values())
        if names and len(found) and found[-1] < len(names):
            found = np.arange(len(names))
        if len(names) not in (0, len(found)) or not 0 < len(found) < NO_CLASS:
            raise UserError(
                f"the masks of {spec} hold {values()}: with --ignore {ignore} {len(found)} classes, and "
                f"{len(names) or 'at most 253'} are named"
            )
        table[found] = np.arange(len(found))
        names = names or [f"value {value}" for value in found]
    return table, names


def _check_solid(spec: str, found: npt.NDArray[np.int64], values: _Values) -> None:
    """Raise UserError for values that come of smoothed edges: most of them never fill 2 x 2 pixels."""
    thin = [value for value in found if values.counts[value] and not values.solid[value]]
    if len(thin) > max(2, len(found) // 2):
        raise UserError(
            f"the masks of {spec} hold {values}, and {len(thin)} of these never fill even 2 x 2 pixels: edges that "
            "are smoothed (antialiased, or resized by interpolation) are no class numbers. Save the masks with hard "
            "edges, or give --foreground VALUE, or classes.txt if these are classes indeed"
        )


def _way_out(layout: "_Layout") -> str:
    ignored = "0 and 255 do" if layout.zero else "255 does"
    return f"{ignored} not count: --foreground 255 if that is the object, --ignore none if each value is a class"


@dataclass(frozen=True)
class _Layout:
    """Where pictures and masks lie; `zero`: whether 0 is no class."""

    root: Path
    images: Path
    masks: Path
    zero: bool


def _layout(spec: str, split: Split) -> _Layout:
    root = Path(spec).expanduser()
    if not root.is_dir():
        siblings = [path.name for path in root.parent.iterdir()] if root.parent.is_dir() else []
        raise UserError(f"there is no folder {root}{did_you_mean(root.name, siblings)}")
    masks = next((root / name for name in _FOLDERS if (root / name).is_dir()), None)
    if masks is None or not (root / "images").is_dir():
        raise UserError(
            f"{root} holds no pairs: pictures belong into {root / 'images'}, and masks of the same names into "
            f"{root / 'masks'} (or annotations)"
        )
    parts = "training", "validation"
    if all((folder / part).is_dir() for folder in (root / "images", masks) for part in parts):
        return _Layout(root, root / "images" / split, masks / split, zero=True)
    return _Layout(root, root / "images", masks, zero=False)


def _mask_reader(pictures: ImageFolder, layout: _Layout) -> Callable[[int], Mask]:
    """Return a function that reads the mask of an image; of a palette image its numbers, not the colors."""

    def read(index: int) -> Mask:
        stem = layout.masks / Path(pictures.path_of(index)).relative_to(layout.images)
        path = next((p for ending in _MASKS if os.path.isfile(p := stem.with_suffix(ending))), None)
        if path is None:
            raise BadImage(f"there is no mask: {stem.with_suffix('.png')}")
        try:
            values = read_numbers(read_file(path, max_bytes()))
        except (OSError, BadImage) as error:
            raise BadImage(f"its mask cannot be read: {path}, {getattr(error, 'strerror', None) or error}") from None
        low, high = values.min(), values.max()
        if low < 0 or high > IGNORE:
            odd = low if low < 0 else high
            raise BadImage(
                f"its mask holds a value that is no class: {odd} in {path}; values are numbers from 0 to 255"
            )
        return values.astype(np.uint8)

    return read


def _names(root: Path) -> list[str] | None:
    """The names of the classes, where a file tells them. Raises UserError for a file that tells none."""
    file = next((root / name for name in ("classes.txt", "objectInfo150.txt") if os.path.lexists(root / name)), None)
    if file is None:
        return None
    try:
        lines = read_text(file, _MAX_NAMES_BYTES).splitlines()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    if file.name == "classes.txt":
        names = [line.strip() for line in lines if line.strip()]
    else:  # a table whose last column, NAME, lists synonyms
        names = [line.split("\t")[-1].split(",")[0].strip() for line in lines[1:] if line.strip()]
    if not 0 < len(names) < IGNORE:
        raise UserError(f"{file} names {len(names)} classes; 1 to 254 can be told apart")
    return [f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _difference(found: Sequence[str], wanted: Sequence[str]) -> str:
    if len(found) != len(wanted):
        return f"{len(found)} instead of {len(wanted)}"
    i = next(i for i in range(len(found)) if found[i] != wanted[i])
    return f"number {i} is '{found[i]}' instead of '{wanted[i]}'"


def _drawn(shapes: SyntheticShapes) -> SegmentationDataset:
    """The shapes, each before a background, which is class 0."""

    def mask(index: int) -> Mask:
        sample = shapes.sample(index)
        return (sample.mask * (sample.shape + 1)).astype(np.uint8)

    return SegmentationDataset(shapes, mask, ["background", *SHAPES])
