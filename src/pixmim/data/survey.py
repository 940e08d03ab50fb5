"""Survey a dataset: sizes, formats, unreadable and flat images, masks, near-duplicates and spectrum."""

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console

from pixmim.data import open_dataset
from pixmim.data.dataset import RGB, BadImage, ImageDataset, ImageSpec, prefetch_in_order
from pixmim.data.duplicates import group_duplicates, perceptual_hash
from pixmim.data.image_folder import ImageFolder
from pixmim.data.resized_cache import find_settings
from pixmim.data.shards.dataset import ShardDataset
from pixmim.data.spectrum import Spectrum, radial_spectrum
from pixmim.data.statistics import choose_image_spec, count_formats, sample_indices
from pixmim.transforms.crops import Array, CenterCrop
from pixmim.utils.console import label, progress
from pixmim.utils.errors import UserError
from pixmim.utils.threads import ThreadPool, num_threads, ordered_map

MAX_SAMPLE = 20_000
"""Most images of a survey: near-duplicates are found by comparing all pairs."""

MASK_WORDS = "(?:masks?|seg|segmentation|labels?|gt)"
"""Pattern of the words that mark a file as a mask."""

_FEW = 64  # images that decide on channels, dtype and masks
_FLAT = 0.02  # of the usual contrast, below which an image shows nothing
_MAX_COLORS = 32  # of a mask, among up to 10,000 of its pixels
_MIN_MASKS = 0.8  # of the candidates examined that must have few colors
_MASK_NAME = re.compile(rf"(?:^|[_\-. ]){MASK_WORDS}(?:$|[_\-. ]?\d*$)", re.IGNORECASE)
_MASK_FOLDERS = {"mask", "masks", "labels", "annotations", "segmentation", "groundtruth", "ground_truth", "gt"}
Indices = npt.NDArray[np.int64]

_LOSSLESS, _LOSSY = {".png", ".bmp", ".gif", ".tif", ".tiff"}, {".jpg", ".jpeg"}


@dataclass(frozen=True)
class Survey:
    """Contents of a sample of a dataset. Paths are those of the files; masks are not images."""

    data: str  # as the user wrote it
    images: int  # in the dataset
    masks: int  # files that are masks of other images
    mask_example: str
    examined: int  # readable images in the sample
    image_spec: ImageSpec  # channels and dtype that keep all information of most images
    formats: dict[str, int]  # number of images by "channels x dtype" of their files, among 64
    heights: tuple[int, int, int]  # 5 %, 50 % and 95 % quantile in pixels
    widths: tuple[int, int, int]
    short_side: int  # median of the shorter sides in pixels
    aspect: float  # median of height / width
    elongation: float  # median of longer / shorter side
    same_orientation: float  # share of the images that are longer in the direction of the median
    unreadable: dict[str, tuple[int, str]]  # number of images and the path of one, by reason
    flat: list[str]  # images with almost no contrast
    duplicates: list[list[str]]  # groups of near-duplicates
    spectrum: Spectrum | None  # mean of squares of the training size; None if all are flat
    images_per_s: float  # that this machine reads, decodes and crops with all its threads
    left_out: str = ""  # note on what the dataset leaves out

    @property
    def usable(self) -> int:
        """Estimated number of images that are readable and have contrast."""
        read = self.examined + sum(count for count, _ in self.unreadable.values())
        return max(1, round(self.images * (self.examined - len(self.flat)) / read))

    def short(self, path: str) -> str:
        """Return the path of an image for display, relative to the dataset."""
        return label(os.path.relpath(path, self.data) if Path(path).is_relative_to(self.data) else path)

    def lines(self) -> list[str]:
        """Return the survey as lines for a terminal."""
        short = self.short
        lines = [f"{self.images:,} images in {self.data}, of which {self.examined:,} were examined"]
        lines += [self.left_out] if self.left_out else []
        if self.masks:
            lines.append(f"{self.masks:,} other files that are masks, such as {short(self.mask_example)}")
        for (low, median, high), side in ((self.heights, "height"), (self.widths, "width")):
            lines.append(f"{side} {median}" + (f" ({low} to {high} for nine of ten images)" if low < high else ""))
        kinds = ", ".join(f"{kind} in {count}" for kind, count in self.formats.items())
        lines.append(f"channels x dtype: {kinds} of {sum(self.formats.values())} files")
        copies = sum(len(group) - 1 for group in self.duplicates)
        if copies:
            example = " and ".join(short(path) for path in self.duplicates[0][:2])
            lines.append(f"near-duplicates of another image: {copies:,}, such as {example}")
        if self.flat:
            lines.append(f"images with almost no contrast: {len(self.flat):,}, such as {short(self.flat[0])}")
        for reason, (count, example) in sorted(self.unreadable.items(), key=lambda item: -item[1][0])[:3]:
            lines.append(f"images that cannot be read: {count:,}, {' '.join(reason.split())} ({short(example)})")
        if not (copies or self.flat or self.unreadable):
            lines.append("no near-duplicates, no images without contrast, no unreadable images")
        if self.spectrum is not None and self.spectrum.exponent is not None:
            lines.append(
                f"power falls with frequency as f^-{self.spectrum.exponent:.1f}, at {self.spectrum.size} pixels"
            )
        return [*lines, f"reading takes {1000 / self.images_per_s:.1f} ms an image"]


