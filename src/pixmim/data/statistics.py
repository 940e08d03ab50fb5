"""Measure the mean and standard deviation of each channel of a dataset, and what its files hold.

Values are those of training before normalization: 255 or 65535 mean 1.0, float32 is unchanged. Each image has the same
weight, because training resizes all images to one size: the mean is the average of the image means, and the variance
that of all pixels around it. Full images are measured, in float64. Pixels of a GeoTIFF without data count for nothing.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from pixmim.config import PretrainConfig
from pixmim.data.dataset import BadImage, DType, HasBytes, ImageDataset, ImageSpec, TiffPages
from pixmim.data.decode.image import ALL_BITS, read
from pixmim.data.decode.no_data import recorded_shares
from pixmim.data.resized_cache import read_settings
from pixmim.data.shards.fsspec_io import NoAccessError, is_url, read_small_file
from pixmim.data.uri import Part, read_parts
from pixmim.utils import rng
from pixmim.utils.errors import UserError
from pixmim.utils.files import cache_path, parse_json, read_file, write_json
from pixmim.utils.threads import ThreadPool, num_threads, ordered_map

_BLOCK_SIZE = 2**20  # values that are converted to float64 at a time
_MAX_BYTES = 2**20  # of a file of statistics

T = TypeVar("T")
Vector = npt.NDArray[np.float64]
Formats = Counter[tuple[int, str]]
"""Number of images by channels and NumPy dtype of their files."""


@dataclass(frozen=True)
class Stats:
    """Mean and standard deviation of each channel, measured on `images` of `total` images."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int
    total: int


@dataclass(frozen=True)
class Measurement:
    """Statistics of each channel (c) of the readable images among those measured; NaN without images."""

    mean: Vector
    std: Vector
    minimum: Vector
    maximum: Vector
    sizes: npt.NDArray[np.int64]  # (h, w) of each image in pixels (n 2)
    bad: dict[str, tuple[int, str]]  # number of images and the path of one, by the reason why they cannot be read

    def stats(self, total: int) -> Stats:
        """Return what normalization needs. The std of a constant channel is 1."""
        std = np.where(self.std > 0, self.std, 1.0)
        return Stats(tuple(self.mean.tolist()), tuple(std.tolist()), len(self.sizes), total)


def sample_indices(total: int, count: int) -> list[int]:
    """Return `count` indices, always the same, one per equal slice of `total`; all if `count` is 0."""
    if not 0 < count < total:
        return list(range(total))
    u = rng.uniform(0, "stats", 0, np.arange(count), 1)[:, 0].tolist()
    edges = [i * total // count for i in range(count + 1)]
    return [first + int(x * (last - first)) for first, last, x in zip(edges, edges[1:], u, strict=False)]


def count_formats(dataset: ImageDataset, indices: list[int], tiff_pages: TiffPages = "first") -> Formats:
    """Count the channels and dtypes in the files of these images, except unreadable ones.

    For images that are not encoded files, it counts what they are converted to.
    """
    spec = replace(ALL_BITS, tiff_pages=tiff_pages)

    def read_format(index: int) -> tuple[int, str] | None:
        source, inside = dataset.locate(index)
        if not isinstance(source, HasBytes):
            return source.image_spec.channels, source.image_spec.dtype
        try:
            pixels = read(source.read(inside), spec)
        except BadImage:
            return None
        return pixels.shape[2], str(pixels.dtype)

    return Counter(found for found in _map(read_format, indices) if found is not None)


def choose_image_spec(formats: Formats) -> ImageSpec:
    """Return the specification that keeps all information of the most frequent format."""
    channels, dtype = max(formats, key=formats.__getitem__, default=(3, "uint8"))
    lossless: dict[str, DType] = {"uint8": "uint8", "bool": "uint8", "uint16": "uint16"}
    return ImageSpec(channels, lossless.get(dtype, "float32"))


def measure(
    dataset: ImageDataset,
    indices: list[int],
    *,
    threads: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Measurement:
    """Measure these images, converted to the specification of the dataset. `threads` do not change the result."""

    def measure_image(index: int) -> tuple[tuple[int, ...], Vector] | str:
        try:
            with recorded_shares() as shares:
                image = dataset.read_array(index)
        except BadImage as error:
            return str(error)
        one = float(np.iinfo(image.dtype).max) if image.dtype.kind == "u" else 1.0
        moments = _moments(image) / [[one], [one**2], [one], [one]]
        if shares:  # pixels without data are at the mean
            share = np.concatenate(shares)
            moments[1] /= share if len(share) == image.shape[2] else share.mean()
        return image.shape[:2], moments

    sizes, moments, bad = [], [], dict[str, tuple[int, str]]()
    for done, result in enumerate(_map(measure_image, indices, threads)):
        if isinstance(result, str):
            count, example = bad.get(result, (0, dataset.path_of(indices[done])))
            bad[result] = count + 1, example
        else:
            sizes.append(result[0])
            moments.append(result[1])
        progress(done + 1)
    channels, all_sizes = dataset.image_spec.channels, np.asarray(sizes, np.int64).reshape(-1, 2)
    if not moments:
        unknown = np.full(channels, np.nan)
        return Measurement(unknown, unknown, unknown, unknown, all_sizes, bad)
    means, variances, minima, maxima = np.asarray(moments, np.float64).swapaxes(0, 1)
    mean, minimum, maximum = means.mean(axis=0), minima.min(axis=0), maxima.max(axis=0)
    std = np.sqrt(variances.mean(axis=0) + ((means - mean) ** 2).mean(axis=0))
    std[minimum == maximum] = 0.0  # the mean of equal numbers is rounded
    return Measurement(mean, std, minimum, maximum, all_sizes, bad)


def format_report(dataset: ImageDataset, formats: Formats, result: Measurement) -> list[str]:
    """Format a measurement as lines for a terminal; `formats` is the result of `count_formats`."""
    counts = [f"{n:,} of {c} {'channel' if c == 1 else 'channels'} in {t}" for (c, t), n in formats.most_common(5)]
    readable = f"of {formats.total():,} that could be read: {'; '.join(counts) or 'nothing'}"
    lines = [f"{len(dataset):,} images; {readable}", *filter(None, [dataset.left_out])]
    if len(result.sizes):
        low, median, high = result.sizes.min(0), np.median(result.sizes, 0).astype(int), result.sizes.max(0)
        height, width = (
            f"{low[i]}" if low[i] == high[i] else f"{low[i]} to {high[i]}, median {median[i]}" for i in (0, 1)
        )
        count = f"{len(result.sizes):,} measured as {dataset.image_spec}"
        lines.append(f"{count}: height {height}; width {width}")
        lines.append("channel       mean        std    minimum    maximum")
        for number, row in enumerate(zip(result.mean, result.std, result.minimum, result.maximum, strict=True), 1):
            constant = "   constant: std 1 is used" if row[1] == 0 else ""
            lines.append(f"{number:>7}" + "".join(f" {value:>10.5g}" for value in row) + constant)
    if result.bad:
        bad, allowed = sum(count for count, _ in result.bad.values()), PretrainConfig.max_bad_fraction
        lines.append(f"{bad:,} cannot be read:")
        for reason, (number, example) in sorted(result.bad.items(), key=lambda item: -item[1][0])[:5]:
            lines.append(f"  {number:,}: {' '.join(reason.split())} ({example})")
        if len(result.bad) > 5:
            lines.append(f"  and {len(result.bad) - 5} more reasons")
        if bad > allowed * (bad + len(result.sizes)):
            lines.append(
                f"warning: training ends if more than {allowed:.0%} cannot be read, and so do evaluations: mend or "
                "remove them, or train on a cache, which leaves them out"
            )
    return lines


def statistics_path(spec: str, image_spec: ImageSpec) -> Path:
    """Return the file of a dataset's statistics: stats.json in a cache, else one in the user's cache directory."""
    folder = Path(os.path.expanduser(spec))
    if read_settings(folder) is not None:
        return folder / "stats.json"
    return cache_path("stats", f"{spec}\n{image_spec}").with_suffix(".json")


def save_statistics(spec: str, image_spec: ImageSpec, stats: Stats) -> Path:
    """Write statistics for `load_statistics`; return the file."""
    path = statistics_path(spec, image_spec)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"data": spec, "image_spec": asdict(image_spec), **asdict(stats)})
    return path


