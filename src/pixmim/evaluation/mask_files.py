"""Find masks in the folders of their images.

- `x_mask.png` next to `x.png` (also -mask, .mask, seg, segmentation, label, labels, gt)
- `x.png` next to `x.jpg`
- `SAMPLE/masks/*.png` for the one image in `SAMPLE/images/`: one mask for each object
"""

import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy.typing as npt

from pixmim.data.dataset import BadImage
from pixmim.data.decode.image import read_numbers
from pixmim.data.decode.limits import max_bytes
from pixmim.data.image_folder import from_folder
from pixmim.data.survey import MASK_WORDS
from pixmim.utils.errors import UserError
from pixmim.utils.files import read_file

MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".pgm")  # formats that keep numbers as they are

MASK_FOLDERS = ("masks", "annotations")  # next to images/

_MASK_STEM = re.compile(rf"(.+?)[_\-. ]{MASK_WORDS}", re.IGNORECASE)
_LOSSY = (".jpg", ".jpeg")


class MaskFiles(NamedTuple):
    """Masks of each image, as paths below a folder."""

    masks: dict[str, list[str]]  # the masks of each image; several only of separate objects
    instances: bool  # True if each mask is one object
    without: int  # number of images without a mask


def read_mask(path: Path, color: bool = False) -> npt.NDArray[Any]:
    """Read the numbers (h w) of a mask; with `color`, all but black is an object. Raises BadImage."""
    try:
        return read_numbers(read_file(path, max_bytes()), color=color)
    except (OSError, BadImage) as error:
        raise BadImage(f"mask cannot be read: {path}, {getattr(error, 'strerror', None) or error}") from None


def find_masks(root: Path) -> MaskFiles | None:
    """Find the masks of the images in a folder; None if it has none."""
    try:
        files = from_folder(root)
    except UserError:  # no images
        return None
    paths = [os.path.relpath(files.path_of(i), root) for i in range(len(files))]
    for find, instances in ((_find_instances, True), (_find_named, False), (_find_twins, False)):
        masks = find(paths)
        if masks:
            used = {mask for group in masks.values() for mask in group}
            return MaskFiles(masks, instances, len(paths) - len(used) - len(masks))
    return None


def _find_instances(paths: list[str]) -> dict[str, list[str]]:
    samples: dict[Path, dict[str, list[str]]] = defaultdict(lambda: {"images": [], "masks": []})
    for path in map(Path, paths):
        if path.parent.name in ("images", "masks") and len(path.parts) > 2:
            samples[path.parent.parent][path.parent.name].append(str(path))
    complete = [sample for sample in samples.values() if sample["masks"]]
    if any(len(sample["images"]) != 1 for sample in complete):
        return {}
    return {sample["images"][0]: sample["masks"] for sample in complete}


def _find_named(paths: list[str]) -> dict[str, list[str]]:
    stem_of = {os.path.splitext(path)[0]: path for path in paths}
    masks = {}
    for path in paths:
        stem, suffix = os.path.splitext(path)
        match = _MASK_STEM.fullmatch(stem)
        if match and suffix.lower() in MASK_SUFFIXES and match[1] in stem_of:
            masks[stem_of[match[1]]] = [path]
    return masks


def _find_twins(paths: list[str]) -> dict[str, list[str]]:
    lossy = {os.path.splitext(path)[0]: path for path in paths if path.lower().endswith(_LOSSY)}
    lossless = {os.path.splitext(path)[0]: path for path in paths if path.lower().endswith(MASK_SUFFIXES)}
    return {image: [lossless[stem]] for stem, image in lossy.items() if stem in lossless}