def survey(
    data: str,
    dataset: ImageDataset,
    split: tuple[Indices, Indices],
    *,
    size: int = 224,
    sample: int = 2_000,
    console: Console | None = None,
) -> Survey:
    """Examine a sample of a dataset. Raises UserError if no image can be read.

    Args:
        data: What the user passed to open it, to open it again in the channels and dtype of most of its images.
        dataset: The dataset, as `open_unconverted` opens it.
        split: Its images and its masks, see `split_masks`.
        size: Side in pixels of the crops whose spectrum is measured. Smaller images are not enlarged for it.
        sample: Images to read, evenly distributed; at most MAX_SAMPLE.
        console: Shows progress.
    """
    images, masks = split
    first = [int(images[i]) for i in sample_indices(len(images), _FEW)]
    formats = count_formats(dataset, first)
    image_spec = dataset.image_spec if find_settings(data) is not None else choose_image_spec(formats)
    if image_spec != dataset.image_spec:
        dataset = open_dataset(data, image_spec)

    indices = [int(images[i]) for i in sample_indices(len(images), min(sample, MAX_SAMPLE))]
    side = _side(dataset, first, size)
    found: list[_Image] = []
    unreadable: dict[str, tuple[int, str]] = {}

    def crops() -> Iterator[Array]:
        with progress(f"examining {data}", len(indices), console) as advance:
            for done, (index, result) in enumerate(zip(indices, _examine(dataset, indices, side), strict=True), 1):
                if isinstance(result, str):
                    count, example = unreadable.get(result, (0, dataset.path_of(index)))
                    unreadable[result] = count + 1, example
                else:
                    found.append(result[0])
                    yield result[1]
                advance(done)

    spectrum = radial_spectrum(crops())
    if not found:
        reason = max(unreadable, key=lambda reason: unreadable[reason][0])
        raise UserError(f"no image of {data} can be read: {reason} ({unreadable[reason][1]})")
    heights, widths = (np.asarray([image.size[axis] for image in found]) for axis in (0, 1))
    ratio = heights / widths
    aspect = float(np.median(ratio))
    deviations = np.asarray([image.deviation for image in found])
    is_flat = deviations <= _FLAT * np.quantile(deviations, 0.95)
    shown = [image for image, flat in zip(found, is_flat, strict=True) if not flat]
    groups = group_duplicates(np.stack([image.hash for image in shown])) if shown else []
    return Survey(
        data=data,
        images=len(images),
        masks=len(masks),
        mask_example=dataset.path_of(int(masks[0])) if len(masks) else "",
        examined=len(found),
        image_spec=image_spec,
        formats={f"{channels} x {dtype}": count for (channels, dtype), count in formats.most_common()},
        heights=_quantiles(heights),
        widths=_quantiles(widths),
        short_side=round(np.median(np.minimum(heights, widths))),
        aspect=aspect,
        elongation=float(np.median(np.maximum(ratio, 1 / ratio))),
        same_orientation=float(np.mean(ratio > 1 if aspect > 1 else ratio < 1)),
        unreadable=unreadable,
        flat=[dataset.path_of(image.number) for image, flat in zip(found, is_flat, strict=True) if flat],
        duplicates=[[dataset.path_of(shown[i].number) for i in group] for group in groups],
        spectrum=spectrum,
        images_per_s=len(found) * num_threads(0) / max(1e-9, sum(image.seconds for image in found)),
        left_out=dataset.left_out,
    )


def open_unconverted(data: str) -> ImageDataset:
    """Open a dataset: one with a cache in the cache's channels and dtype, anything else in RGB. Raises UserError."""
    settings = find_settings(data)
    return open_dataset(data, RGB if settings is None else settings.image_spec)


