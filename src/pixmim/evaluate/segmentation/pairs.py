"""Pictures with a mask that gives each pixel a class: folders of pairs, ADE20K's layout, or drawn shapes.

A pair is a picture whose last channel is its mask, so that all that feeds a loop with pictures feeds it with pairs.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from jaxtyping import Shaped

from pixmim.data.folders.files import Files, below
from pixmim.data.pictures.decode import read_numbers
from pixmim.data.pictures.limits import max_bytes
from pixmim.data.shapes import SHAPES, Shapes
from pixmim.data.source import BadImage, Form, Remade, Source
from pixmim.disk import read_file, read_text
from pixmim.errors import UserError, nearest
from pixmim.transforms import Array

IGNORE = 255
"""The value of pixels that do not count."""

Split = Literal["training", "validation"]
Mask = npt.NDArray[np.uint8]

_MASKS = (".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm")  # formats that keep numbers as they are
_FOLDERS = ("masks", "annotations")
_MAX_NAMES_BYTES = 2**20


class Pairs(Remade):
    """Pictures of a data set with their masks: `array` gives (h, w, c + 1), the mask last.

    mask     of an index: uint8 (h w), class numbers or IGNORE; raises BadImage
    classes  names of the classes of pixels
    """

    def __init__(self, pictures: Source, mask: Callable[[int], Mask], classes: Sequence[str]) -> None:
        form = replace(pictures.form, channels=pictures.form.channels + 1)
        super().__init__(pictures, form=form, classes=classes)
        self._mask = mask

    @property
    def labels(self) -> None:
        """Pictures as wholes have no class here."""

    def array(self, index: int) -> Shaped[Array, "h w c"]:
        picture, mask = self.source.array(index), self._mask(index)
        if picture.shape[:2] != mask.shape:
            sizes = [f"{w}x{h}" for h, w in (mask.shape, picture.shape[:2])]
            raise BadImage(f"its mask has {sizes[0]} pixels, and the picture {sizes[1]}")
        odd = mask[(mask >= len(self.classes)) & (mask != IGNORE)]
        if odd.size:
            raise BadImage(f"its mask holds class {int(odd[0])}, and there are {len(self.classes)}, counted from 0")
        return np.concatenate([picture, mask[..., None].astype(picture.dtype)], axis=2)


def open_pairs(spec: str, form: Form, split: Split, classes: Sequence[str] | None = None) -> Pairs:
    """The pairs that `spec` names: `shapes:`, or a folder with `images/` and `masks/` (or `annotations/`).

    A picture's mask has its path below `images/`, but for the ending. If both folders hold `training/` and
    `validation/`, it is ADE20K's layout: `split` says which, and 0 is no class but ignored, so that 1 is the first.

    classes  names of the classes; None: those of classes.txt, one in a line, of ADE20K's objectInfo150.txt, or else
             as many as the largest number in the masks tells

    Raises UserError for a folder of another kind, and for other classes in classes.txt than `classes`.
    """
    if spec.startswith("shapes:"):
        return _drawn(Shapes.from_spec(spec, form))
    layout = _layout(spec, split)
    pictures = below(layout.images, form)
    pictures = Files(spec, layout.images, [_inside(pictures, i, layout.images) for i in range(len(pictures))], form)
    found = _names(layout.root)
    if found is not None and classes is not None and found != list(classes):
        raise UserError(f"{layout.root} has other classes than the train data: {_difference(found, classes)}")
    read = _reader(pictures, layout)
    known = classes or found
    return Pairs(pictures, read, known if known is not None else _counted(pictures, read))


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
        raise UserError(f"there is no folder {root}{nearest(root.name, siblings)}")
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


def _inside(pictures: Files, index: int, folder: Path) -> str:
    return str(Path(pictures.locate(index)).relative_to(folder))


def _reader(pictures: Files, layout: _Layout) -> Callable[[int], Mask]:
    """What reads the mask of a picture."""

    def read(index: int) -> Mask:
        place = layout.masks / Path(pictures.locate(index)).relative_to(layout.images)
        path = next((p for ending in _MASKS if os.path.isfile(p := place.with_suffix(ending))), None)
        if path is None:
            raise BadImage(f"there is no mask {place.with_suffix('.png')}")
        return _decode(path, layout.zero)

    return read


def _decode(path: Path, zero: bool) -> Mask:
    """The class numbers in a file: of a palette picture, the numbers and not the colours. Raises BadImage."""
    try:
        values = read_numbers(read_file(path, max_bytes()))
    except (OSError, BadImage) as error:
        raise BadImage(f"its mask {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if values.min() < 0 or values.max() > IGNORE:
        raise BadImage(f"its mask {path} holds class {values.max()}; numbers up to 254 can be told, and 255 is ignored")
    mask = values.astype(np.uint8)
    if not zero:
        return mask
    return np.where((mask == 0) | (mask == IGNORE), np.uint8(IGNORE), mask - np.uint8(1))


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


def _counted(pictures: Files, read: Callable[[int], Mask]) -> list[str]:
    """Names for as many classes as the masks hold. Raises UserError if none does."""
    largest = -1
    for index in range(len(pictures)):
        try:
            mask = read(index)
        except BadImage:  # it will have its line in the account once it is used
            continue
        largest = max(largest, int(mask[mask != IGNORE].astype(np.int64).max(initial=-1)))
    if largest < 0:
        raise UserError(f"not one picture of {pictures.spec} has a mask with a class in it")
    return [f"class {i}" for i in range(largest + 1)]


def _difference(found: Sequence[str], wanted: Sequence[str]) -> str:
    if len(found) != len(wanted):
        return f"{len(found)} instead of {len(wanted)}"
    i = next(i for i in range(len(found)) if found[i] != wanted[i])
    return f"number {i} is '{found[i]}' instead of '{wanted[i]}'"


def _drawn(shapes: Shapes) -> Pairs:
    """The shapes, each before a background, which is class 0."""

    def mask(index: int) -> Mask:
        sample = shapes.sample(index)
        return (sample.mask * (sample.shape + 1)).astype(np.uint8)

    return Pairs(shapes, mask, ["background", *SHAPES])
