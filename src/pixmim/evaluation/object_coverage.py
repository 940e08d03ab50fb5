"""Object coverage: the share of an object that a crop keeps, J = A2 / A1 (PixMIM, arXiv 2303.02416, section 4.2).

A1 is the object's area in the image, A2 what of it lies inside the crop; pixels that SRC's padding mirrors do not
count. Random masking that hides a share r of the patches leaves (1 - r) J in expectation, whatever the object.
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
from rich.console import Console
from rich.table import Table

from pixmim.evaluation.boxes import Object, read_objects
from pixmim.evaluation.metrics import window_cover
from pixmim.evaluation.results import versions
from pixmim.transforms.crops import CentreCrop, Crop, RandomResizedCrop, SimpleResizedCrop, cover
from pixmim.utils import rng
from pixmim.utils.console import csv_cell
from pixmim.utils.errors import UserError
from pixmim.utils.files import atomic_write, write_csv, write_whole
from pixmim.utils.plotting import Figure
from pixmim.utils.progress import progress

Values = npt.NDArray[np.float64]

_POINTS = 64  # of the quadrature over RRC's area, and as many over its ratio


def crops(size: tuple[int, int]) -> dict[str, Crop]:
    """The crops that are compared, by name: MAE's, PixMIM's, its ablation's and SimMIM's."""
    return {
        "RRC (0.2, 1)": RandomResizedCrop(size),
        "SRC": SimpleResizedCrop(size),
        "CC": CentreCrop(size),
        "RRC (0.67, 1)": RandomResizedCrop(size, scale=(0.67, 1.0)),
    }


def expected(thing: Object, crop: Crop) -> float:
    """The expectation of an object's coverage, in [0, 1].

    Exact for SRC and CC. For RRC exact over the places of each box, and by quadrature over its area and ratio, tries
    that fail and the fallback included. Raises TypeError for a crop that is none of the three.
    """
    if isinstance(crop, RandomResizedCrop):
        heights, widths, failed = _boxes(crop, thing.size)
        last = _inside(thing, crop.fallback(thing.size)) if failed else 0.0
        if failed == 1:
            return last
        rows = _along(thing, 0, lambda edge: window_cover(edge, heights[:, None], thing.size[0]))
        columns = _along(thing, 1, lambda edge: window_cover(edge, widths[:, None], thing.size[1]))
        return (1 - failed) * float(_kept(thing, rows, columns).mean()) + failed * last
    scale, (h, w), (height, width) = _scale(thing.size, crop), crop.shape, cover(thing.size, crop.shape)
    if isinstance(crop, SimpleResizedCrop):
        p = crop.padding
        rows = _along(thing, 0, lambda edge: window_cover(edge * scale[0] + p, h, height + 2 * p) / scale[0])
        columns = _along(thing, 1, lambda edge: window_cover(edge * scale[1] + p, w, width + 2 * p) / scale[1])
        return float(_kept(thing, rows, columns)[0])
    if isinstance(crop, CentreCrop):
        return float(_inside(thing, _window(thing, crop, ())))
    raise TypeError(f"{type(crop).__name__} has no expectation here")


def simulated(thing: Object, crop: Crop, draws: int, seed: int = 0, index: int = 0) -> Values:
    """An object's coverage by crops that are drawn, as in training, from (seed, index): (draws,) in [0, 1]."""
    numbers = rng.uniform(seed, f"coverage {index}", 0, np.arange(draws), max(crop.draws, 1)).tolist()
    return np.array([_inside(thing, _window(thing, crop, u[: crop.draws])) for u in numbers])


def _window(thing: Object, crop: Crop, u: Sequence[float]) -> tuple[float, float, float, float]:
    """The part (top, left, height, width) of the image, in its own pixels, that the numbers `u` decide."""
    if isinstance(crop, RandomResizedCrop):
        return crop.box(thing.size, u)
    corner = crop.corner(cover(thing.size, crop.shape), u)
    assert corner is not None  # an image that just covers the crop is only cut
    y, x = _scale(thing.size, crop)
    return corner[0] / y, corner[1] / x, crop.shape[0] / y, crop.shape[1] / x


def _inside(thing: Object, window: tuple[float, float, float, float]) -> float:
    """The share of an object inside one window."""
    top, left, h, w = window
    rows = _along(thing, 0, lambda edge: np.clip(edge - top, 0, h)[None])
    columns = _along(thing, 1, lambda edge: np.clip(edge - left, 0, w)[None])
    return float(_kept(thing, rows, columns)[0])


def _along(thing: Object, axis: int, covered: Any) -> Values:
    """The share of the object's extent along an axis (0 down, 1 across) that is covered: (k 1), or of each pixel of
    its mask (k n). `covered` gives how much is covered before each of several edges."""
    if thing.mask is not None:
        edges = np.arange(thing.size[axis] + 1, dtype=np.float64)
    else:
        edges = np.array([thing.box[1 - axis], thing.box[3 - axis]])
    return np.diff(np.atleast_2d(covered(edges)), axis=1) / np.diff(edges)