def load_statistics(spec: str, image_spec: ImageSpec) -> Stats | None:
    """Return the saved statistics of a dataset in this specification, or None if there are no valid ones.

    Raises:
        UserError: If a remote cache cannot be reached.
    """
    path, text = statistics_path(spec, image_spec), None
    if is_url(spec) and read_parts(spec) == [Part(spec)] and not path.exists():
        folder = spec.rstrip("/")
        with suppress(NoAccessError):  # what some storages answer if there is no such file
            text = read_small_file(f"{folder}/stats.json", _MAX_BYTES) if read_settings(folder) is not None else None
    try:
        content = parse_json((text or read_file(path, _MAX_BYTES)).decode(), str(path))
        mean, std = (tuple(float(x) for x in content[key]) for key in ("mean", "std"))
        valid = len(mean) == len(std) == image_spec.channels and all(np.isfinite(mean + std)) and min(std) > 0
        if valid and content["image_spec"] == asdict(image_spec):
            return Stats(mean, std, int(content["images"]), int(content["total"]))
    except (OSError, ValueError, KeyError, TypeError, OverflowError, UserError):
        pass
    return None


def _moments(pixels: npt.NDArray[np.generic]) -> Vector:
    """Return mean, variance, minimum and maximum of each channel of an image (h w c), in float64 (4 c)."""
    rows = max(1, _BLOCK_SIZE // pixels.shape[1])
    moments = np.empty((4, pixels.shape[2]))
    for k in range(pixels.shape[2]):  # one channel at a time: sums over a short last axis are slow
        channel = pixels[..., k]
        blocks = [channel[first : first + rows] for first in range(0, len(channel), rows)]
        total = squares = 0.0
        for block in blocks:
            total += float(block.sum(dtype=np.float64))
        mean = total / channel.size
        for block in blocks:
            centered = block.astype(np.float64).ravel() - mean
            squares += float(centered @ centered)
        moments[:, k] = mean, squares / channel.size, channel.min(), channel.max()
    return moments


def _map(work: Callable[[int], T], indices: list[int], threads: int = 0) -> Iterator[T]:
    """Yield the result of `work` for each index, in order, from threads with a bounded number of results ahead."""
    with ThreadPool(threads, "pixmim-stats") as pool:
        yield from ordered_map(pool, work, indices, 4 * num_threads(threads))
