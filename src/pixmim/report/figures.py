"""Curves as SVG text, pictures as PNG data, both to stand inside the page."""

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pixmim.evaluation.visualize import Picture
from pixmim.utils.console import label, plot_label
from pixmim.utils.plotting import Axes, Figure, FigureCanvasSVG, matplotlib

COLOURS = ("#1f5fbf", "#d1495b", "#2e8b57", "#8a5fbf", "#c77d0a", "#3b9ab2")

_MOST_POINTS = 2000

_LARGEST = 1024
"""Pixels of the longer edge up to which a picture is enlarged."""

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "pixmim",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
}


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
    """Named series of (x, y) values as one SVG figure. `line`: a vertical mark (place, label).

    Of very long series, some points are drawn.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 3.0), layout="constrained")
        axes: Axes = figure.add_subplot()
        for i, (name, (xs, ys)) in enumerate(series.items()):
            style, some = "--" if name in dashed else "-", slice(None, None, -(-len(xs) // _MOST_POINTS) or 1)
            axes.plot(xs[some], ys[some], style, marker=marker, markersize=3, linewidth=1.6, color=_colour(i))
        if line is not None:
            axes.axvline(line[0], color="#888", linewidth=1, linestyle=":")
            axes.annotate(
                line[1], (line[0], 0.97), xycoords=("data", "axes fraction"), xytext=(4, 0),
                textcoords="offset points", color="#666", fontsize=9, va="top",
            )  # fmt: skip
        axes.set(xlabel=x, ylabel=y, yscale="log" if log else "linear")
        if log:  # what was filtered away is zero but for rounding; the eye needs four decades
            axes.set_ylim(bottom=max(max(ys) for _, ys in series.values()) * 1e-5)
        if len(series) > 1:
            axes.legend(axes.get_lines()[: len(series)], [plot_label(name) for name in series])
        return _svg(figure)


def png(picture: Picture, shortest: int = 112) -> str:
    """A picture (h w c) as a data URL, enlarged by a whole factor until its shorter edge has `shortest` pixels.

    A narrow one is enlarged less.
    """
    image = Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture)
    factor = max(1, min(round(shortest / min(image.size)), _LARGEST // max(image.size)))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def sheet(columns: Mapping[str, Picture], gap: int = 2, below: int = 0) -> Image.Image:
    """All pictures on one sheet: a row for each image, a column for each kind, and room below each row."""
    first = next(iter(columns.values()))
    n, h, w, c = first.shape
    down = h + below + gap
    paper = np.full((n * down - gap, len(columns) * (w + gap) - gap, c), 255, np.uint8)
    for j, pictures in enumerate(columns.values()):
        for i, picture in enumerate(pictures):
            paper[i * down : i * down + h, j * (w + gap) : j * (w + gap) + w] = picture
    return Image.fromarray(paper.squeeze(-1) if c == 1 else paper)


def titled_sheet(columns: Mapping[str, Picture], names: Sequence[str], shortest: int = 112) -> Image.Image:
    """The same with each column's name above it and each row's below it, small pictures enlarged by a whole factor."""
    factor = max(1, round(shortest / min(next(iter(columns.values())).shape[1:3])))
    larger = {name: pictures.repeat(factor, 1).repeat(factor, 2) for name, pictures in columns.items()}
    strip, gap = 18, 4
    body = sheet(larger, gap=gap, below=strip).convert("RGB")
    paper = Image.new("RGB", (body.width, body.height + strip), "white")
    paper.paste(body, (0, strip))
    pen, font = ImageDraw.Draw(paper), ImageFont.load_default(11)
    width, height = (body.width + gap) // len(columns), (body.height + gap) // len(names)
    for j, title in enumerate(columns):
        pen.text((j * width + 2, 3), title, fill="black", font=font)
    for i, name in enumerate(names):
        pen.text((2, (i + 1) * height), label(name, max(12, body.width // 7)), fill="#666", font=font)
    return paper


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a glyph is missing (the browser has it), or names are long
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