def _kept(thing: Object, rows: Values, columns: Values) -> Values:
    """The share of the object that is covered, (k,): rows and columns are covered apart."""
    if thing.mask is None:
        return (rows * columns)[:, 0]
    return np.asarray(((rows @ thing.mask) * columns).sum(axis=1) / thing.mask.sum())


def _scale(size: tuple[int, int], crop: Crop) -> tuple[float, float]:
    """Pixels of the resized image per pixel of the image, down and across."""
    height, width = cover(size, crop.shape)
    return height / size[0], width / size[1]


@lru_cache(256)
def _boxes(crop: RandomResizedCrop, size: tuple[int, int]) -> tuple[Values, Values, float]:
    """Heights and widths of RRC's boxes that fit into an image of `size` (h, w), each as likely, and the probability
    that none of ten tries fits."""
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
    """What crops keep of a set of objects: values in [0, 1] of each object, by the crop's name.

    outside  objects that were left out, since none of them lies in its image
    drawn    of simulated crops, each object's mean and the variance of that mean, by the crop's name
    """

    spec: str
    size: tuple[int, int]
    mask_ratio: float
    objects: list[Object]
    values: dict[str, Values]
    drawn: dict[str, tuple[Values, Values]]
    outside: int

    def means(self) -> dict[str, dict[str, float]]:
        """For each crop: the mean of images (each the mean of its objects) and of objects; the same after masking;
        and, where crops were drawn, the objects' mean by simulation with its standard error."""
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
        """The means in per cent, for a terminal."""
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
        """Write coverage.json (means), coverage.csv (a line for each object) and coverage.png; gives their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"coverage.{end}" for end in ("json", "csv", "png")]
        about = {"data": self.spec, "size": self.size, "mask_ratio": self.mask_ratio, "outside": self.outside}
        counts = {"objects": len(self.objects), "images": len({o.image for o in self.objects})}
        content = {**about, **counts, "means": self.means(), "versions": versions()}
        rows: list[list[str]] = [["image", "share_of_image", *self.values]]
        for i, thing in enumerate(self.objects):
            rows.append([csv_cell(thing.image), f"{_share(thing):.6f}", *(f"{v[i]:.6f}" for v in self.values.values())])
        write_whole(paths[0], json.dumps(content, indent=2) + "\n")
        write_csv(paths[1], rows)
        atomic_write(paths[2], partial(draw(self).savefig, dpi=110, format="png"))
        return paths


def measure(
    spec: str,
    size: tuple[int, int] = (224, 224),
    mask_ratio: float = 0.75,
    *,
    boxes: bool = False,
    draws: int = 0,
    seed: int = 0,
    console: Console | None = None,
) -> Coverage:
    """The coverage of every object that `spec` tells of (see `read_objects`) by every crop of `crops`.

    boxes  take the boxes of masks
    draws  crops to draw for each object and crop as well

    Raises UserError.
    """
    if not 0 <= mask_ratio < 1:
        raise UserError(f"--mask-ratio is a share from 0 to below 1, not {mask_ratio:g}")
    objects, outside = read_objects(spec)
    if boxes:
        objects = [Object(o.image, o.size, o.box) for o in objects]
    every = crops(size)
    values = {name: np.empty(len(objects)) for name in every}
    drawn = {name: (np.empty(len(objects)), np.empty(len(objects))) for name in every if draws > 1}
    with progress(f"coverage of {spec}", len(objects), console) as advance:
        for i, thing in enumerate(objects):
            for name, crop in every.items():
                values[name][i] = expected(thing, crop)
                if name in drawn:
                    each = simulated(thing, crop, draws, seed, i)
                    drawn[name][0][i], drawn[name][1][i] = each.mean(), each.var(ddof=1) / draws
            advance(i + 1)
    return Coverage(spec, size, mask_ratio, objects, values, drawn, outside)


def draw(coverage: Coverage, bins: int = 10) -> Figure:
    """Mean coverage against the object's share of its image, with as many objects in each point."""
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    shares = np.array([_share(thing) for thing in coverage.objects])
    parts = np.array_split(np.argsort(shares, kind="stable"), min(bins, len(shares)))
    colours = ("#d1495b", "#1f5fbf", "#2e8b57", "#c77d0a")
    for (name, each), colour in zip(coverage.values.items(), colours, strict=True):
        points = [(100 * shares[part].mean(), 100 * each[part].mean()) for part in parts]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3.5, linewidth=1.6, label=name, color=colour)
    axes.set(xlabel="object's share of the image (%)", ylabel="object coverage (%)", ylim=(None, 101))
    axes.grid(color="#e6e6e6")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def _share(thing: Object) -> float:
    """The object's share of its image's area."""
    if thing.mask is not None:
        return float(thing.mask.mean())
    left, top, right, bottom = thing.box
    return (right - left) * (bottom - top) / (thing.size[0] * thing.size[1])