def is_cache(dataset: ImageDataset) -> bool:
    """Return True if a dataset, or the first part of a mixture, is a cache of resized images."""
    source, _ = dataset.locate(0)
    return isinstance(source, ShardDataset) and source.sizes is not None


def split_masks(dataset: ImageDataset) -> tuple[Indices, Indices]:
    """Return the indices of the images, and of masks in the same folders. If all would be masks, they are images.

    Candidates are files in a folder such as masks/, files named like x_mask.png, and lossless files next to a JPEG of
    the same name. They are masks if most of a sample of them have few colors.
    """
    is_mask = np.zeros(len(dataset), np.bool_)
    for candidates in _mask_candidates(dataset):
        few = candidates[sample_indices(len(candidates), _FEW)] if len(candidates) else candidates
        if len(few) and np.mean([_has_few_colors(dataset, int(index)) for index in few]) >= _MIN_MASKS:
            is_mask[candidates] = True
    if is_mask.all():
        is_mask[:] = False
    return np.flatnonzero(~is_mask), np.flatnonzero(is_mask)


class _Image(NamedTuple):
    number: int
    size: tuple[int, int]
    deviation: float
    hash: npt.NDArray[np.bool_]
    seconds: float


def _examine(dataset: ImageDataset, indices: list[int], side: int) -> Iterator[tuple[_Image, Array] | str]:
    """Yield what each image contains and its gray crop (side side), or the reason why it cannot be read."""
    crop = CenterCrop(side)

    def examine(index: int) -> tuple[_Image, Array] | str:
        start = perf_counter()
        try:
            image = dataset.read_array(index)
        except BadImage as error:
            return str(error)
        out = np.empty((side, side, image.shape[2]), image.dtype)
        crop.crop_into(image, (), out)
        seconds = perf_counter() - start
        gray = out.mean(axis=2, dtype=np.float32)
        return _Image(index, image.shape[:2], float(gray.std()), perceptual_hash(image), seconds), gray

    with ThreadPool(0, "pixmim-survey") as pool:
        yield from ordered_map(pool, examine, prefetch_in_order(dataset, indices), 4 * num_threads(0))


def _side(dataset: ImageDataset, indices: list[int], size: int) -> int:
    """Return an even side, at most `size`, to which most images are not enlarged: that would add no frequencies."""
    sides = []
    for index in indices:
        with suppress(BadImage):
            sides.append(min(dataset.read_array(index).shape[:2]))
    return int(np.clip(np.median(sides) // 2 * 2, 8, size)) if sides else size


def _mask_candidates(dataset: ImageDataset) -> Iterator[Indices]:
    """Yield the indices of files that may be masks, by folder, by name, and by a JPEG of the same name.

    Folders that contain all files of a dataset do not count.
    """
    by_folder, by_name, by_twin = list[int](), list[int](), list[int]()
    files = list[tuple[int, Path, int]]()  # index, path, and the dataset that reads it
    folders = defaultdict[int, set[str]](set)  # of the files of each dataset
    for index in range(len(dataset)):
        source, number = dataset.locate(index)
        if isinstance(source, ImageFolder):
            path = Path(os.path.abspath(source.path_of(number)))
            files.append((index, path, id(source)))
            folders[id(source)].add(str(path.parent))
    depth = {key: len(Path(os.path.commonpath(names)).parts) for key, names in folders.items()}
    lossy = {str(path.with_suffix("")) for _, path, _ in files if path.suffix.lower() in _LOSSY}
    for index, path, key in files:
        stem, suffix = str(path.with_suffix("")), path.suffix.lower()
        if any(part.lower() in _MASK_FOLDERS for part in path.parts[depth[key] : -1]):
            by_folder.append(index)
        elif _MASK_NAME.search(path.stem):
            by_name.append(index)
        elif suffix in _LOSSLESS and stem in lossy:
            by_twin.append(index)
    yield from (np.asarray(candidates, np.int64) for candidates in (by_folder, by_name, by_twin))


def _has_few_colors(dataset: ImageDataset, index: int) -> bool:
    try:
        image = dataset.read_array(index)
    except BadImage:
        return False
    step = max(1, int((image.shape[0] * image.shape[1] / 10_000) ** 0.5))
    pixels = image[::step, ::step].reshape(-1, image.shape[2])
    return len(np.unique(pixels, axis=0)) <= _MAX_COLORS


def _quantiles(values: npt.NDArray[np.int64]) -> tuple[int, int, int]:
    low, median, high = np.quantile(values, [0.05, 0.5, 0.95])
    return round(low), round(median), round(high)
