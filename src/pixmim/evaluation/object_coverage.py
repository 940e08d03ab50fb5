"""Object coverage: the share of an object that a crop keeps, J = A2 / A1 (PixMIM, arXiv 2303.02416, section 4.2).

A1 is the object's area in the image, A2 the part of it inside the crop; pixels mirrored by the padding of
SimpleResizedCrop do not count. Random masking that hides a share r of the patches leaves (1 - r) J in expectation.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.console import Console
from rich.table import Table

from pixmim.evaluation.annotations import ImageObject, Problems, read_objects
from pixmim.evaluation.results import versions
from pixmim.transforms.crops import CenterCrop, Crop, RandomResizedCrop, SimpleResizedCrop, cover_size
from pixmim.utils import rng
from pixmim.utils.console import csv_cell, progress
from pixmim.utils.errors import UserError
from pixmim.utils.files import atomic_write, write_csv, write_json
from pixmim.utils.plotting import PLOT_COLORS, new_plot, plot_image, plot_style

Values = npt.NDArray[np.float64]

_POINTS = 64  # quadrature points over the area of RandomResizedCrop, and over its ratio


def crops(size: tuple[int, int]) -> dict[str, Crop]:
    """Return the crops to compare, by name: those of MAE, PixMIM, its ablation and SimMIM."""
    return {
        "RRC (0.2, 1)": RandomResizedCrop(size),
        "SRC": SimpleResizedCrop(size),
        "CC": CenterCrop(size),
        "RRC (0.67, 1)": RandomResizedCrop(size, scale=(0.67, 1.0)),
    }


def expected_coverage(obj: ImageObject, crop: Crop) -> float:
    """Return the expected coverage of an object, in [0, 1].

    Exact for SimpleResizedCrop and CenterCrop. For RandomResizedCrop exact over the positions of each box, and by
    quadrature over its area and ratio, including failed tries and the fallback. Raises TypeError for another crop.
    """
    if isinstance(crop, RandomResizedCrop):
        heights, widths, failed = _boxes(crop, obj.size)
        fallback = _coverage(obj, crop.fallback(obj.size)) if failed else 0.0
        if failed == 1:
            return fallback
        rows = _covered(obj, 0, lambda edge: window_cover(edge, heights[:, None], obj.size[0]))
        columns = _covered(obj, 1, lambda edge: window_cover(edge, widths[:, None], obj.size[1]))
        return (1 - failed) * float(_product(obj, rows, columns).mean()) + failed * fallback
    if isinstance(crop, SimpleResizedCrop):
        scale, (h, w), (height, width) = _scale(obj.size, crop), crop.shape, cover_size(obj.size, crop.shape)
        p = crop.padding
        rows = _covered(obj, 0, lambda edge: window_cover(edge * scale[0] + p, h, height + 2 * p) / scale[0])
        columns = _covered(obj, 1, lambda edge: window_cover(edge * scale[1] + p, w, width + 2 * p) / scale[1])
        return float(_product(obj, rows, columns)[0])
    if isinstance(crop, CenterCrop):
        return _coverage(obj, _window(obj, crop, ()))
    raise TypeError(f"expected coverage is not implemented for {type(crop).__name__}")


def sampled_coverage(obj: ImageObject, crop: Crop, draws: int, seed: int = 0, index: int = 0) -> Values:
    """Return the coverage (draws) of an object by crops sampled from (seed, index), as in training."""
    numbers = rng.uniform(seed, f"coverage {index}", 0, np.arange(draws), max(crop.num_uniforms, 1)).tolist()
    return np.array([_coverage(obj, _window(obj, crop, u[: crop.num_uniforms])) for u in numbers])


def _window(obj: ImageObject, crop: Crop, u: Sequence[float]) -> tuple[float, float, float, float]:
    """Return the part (top, left, height, width) of the image, in its own pixels, selected by the numbers `u`."""
    if isinstance(crop, RandomResizedCrop):
        return crop.box(obj.size, u)
    offset = crop.offset_without_resize(cover_size(obj.size, crop.shape), u)
    assert offset is not None  # an image of the cover size is cropped without resizing
    y, x = _scale(obj.size, crop)
    return offset[0] / y, offset[1] / x, crop.shape[0] / y, crop.shape[1] / x


def _coverage(obj: ImageObject, window: tuple[float, float, float, float]) -> float:
    """Return the share of an object inside one window."""
    top, left, h, w = window
    rows = _covered(obj, 0, lambda edge: np.clip(edge - top, 0, h)[None])
    columns = _covered(obj, 1, lambda edge: np.clip(edge - left, 0, w)[None])
    return float(_product(obj, rows, columns)[0])


def _covered(obj: ImageObject, axis: int, covered: Callable[[Values], Values]) -> Values:
    """Return the covered share of an object along an axis (0 down, 1 across): (k 1), or (k n) for n pixels.

    `covered` returns the covered length before each of several edges. Only a mask needs each pixel of its box.
    """
    start, end = obj.box[1 - axis], obj.box[3 - axis]
    edges = np.array([start, end]) if obj.mask is None else np.arange(start, end + 1, dtype=np.float64)
    return np.diff(np.atleast_2d(covered(edges)), axis=1) / np.diff(edges)


def _product(obj: ImageObject, rows: Values, columns: Values) -> Values:
    """Return the covered share of the object (k) from the covered shares of its rows and columns."""
    if obj.mask is None:
        return (rows * columns)[:, 0]
    left, top, right, bottom = map(int, obj.box)
    mask = obj.mask[top:bottom, left:right]
    return np.asarray(((rows @ mask) * columns).sum(axis=1) / mask.sum())


def _scale(size: tuple[int, int], crop: Crop) -> tuple[float, float]:
    """Return the pixels of the resized image per pixel of the image, down and across."""
    height, width = cover_size(size, crop.shape)
    return height / size[0], width / size[1]


def window_cover(edge: npt.ArrayLike, window: npt.ArrayLike, length: npt.ArrayLike) -> Values:
    """Return the expected number of pixels of [0, edge] covered by a random window, along one axis of `length` pixels.

    The window starts at any integer pixel at which it fits, with equal probability. It covers pixel j with probability
    min(j + 1, length - j, window, length - window + 1) / (length - window + 1); this function is the sum of that up to
    `edge`, which may be fractional. The difference of two values is the cover of an interval. All three are broadcast.
    """
    t, w, n = (np.asarray(value, np.float64) for value in (edge, window, length))
    top = np.minimum(w, n - w + 1)  # starts that cover a pixel of the middle; also the pixels of either ramp
    full = np.floor(t)
    up = np.minimum(full, top)
    total = up * (up + 1) / 2 + (full - up) * top + (t - full) * np.minimum(full + 1, top)
    down = np.maximum(t - (n - top), 0)
    full = np.floor(down)
    excess = full * (full - 1) / 2 + (down - full) * full
    return np.asarray((total - excess) / (n - w + 1))


@lru_cache(256)
def _boxes(crop: RandomResizedCrop, size: tuple[int, int]) -> tuple[Values, Values, float]:
    """Return heights and widths of the equally likely boxes that fit an image, and the probability of ten misfits."""
    height, width = size
    u = (np.arange(_POINTS) + 0.5) / _POINTS
    area = height * width * (crop.scale[0] + u[:, None] * (crop.scale[1] - crop.scale[0]))
    low, high = (math.log(ratio) for ratio in crop.ratio)
    ratio = np.exp(low + u[None, :] * (high - low))
    w, h = np.rint(np.sqrt(area * ratio)).ravel(), np.rint(np.sqrt(area / ratio)).ravel()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    return h[fits], w[fits], float(1 - fits.mean()) ** 10


@dataclass(frozen=True)
class Coverage:
    """Coverage of a set of objects, in [0, 1], by the name of the crop."""

    spec: str  # the data
    size: tuple[int, int]  # height and width of the crops
    mask_ratio: float  # share of the patches that is hidden
    objects: list[ImageObject]
    values: dict[str, Values]  # expected coverage of each object
    sampled: dict[str, tuple[Values, Values]]  # mean of each object's sampled coverage, and the variance of that mean
    problems: Problems  # of the annotations

    def means(self) -> dict[str, dict[str, float]]:
        """Return the means of each crop over images (each the mean of its objects) and over objects.

        "masked/..." are the same after masking. If crops were sampled, "simulated/..." is the mean over objects.
        """
        _, image, count = np.unique([o.image for o in self.objects], return_inverse=True, return_counts=True)
        weight = 1 / count[image] / len(count)
        means = {}
        for name, values in self.values.items():
            over = {"image": float((values * weight).sum()), "object": float(values.mean())}
            means[name] = over | {f"masked/{key}": (1 - self.mask_ratio) * value for key, value in over.items()}
            if name in self.sampled:
                mean, variance = self.sampled[name]
                means[name]["simulated/object"] = float(mean.mean())
                means[name]["simulated/error"] = math.sqrt(float(variance.sum())) / len(mean)
        return means

    def table(self) -> Table:
        """Return the means in per cent as a table for a terminal."""
        table = Table("object coverage", "images", "objects", f"images, {100 * self.mask_ratio:.4g}% masked", box=None)
        if self.sampled:
            table.add_column("objects, simulated")
        for name, mean in self.means().items():
            cells = [f"{100 * mean[key]:.1f} %" for key in ("image", "object", "masked/image")]
            if name in self.sampled:
                cells.append(f"{100 * mean['simulated/object']:.2f} ± {100 * mean['simulated/error']:.2f} %")
            table.add_row(name, *cells)
        return table

    def save(self, folder: Path) -> list[Path]:
        """Write coverage.json (means), coverage.csv (a line per object) and coverage.png; return their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"coverage.{suffix}" for suffix in ("json", "csv", "png")]
        content = {
            "data": self.spec,
            "size": self.size,
            "mask_ratio": self.mask_ratio,
            "left_out": self.problems.left_out,
            "objects": len(self.objects),
            "images": len({o.image for o in self.objects}),
            "means": self.means(),
            "versions": versions(),
        }
        rows: list[list[str]] = [["image", "share_of_image", *self.values]]
        for i, obj in enumerate(self.objects):
            rows.append([csv_cell(obj.image), f"{_area(obj):.6f}", *(f"{v[i]:.6f}" for v in self.values.values())])
        write_json(paths[0], content)
        write_csv(paths[1], rows)
        atomic_write(paths[2], partial(draw(self).save, format="PNG"))
        return paths


