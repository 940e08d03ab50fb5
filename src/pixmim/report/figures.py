"""Curves as SVG and images as data URLs, for the HTML page."""

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from pixmim.evaluation.visualize import PLOT_COLORS, Pixels, new_plot, to_image
from pixmim.utils.console import plot_label
from pixmim.utils.plotting import Figure, FigureCanvasSVG, matplotlib

_MAX_POINTS = 2000
_MAX_SIDE = 1024  # pixels up to which an image is enlarged
_STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "pixmim", "font.family": "sans-serif", "font.size": 10}


def curve(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    x: str,
    y: str,
    marker: str = "",
    log: bool = False,
    dashed: Sequence[str] = (),
    line: tuple[float, str] | None = None,
) -> str:
    """Plot named series of (x, y) values as an SVG figure.

    Args:
        series: Values by name. Long series are thinned out.
        x: Label of the x axis.
        y: Label of the y axis.
        marker: matplotlib's marker of each point.
        log: Use a logarithmic y axis.
        dashed: Names of series drawn with dashes.
        line: Position and label of a vertical line.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = new_plot(5.2, 3.0)
        for i, (name, (xs, ys)) in enumerate(series.items()):
            style, thinned = "--" if name in dashed else "-", slice(None, None, -(-len(xs) // _MAX_POINTS) or 1)
            color = PLOT_COLORS[i % len(PLOT_COLORS)]
            axes.plot(xs[thinned], ys[thinned], style, marker=marker, markersize=3, linewidth=1.6, color=color)
        if line is not None:
            axes.axvline(line[0], color="#888", linewidth=1, linestyle=":")
            axes.annotate(
                line[1], (line[0], 0.97), xycoords=("data", "axes fraction"), xytext=(4, 0),
                textcoords="offset points", color="#666", fontsize=9, va="top",
            )  # fmt: skip
        axes.set(xlabel=x, ylabel=y, yscale="log" if log else "linear")
        if log:  # what was filtered out is zero but for rounding; four decades are enough to see
            axes.set_ylim(bottom=max(max(ys) for _, ys in series.values()) * 1e-5)
        if len(series) > 1:
            axes.legend(axes.get_lines()[: len(series)], [plot_label(name) for name in series], frameon=False)
        return _svg(figure)


def png(pixels: Pixels, min_side: int = 112) -> str:
    """Return an image (h w c) as a data URL, enlarged by a whole factor until its shorter side has `min_side` pixels.

    A narrow image is enlarged less.
    """
    image = to_image(pixels)
    factor = max(1, min(round(min_side / min(image.size)), _MAX_SIDE // max(image.size)))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a glyph is missing (the browser has it), or names are long
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
