"""Mean and standard deviation of each channel of a data set, and what else a look at its images tells.

Each image counts the same, whatever its size, since training shows each at one size: the mean is the average of the
images' means, and the variance that of all pixels about it. For images of one size this is the mean and the deviation
of all pixels. Values are those that training sees before it normalizes: 255 or 65535 is one, float32 as it is.

Whole images are measured, in float64. Crops, and resizing, show nearly the same values.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from pixmim.data.dataset import BadImage, HasBytes, ImageDataset, ImageSpec, TiffPages
from pixmim.data.decode.image import read
from pixmim.data.resized_cache import read_settings
from pixmim.data.shards.fsspec_io import is_url, read_small_file
from pixmim.data.shards.webdataset import is_tar
from pixmim.utils import rng
from pixmim.utils.files import cache_path, read_file, write_json
from pixmim.utils.threads import ThreadPool, num_threads, ordered_map

_BLOCK = 2**20  # values that are in float64 at a time
_MOST_BYTES = 2**20  # of a file of statistics

T = TypeVar("T")
Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Stats:
    """What training needs: mean and deviation of each channel, measured on `images` of `total` images."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int
    total: int


@dataclass(frozen=True)
class Measured:
    """All that was found in `images` readable images.

    mean, std, least, greatest  of each channel, in units of one
    heights, widths  of the images in pixels (n)
    bad  reasons for which images could not be read, with how many and one of them
    """

    mean: Vector
    std: Vector
    least: Vector
    greatest: Vector
    heights: npt.NDArray[np.int64]
    widths: npt.NDArray[np.int64]
    bad: dict[str, tuple[int, str]]

    @property
    def images(self) -> int:
        return len(self.heights)


def sample(total: int, count: int) -> list[int]:
    """`count` different images of `total`, always the same ones: one from each of `count` equal parts; 0: all."""
    if not 0 < count < total:
        return list(range(total))
    u = rng.uniform(0, "stats", 0, np.arange(count), 1)[:, 0].tolist()
    edges = [i * total // count for i in range(count + 1)]
    return [first + int(x * (last - first)) for first, last, x in zip(edges, edges[1:], u, strict=False)]


def kinds(source: ImageDataset, indices: list[int], pages: TiffPages = "first") -> Counter[tuple[int, str]]:
    """How many of these images have which channels and kind of number in their files; without those unreadable.

    Of other sources than files, only what they bring their images into is known.
    """
    if not isinstance(source, HasBytes):
        return Counter({(source.image_spec.channels, str(source.image_spec.dtype)): len(indices)})

    def look(index: int) -> tuple[int, str] | None:
        try:
            pixels = read(source.read(index), pages)
        except BadImage:
            return None
        return pixels.shape[2], str(pixels.dtype)

    return Counter(kind for kind in _threads(look, indices, 0) if kind is not None)


def fitting(found: Counter[tuple[int, str]], pages: TiffPages = "first") -> ImageSpec:
    """The form that loses nothing of most images: their channels, and uint8, uint16 or else float32."""
    (channels, number), _ = found.most_common(1)[0] if found else ((3, "uint8"), 0)
    pixels = "uint8" if number in ("uint8", "bool") else "uint16" if number == "uint16" else "float32"
    return ImageSpec(channels, pixels, pages)  # type: ignore[arg-type]


def measure_statistics(
    source: ImageDataset, indices: list[int], *, threads: int = 0, progress: Callable[[int], None] = lambda done: None
) -> Measured:
    """Read these images of a data set, in its form. The numbers do not depend on threads."""

    def one(index: int) -> tuple[tuple[int, int], Vector] | tuple[str, str]:
        try:
            image = source.read_array(index)
        except BadImage as error:
            return str(error), source.path_of(index)
        whole = float(np.iinfo(image.dtype).max) if image.dtype.kind == "u" else 1.0
        moments = _moments(image) / [[whole], [whole**2], [whole], [whole]]
        return image.shape[:2], moments

    sizes, moments, bad = [], [], dict[str, tuple[int, str]]()
    for done, (what, values) in enumerate(_threads(one, indices, threads)):
        if isinstance(what, str):
            count, example = bad.get(what, (0, str(values)))
            bad[what] = count + 1, example
        else:
            sizes.append(what)
            moments.append(values)
        progress(done + 1)
    channels = source.image_spec.channels
    each = np.asarray(moments, np.float64).reshape(-1, 4, channels)
    size = np.asarray(sizes, np.int64).reshape(-1, 2)
    if not len(each):
        nothing = np.full(channels, np.nan)
        return Measured(nothing, nothing, nothing, nothing, size[:, 0], size[:, 1], bad)
    mean = each[:, 0].mean(axis=0)
    variance = each[:, 1].mean(axis=0) + ((each[:, 0] - mean) ** 2).mean(axis=0)
    return Measured(
        mean, np.sqrt(variance), each[:, 2].min(axis=0), each[:, 3].max(axis=0), size[:, 0], size[:, 1], bad
    )


def to_keep(found: Measured, total: int) -> Stats:
    """What training needs of it. A channel that is the same everywhere gets a deviation of one, not zero."""
    std = np.where(found.std > 0, found.std, 1.0)
    return Stats(tuple(found.mean.tolist()), tuple(std.tolist()), found.images, total)


def report(source: ImageDataset, seen: Counter[tuple[int, str]], found: Measured) -> list[str]:
    """What was found, in lines for a terminal; `seen` is what `kinds` gave."""
    held = "; ".join(f"{n:,} of {c} {'channel' if c == 1 else 'channels'} in {p}" for (c, p), n in seen.most_common(5))
    lines = [f"{len(source):,} images; of {seen.total():,} that could be read: {held or 'nothing'}"]
    if not isinstance(source, HasBytes):
        lines = [f"{len(source):,} images of {source.image_spec}"]
    if found.images:
        sides = []
        for name, values in (("height", found.heights), ("width", found.widths)):
            least, middle, most = values.min(), int(np.median(values)), values.max()
            sides.append(f"{name} {least}" if least == most else f"{name} {least} to {most}, median {middle}")
        lines.append(f"{found.images:,} measured as {source.image_spec}: {'; '.join(sides)}")
        lines.append("channel       mean        std      least   greatest")
        for k, row in enumerate(zip(found.mean, found.std, found.least, found.greatest, strict=True)):
            same = "   the same everywhere: its std is taken as 1" if row[1] == 0 else ""
            lines.append(f"{k + 1:>7}" + "".join(f"{value:>11.5g}" for value in row) + same)
    unread = sum(count for count, _ in found.bad.values())
    if unread:
        lines.append(f"{unread:,} cannot be read so:")
        for reason, (count, example) in sorted(found.bad.items(), key=lambda item: -item[1][0])[:5]:
            lines.append(f"  {count:,}: {' '.join(reason.split())} ({example})")
        if len(found.bad) > 5:
            lines.append(f"  and {len(found.bad) - 5} more reasons")
    return lines


def remember(spec: str, form: ImageSpec, stats: Stats) -> Path:
    """Keep what was measured where `load_statistics` finds it; gives the file."""
    path = place(spec, form)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"data": spec, "form": asdict(form), **asdict(stats)})
    return path


