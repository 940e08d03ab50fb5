"""Object coverage: the share of an object that a crop keeps, J = A2 / A1 (PixMIM, arXiv 2303.02416, section 4.2).

A1 is the object's area in the image, A2 the part of it inside the crop; pixels that the padding of SimpleResizedCrop
mirrors do not count. Random masking that hides a share r of the patches leaves (1 - r) J in expectation.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.console import Console
from rich.table import Table

from pixmim.evaluation.annotations import ImageObject, read_objects
from pixmim.evaluation.results import versions
from pixmim.transforms.crops import CenterCrop, Crop, RandomResizedCrop, SimpleResizedCrop, cover_size
from pixmim.utils import rng
from pixmim.utils.console import csv_cell, progress
from pixmim.utils.errors import UserError
from pixmim.utils.files import atomic_write, write_csv, write_text_atomically
from pixmim.utils.plotting import PLOT_COLORS, new_plot, plot_image

Values = npt.NDArray[np.float64]

_POINTS = 64  # of the quadrature over the area of RandomResizedCrop, and as many over its ratio


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
    quadrature over its area and ratio, with failing tries and the fallback.

    Raises:
        TypeError: For another crop.
    """
    if isinstance(crop, RandomResizedCrop):
        heights, widths, failed = _boxes(crop, obj.size)
        last = _inside(obj, crop.fallback(obj.size)) if failed else 0.0
        if failed == 1:
            return last
        rows = _along(obj, 0, lambda edge: window_cover(edge, heights[:, None], obj.size[0]))
        columns = _along(obj, 1, lambda edge: window_cover(edge, widths[:, None], obj.size[1]))
        return (1 - failed) * float(_kept(obj, rows, columns).mean()) + failed * last
    scale, (h, w), (height, width) = _scale(obj.size, crop), crop.shape, cover_size(obj.size, crop.shape)
    if isinstance(crop, SimpleResizedCrop):
        p = crop.padding
        rows = _along(obj, 0, lambda edge: window_cover(edge * scale[0] + p, h, height + 2 * p) / scale[0])
        columns = _along(obj, 1, lambda edge: window_cover(edge * scale[1] + p, w, width + 2 * p) / scale[1])
        return float(_kept(obj, rows, columns)[0])
    if isinstance(crop, CenterCrop):
        return float(_inside(obj, _window(obj, crop, ())))
    raise TypeError(f"{type(crop).__name__} has no expectation here")


def sampled_coverage(obj: ImageObject, crop: Crop, draws: int, seed: int = 0, index: int = 0) -> Values:
    """Return the coverage (draws) of an object by crops sampled from (seed, index), as in training."""
    numbers = rng.uniform(seed, f"coverage {index}", 0, np.arange(draws), max(crop.num_uniforms, 1)).tolist()
    return np.array([_inside(obj, _window(obj, crop, u[: crop.num_uniforms])) for u in numbers])


def _window(obj: ImageObject, crop: Crop, u: Sequence[float]) -> tuple[float, float, float, float]:
    """Return the part (top, left, height, width) of the image, in its own pixels, that the numbers `u` select."""
    if isinstance(crop, RandomResizedCrop):
        return crop.box(obj.size, u)
    corner = crop.offset_without_resize(cover_size(obj.size, crop.shape), u)
    assert corner is not None  # an image that just covers the crop is only cut
    y, x = _scale(obj.size, crop)
    return corner[0] / y, corner[1] / x, crop.shape[0] / y, crop.shape[1] / x


def _inside(obj: ImageObject, window: tuple[float, float, float, float]) -> float:
    """Return the share of an object inside one window."""
    top, left, h, w = window
    rows = _along(obj, 0, lambda edge: np.clip(edge - top, 0, h)[None])
    columns = _along(obj, 1, lambda edge: np.clip(edge - left, 0, w)[None])
    return float(_kept(obj, rows, columns)[0])