def measure_coverage(
    spec: str,
    size: tuple[int, int] = (224, 224),
    mask_ratio: float = 0.75,
    *,
    boxes: bool = False,
    draws: int = 0,
    seed: int = 0,
    console: Console | None = None,
) -> Coverage:
    """Measure the coverage of all annotated objects (see `annotations.read_objects`) by all crops of `crops`.

    With `boxes`, masks are replaced by their boxes. With `draws`, as many crops of each object are sampled as a check.
    Raises UserError if `mask_ratio` is not in [0, 1), a side is at most the padding of SRC, `draws` is 1, or the
    annotations cannot be read.
    """
    if not 0 <= mask_ratio < 1:
        raise UserError(f"--mask-ratio is a share from 0 to below 1, not {mask_ratio:g}")
    if min(size) <= SimpleResizedCrop.padding:
        raise UserError(
            f"--size must be above {SimpleResizedCrop.padding}, the padding of SRC, not {size[0]}x{size[1]}"
        )
    if draws == 1:
        raise UserError("--simulate takes 2 crops or more, for their standard error, or 0 for none: not 1")
    objects, problems = read_objects(spec)
    if boxes:
        objects = [ImageObject(o.image, o.size, o.box) for o in objects]
    values = {name: np.empty(len(objects)) for name in crops(size)}
    sampled = {name: (np.empty(len(objects)), np.empty(len(objects))) for name in values if draws}
    with progress(f"coverage of {spec}", len(objects), console) as advance:
        for i, obj in enumerate(objects):
            for name, crop in crops(size).items():
                values[name][i] = expected_coverage(obj, crop)
                if name in sampled:
                    coverages = sampled_coverage(obj, crop, draws, seed, i)
                    sampled[name][0][i], sampled[name][1][i] = coverages.mean(), coverages.var(ddof=1) / draws
            advance(i + 1)
    return Coverage(spec, size, mask_ratio, objects, values, sampled, problems)


@plot_style()
def draw(coverage: Coverage, bins: int = 10) -> Image.Image:
    """Plot the mean coverage against the object's share of its image, with equally many objects per point."""
    figure, axes = new_plot(5.6, 3.6)
    areas = np.array([_area(obj) for obj in coverage.objects])
    groups = np.array_split(np.argsort(areas, kind="stable"), min(bins, len(areas)))
    for (name, values), color in zip(coverage.values.items(), PLOT_COLORS, strict=False):
        points = [(100 * areas[group].mean(), 100 * values[group].mean()) for group in groups]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, linewidth=1.6, label=name, color=color)
    axes.set(xlabel="object's share of the image (%)", ylabel="object coverage (%)", ylim=(None, 101))
    axes.legend(frameon=False)
    return plot_image(figure)


def _area(obj: ImageObject) -> float:
    """Return the object's share of its image's area."""
    if obj.mask is not None:
        return float(obj.mask.mean())
    left, top, right, bottom = obj.box
    return (right - left) * (bottom - top) / (obj.size[0] * obj.size[1])
