"""Plots with matplotlib, imported without the configuration file of the current folder.

matplotlib reads a `matplotlibrc` in the current folder, which may belong to somebody else and could, for example, have
every label typeset by LaTeX, which runs programs. The user's own configuration file is still used; styles that a
notebook has set are not, so that plots are those of the command line.
"""

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import Image

from pixmim.utils.console import plot_label

with chdir(Path(__file__).parent):
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

__all__ = ["PLOT_COLORS", "Axes", "Figure", "matplotlib", "new_plot", "plot_curves", "plot_image", "plot_style"]

PLOT_COLORS = ("#1f5fbf", "#d1495b", "#2e8b57", "#8a5fbf", "#c77d0a", "#3b9ab2")

_MAX_POINTS = 2000
_SVG_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "pixmim", "font.family": "sans-serif", "font.size": 10}


@contextmanager
def plot_style(style: Any = None) -> Iterator[None]:
    """Use the settings of matplotlib's configuration file, and `style`, in a `with` statement or decorated function."""
    with matplotlib.rc_context():
        matplotlib.rc_file_defaults()
        matplotlib.rcParams.update(style or {})
        matplotlib.rcParams["text.usetex"] = False  # labels are names of files: no input for LaTeX
        yield


def new_plot(width: float, height: float) -> tuple[Figure, Axes]:
    """Return a figure of this size in inches, and its axes with a light grid and without a frame.

    Call it, and draw, within `plot_style`.
    """
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes: Axes = figure.add_subplot()
    axes.grid(color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_image(figure: Figure) -> Image.Image:
    """Rasterize a figure."""
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a missing glyph, or long names
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def plot_curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    marker: str = "",
    log: bool = False,
    dashed: Sequence[str] = (),
    line: tuple[float, str] | None = None,
    ticks: Sequence[str] = (),
    bands: Mapping[str, Sequence[tuple[float, float]]] = MappingProxyType({}),
) -> str:
    """Plot named series of (x, y) values as an SVG figure. Long series are subsampled.

    `line` is position and label of a vertical line, `ticks` are labels of x = 0, 1, 2, ..., and `bands` are the lower
    and upper ends of a band around each value of a series, by its name.
    """
    with plot_style(_SVG_STYLE):
        figure, axes = new_plot(5.2, 3.0)
        for i, (name, (xs, ys)) in enumerate(series.items()):
            style, every = "--" if name in dashed else "-", slice(None, None, -(-len(xs) // _MAX_POINTS) or 1)
            color = PLOT_COLORS[i % len(PLOT_COLORS)]
            axes.plot(xs[every], ys[every], style, marker=marker, markersize=3, linewidth=1.6, color=color)
            if name in bands:
                low, high = zip(*bands[name], strict=True)
                axes.fill_between(xs, low, high, color=color, alpha=0.15, linewidth=0)
        if ticks:
            axes.set_xticks(range(len(ticks)), [plot_label(tick) for tick in ticks])
        if line is not None:
            axes.axvline(line[0], color="#888", linewidth=1, linestyle=":")
            axes.annotate(
                line[1], (line[0], 0.97), xycoords=("data", "axes fraction"), xytext=(4, 0),
                textcoords="offset points", color="#666", fontsize=9, va="top",
            )  # fmt: skip
        axes.set(xlabel=x, ylabel=y, yscale="log" if log else "linear")
        if log:  # filtered frequencies are zero up to rounding: show five decades
            axes.set_ylim(bottom=max(max(ys) for _, ys in series.values()) * 1e-5)
        if len(series) > 1:
            axes.legend(axes.get_lines()[: len(series)], [plot_label(name) for name in series], frameon=False)
        buffer = io.StringIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a missing glyph (the browser has it), or long names
            FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
