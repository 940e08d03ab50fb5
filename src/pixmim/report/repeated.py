"""Accuracy against the number of labels per class, and by block: figures, and the lines that say whether it helped."""

import re
from collections.abc import Iterator

from pixmim.report.results import Cell, Comparison, Row
from pixmim.utils.plotting import plot_curves

_KEY = re.compile(r"(shots|block)/([a-z0-9]{1,10})/((?:k([0-9]{1,9})/mean/)?(top1|balanced))")
_MAX_FIGURES, _MAX_TICKS = 24, 100
_AXES = {"shots": "labels per class", "block": "block"}
_CAPTIONS = {
    "shots": "Accuracy against the number of labels per class, {}. Bands: one standard deviation over draws of the "
    "labels; for plain accuracy with all labels, the 95 % interval over the test images.",
    "block": "Accuracy by block of the encoder, {}. Bands: the 95 % interval over the test images, or one standard "
    "deviation over folds.",
}


def figures(comparison: Comparison) -> list[tuple[str, str]]:
    """Return (caption, SVG) of the values of each probe, and of k-NN with its first k, against labels or blocks."""
    groups: dict[tuple[str, str, str], list[tuple[str, Row]]] = {}
    for match, title, row in _headlines(comparison):
        groups.setdefault((match[1], title, row.on), []).append((match[2], row))
    found = []
    for (kind, title, on), group in list(groups.items())[:_MAX_FIGURES]:
        group = group[:_MAX_TICKS]
        series, bands = {}, {}
        for i, name in enumerate(comparison.columns):
            points = [(x, cell) for x, (_, row) in enumerate(group) if (cell := row.cells[i]) is not None]
            if points:
                series[name] = [x for x, _ in points], [cell.value for _, cell in points]
                bands[name] = [cell.band for _, cell in points]
        svg = plot_curves(series, x=_AXES[kind], y="%", marker="o", ticks=[tick for tick, _ in group], bands=bands)
        found.append((_CAPTIONS[kind].format(f"{title}, on {on}"), svg))
    return found


def answers(comparison: Comparison) -> list[str]:
    """Return a line for each number of labels and each encoder: its accuracy, and what it gained over its start.

    The range in a line is over draws: each draw compares both encoders on the same labels.
    """
    lines = []
    for match, title, row in _headlines(comparison):
        for name, cell in zip(comparison.columns, row.cells, strict=True):
            if match[1] != "shots" or cell is None or name.endswith("untrained"):
                continue
            start = initial_cell(comparison, row, name)
            gain = f" (start {start.value:.1f} %, {_gain(cell, start)})" if start is not None else ""
            model = "" if name == "trained" else f"{name}, "
            lines.append(f"{model}{title} at {match[2]} labels per class: {cell.value:.1f} %{gain}")
    return lines


def initial_cell(comparison: Comparison, row: Row, name: str) -> Cell | None:
    """Return the cell of the initial weights of a model; several models may share them."""
    own = [f"{name}, untrained", "untrained"]
    return next((row.cells[comparison.columns.index(each)] for each in own if each in comparison.columns), None)


def _headlines(comparison: Comparison) -> Iterator[tuple[re.Match[str], str, Row]]:
    """Yield key, title and row of the accuracies by labels or block; of k-NN, those of the mean token and its first k.

    They are balanced accuracies where the classes of the test data differ in size.
    """
    found = [(match, row) for row in comparison.rows if (match := _KEY.fullmatch(row.key))]
    values = {(row.on, match[0]): [cell and round(cell.value, 3) for cell in row.cells] for match, row in found}
    uneven = {on for (on, key), v in values.items() if v != values.get((on, key.replace("top1", "balanced")), v)}
    first: dict[str, str] = {}
    for match, row in found:
        is_first = match[4] is None or first.setdefault(row.on, match[4]) == match[4]
        if is_first and match[5] == ("balanced" if row.on in uneven else "top1"):
            yield match, row.label.partition(": ")[2], row


def _gain(cell: Cell, start: Cell) -> str:
    gains = [a - b for a, b in zip(cell.each, start.each, strict=False)]
    spread = f"; {min(gains):+.1f} to {max(gains):+.1f} over {len(gains)} draws" if len(gains) > 1 else ""
    return f"{cell.value - start.value:+.1f}{spread}"