def _along(obj: ImageObject, axis: int, covered: Any) -> Values:
    """Return the covered share of an object's extent along an axis (0 down, 1 across): (k 1), or (k n) for n pixels of
    a mask. `covered` returns how much is covered before each of several edges."""
    if obj.mask is not None:
        edges = np.arange(obj.size[axis] + 1, dtype=np.float64)
    else:
        edges = np.array([obj.box[1 - axis], obj.box[3 - axis]])
    return np.diff(np.atleast_2d(covered(edges)), axis=1) / np.diff(edges)


def _kept(obj: ImageObject, rows: Values, columns: Values) -> Values:
    """Return the covered share of the object (k) from the covered shares of its rows and columns."""
    if obj.mask is None:
        return (rows * columns)[:, 0]
    return np.asarray(((rows @ obj.mask) * columns).sum(axis=1) / obj.mask.sum())


def _scale(size: tuple[int, int], crop: Crop) -> tuple[float, float]:
    """Return the pixels of the resized image per pixel of the image, down and across."""
    height, width = cover_size(size, crop.shape)
    return height / size[0], width / size[1]


def window_cover(edge: npt.ArrayLike, window: npt.ArrayLike, length: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return how many pixels of [0, edge] a random window covers in expectation, along one axis.

    The window begins at any whole pixel at which it fits, each with the same probability. It covers pixel j with
    probability min(j + 1, length - j, window, length - window + 1) / (length - window + 1); this is the sum of that up
    to `edge`, which may be within a pixel. The difference of two such values is the cover of an interval.

    Args:
        edge: Positions in [0, length].
        window: Length of the window.
        length: Length of the image. All three are broadcast.
    """
    t, w, n = (np.asarray(value, np.float64) for value in (edge, window, length))
    top = np.minimum(w, n - w + 1)  # starts that cover a pixel of the middle; also the pixels of either ramp
    whole = np.floor(t)
    up = np.minimum(whole, top)
    risen = up * (up + 1) / 2 + (whole - up) * top + (t - whole) * np.minimum(whole + 1, top)
    down = np.maximum(t - (n - top), 0)
    whole = np.floor(down)
    lost = whole * (whole - 1) / 2 + (down - whole) * whole
    return np.asarray((risen - lost) / (n - w + 1))


@lru_cache(256)
def _boxes(crop: RandomResizedCrop, size: tuple[int, int]) -> tuple[Values, Values, float]:
    """Return the heights and widths of the boxes of RandomResizedCrop that fit into an image of `size` (h, w), all
    equally likely, and the probability that none of ten tries fits."""
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
    """Coverage of a set of objects, in [0, 1], by the name of the crop.

    Attributes:
        spec: The data.
        size: (h, w) of the crops.
        mask_ratio: Share of the patches that is hidden.
        objects: The objects.
        values: Expected coverage of each object.
        drawn: Mean of each object's sampled coverage, and the variance of that mean.
        outside: Objects left out because no part of them is in their image.
    """

    spec: str
    size: tuple[int, int]
    mask_ratio: float
    objects: list[ImageObject]
    values: dict[str, Values]
    drawn: dict[str, tuple[Values, Values]]
    outside: int

    def means(self) -> dict[str, dict[str, float]]:
        """Return, for each crop, the mean over images (each the mean of its objects) and over objects; the same after
        masking; and the objects' mean by sampling with its standard error, if crops were sampled."""
        _, image, count = np.unique([o.image for o in self.objects], return_inverse=True, return_counts=True)
        weight = 1 / count[image] / len(count)
        found = {}
        for name, each in self.values.items():
            image_mean, object_mean = float((each * weight).sum()), float(each.mean())
            found[name] = {"image": image_mean, "object": object_mean}
            found[name] |= {f"masked/{k}": (1 - self.mask_ratio) * v for k, v in list(found[name].items())}
            if name in self.drawn:
                mean, variance = self.drawn[name]
                found[name]["simulated/object"] = float(mean.mean())
                found[name]["simulated/error"] = math.sqrt(float(variance.sum())) / len(mean)
        return found

    def table(self) -> Table:
        """Return the means in per cent as a table for a terminal."""
        table = Table("object coverage", "images", "objects", f"images, {self.mask_ratio:.0%} masked", box=None)
        if self.drawn:
            table.add_column("objects, simulated")
        for name, mean in self.means().items():
            cells = [f"{100 * mean[key]:.1f} %" for key in ("image", "object", "masked/image")]
            if name in self.drawn:
                cells.append(f"{100 * mean['simulated/object']:.2f} ± {100 * mean['simulated/error']:.2f} %")
            table.add_row(name, *cells)
        return table

    def save(self, folder: Path) -> list[Path]:
        """Write coverage.json (means), coverage.csv (a line per object) and coverage.png; return their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"coverage.{end}" for end in ("json", "csv", "png")]
        about = {"data": self.spec, "size": self.size, "mask_ratio": self.mask_ratio, "outside": self.outside}
        counts = {"objects": len(self.objects), "images": len({o.image for o in self.objects})}
        content = {**about, **counts, "means": self.means(), "versions": versions()}
        rows: list[list[str]] = [["image", "share_of_image", *self.values]]
        for i, obj in enumerate(self.objects):
            rows.append([csv_cell(obj.image), f"{_share(obj):.6f}", *(f"{v[i]:.6f}" for v in self.values.values())])
        write_text_atomically(paths[0], json.dumps(content, indent=2) + "\n")
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
    """Measure the coverage of all objects that `spec` names by all crops of `crops`.

    Args:
        spec: Annotations: see `annotations.read_objects`.
        size: (h, w) of the crops.
        mask_ratio: Share of the patches that is hidden.
        boxes: Use the boxes of masks instead of the masks.
        draws: Crops to sample for each object and crop, as a check; 0: none.
        seed: Seed of these.
        console: Where to show a progress bar.

    Raises:
        UserError: If `mask_ratio` is not in [0, 1), or the annotations cannot be read.
    """
    if not 0 <= mask_ratio < 1:
        raise UserError(f"--mask-ratio is a share from 0 to below 1, not {mask_ratio:g}")
    objects, outside = read_objects(spec)
    if boxes:
        objects = [ImageObject(o.image, o.size, o.box) for o in objects]
    every = crops(size)
    values = {name: np.empty(len(objects)) for name in every}
    drawn = {name: (np.empty(len(objects)), np.empty(len(objects))) for name in every if draws > 1}
    with progress(f"coverage of {spec}", len(objects), console) as advance:
        for i, obj in enumerate(objects):
            for name, crop in every.items():
                values[name][i] = expected_coverage(obj, crop)
                if name in drawn:
                    each = sampled_coverage(obj, crop, draws, seed, i)
                    drawn[name][0][i], drawn[name][1][i] = each.mean(), each.var(ddof=1) / draws
            advance(i + 1)
    return Coverage(spec, size, mask_ratio, objects, values, drawn, outside)


def draw(coverage: Coverage, bins: int = 10) -> Image.Image:
    """Plot the mean coverage against the object's share of its image, with equally many objects per point."""
    figure, axes = new_plot(5.6, 3.6)
    shares = np.array([_share(obj) for obj in coverage.objects])
    parts = np.array_split(np.argsort(shares, kind="stable"), min(bins, len(shares)))
    for (name, each), color in zip(coverage.values.items(), PLOT_COLORS, strict=False):
        points = [(100 * shares[part].mean(), 100 * each[part].mean()) for part in parts]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, linewidth=1.6, label=name, color=color)
    axes.set(xlabel="object's share of the image (%)", ylabel="object coverage (%)", ylim=(None, 101))
    axes.legend(frameon=False)
    return plot_image(figure)


def _share(obj: ImageObject) -> float:
    """Return the object's share of its image's area."""
    if obj.mask is not None:
        return float(obj.mask.mean())
    left, top, right, bottom = obj.box
    return (right - left) * (bottom - top) / (obj.size[0] * obj.size[1])