def load_statistics(spec: str, form: ImageSpec) -> Stats | None:
    """Return what was measured of a data set in this form, or None if nothing was, or it is damaged.

    Raises:
        UserError: If a remote cache cannot be asked for it.
    """
    try:
        path = place(spec, form)
        text = read_file(path, _MOST_BYTES) if path.exists() else _beside_far(spec)
        if text is None:
            return None
        kept = json.loads(text)
        if kept["form"] != asdict(form):
            return None
        mean, std = (tuple(float(x) for x in kept[key]) for key in ("mean", "std"))
        stats = Stats(mean, std, int(kept["images"]), int(kept["total"]))
        right = len(stats.mean) == len(stats.std) == form.channels and all(np.isfinite(mean + std)) and min(std) > 0
        return stats if right else None
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def _beside_far(spec: str) -> bytes | None:
    """What was measured of a cache before it was put far away."""
    return read_small_file(f"{spec.rstrip('/')}/stats.json", _MOST_BYTES) if is_url(spec) and not is_tar(spec) else None


def place(spec: str, form: ImageSpec) -> Path:
    """Beside a cache's images, so that it goes where they go; for all other data in the user's cache directory."""
    folder = Path(os.path.expanduser(spec))
    if read_settings(folder) is not None:
        return folder / "stats.json"
    return cache_path("stats", f"{spec}\n{form}").with_suffix(".json")


def _moments(pixels: npt.NDArray[np.generic]) -> Vector:
    """Mean, mean square about it, least and greatest value of each channel of (h w c), in float64 (4 c)."""
    rows = max(1, _BLOCK // pixels.shape[1])
    blocks = [pixels[first : first + rows] for first in range(0, pixels.shape[0], rows)]
    found = np.empty((4, pixels.shape[2]))
    for k in range(pixels.shape[2]):  # a plane at a time: sums over a short last axis are slow
        total = square = 0.0
        for block in blocks:
            total += float(block[..., k].sum(dtype=np.float64))
        mean = total / pixels[..., k].size
        for block in blocks:
            about = block[..., k].astype(np.float64).ravel() - mean
            square += float(about @ about)
        found[:, k] = mean, square / pixels[..., k].size, pixels[..., k].min(), pixels[..., k].max()
    return found


def _threads(work: Callable[[int], T], indices: list[int], threads: int) -> Iterator[T]:
    """What `work` makes of each index, in order, by several threads that are never far ahead."""
    pool = ThreadPool(threads, "pixmim-stats")
    try:
        yield from ordered_map(pool, work, indices, 4 * num_threads(threads))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
