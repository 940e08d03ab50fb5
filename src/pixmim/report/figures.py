"""Curves as SVG text, pictures as PNG data, both to stand inside the page."""

import base64
import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pixmim.config import Run
from pixmim.plotting import Axes, Figure, FigureCanvasSVG, matplotlib
from pixmim.terminal import plot_label

Picture = npt.NDArray[np.uint8]
"""Pixels (h w c), or several pictures (n h w c)."""

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


def drawn(images: Mapping[str, Float[Tensor, "b c h w"]], run: Run) -> dict[str, Picture]:
    """Images of values before normalisation as pictures to look at, by name; the first names the range for all.

    1 and 3 channels are drawn as grey and colour, 2 as the grey of the first, and more as the colour of the first
    three. In uint8, [0, 1] is black to white. Deep and measured images are rarely that, so each of them is drawn from
    the 1st to the 99th percentile of its values under the first name: of all three together where three are all, and
    of each channel by itself elsewhere, since each has a unit of its own. Less than the run's deviation is no range:
    an image without contrast stays without.
    """
    shown = {name: values[:, : 3 if values.shape[1] >= 3 else 1] for name, values in images.items()}
    first, whole = next(iter(shown.values())), next(iter(images.values()))
    low, high = torch.zeros(len(first), 1, 1, 1), torch.ones(len(first), 1, 1, 1)
    if run.pixels != "uint8":
        values = first.flatten(1)[:, None] if whole.shape[1] == 3 else first.flatten(2)
        # By numpy, since torch's quantile refuses large images.
        ends = np.percentile(values.numpy(), (1, 99), axis=2).astype(np.float32)
        low, high = torch.from_numpy(ends)[..., None, None]
    span = torch.maximum(high - low, torch.tensor(run.statistics[1])[: first.shape[1]].view(1, -1, 1, 1))
    return {
        name: np.asarray((((values - low) / span).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1))
        for name, values in shown.items()
    }


def sheet(columns: Mapping[str, Picture], gap: int = 2) -> Image.Image:
    """All pictures on one sheet: a row for each image, a column for each kind."""
    first = next(iter(columns.values()))
    n, h, w, c = first.shape
    paper = np.full((n * (h + gap) - gap, len(columns) * (w + gap) - gap, c), 255, np.uint8)
    for j, pictures in enumerate(columns.values()):
        for i, picture in enumerate(pictures):
            paper[i * (h + gap) : i * (h + gap) + h, j * (w + gap) : j * (w + gap) + w] = picture
    return Image.fromarray(paper.squeeze(-1) if c == 1 else paper)


def titled_sheet(columns: Mapping[str, Picture], shortest: int = 112) -> Image.Image:
    """The same with each column's name above it, small pictures enlarged by a whole factor."""
    factor = max(1, round(shortest / min(next(iter(columns.values())).shape[1:3])))
    larger = {name: pictures.repeat(factor, 1).repeat(factor, 2) for name, pictures in columns.items()}
    body, strip, gap = sheet(larger, gap=4).convert("RGB"), 18, 4
    paper = Image.new("RGB", (body.width, body.height + strip), "white")
    paper.paste(body, (0, strip))
    pen, width = ImageDraw.Draw(paper), (body.width + gap) // len(columns)
    for j, name in enumerate(columns):
        pen.text((j * width + 2, 3), name, fill="black", font=ImageFont.load_default(11))
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
