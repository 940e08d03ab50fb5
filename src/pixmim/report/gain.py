"""Say what an encoder gained over its start or the untrained network: by run, number of labels per class, and block."""

import re
from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Any

from pixmim.config import ModelConfig, PretrainConfig
from pixmim.evaluation.best import BEST_FOLDER, MEASURES, find_key, read_best
from pixmim.evaluation.classification import difference_interval, wilson_interval
from pixmim.evaluation.evals import labels_per_class
from pixmim.report.results import Cell, Comparison, Row
from pixmim.training.metric_logger import is_number, read_metrics
from pixmim.utils.console import label
from pixmim.utils.plotting import plot_curves

COUNT = "knn/images"  # key of the number of test images in metrics.jsonl

_HEADLINES = [
    re.compile(title) for title in ("attentive probe", "linear probe", r"k-NN \(k = \d+\), mean of", "fine-tuned")
]
"""Beginnings of the labels of the accuracies that a verdict may rest on, the best first."""

_LABELS_OR_BLOCK = re.compile(r"(shots|block)/([a-z0-9]{1,10})/((?:k([0-9]{1,9})/mean/)?(top1|balanced))")
_MAX_FIGURES, _MAX_TICKS = 24, 100
_AXES = {"shots": "labels per class", "block": "block"}
_CAPTIONS = {
    "shots": "Accuracy against the number of labels per class, {}. Bands: one standard deviation over draws of the "
    "labels; for plain accuracy with all labels, the 95 % interval over the test images.",
    "block": "Accuracy by block of the encoder, {}. Bands: the 95 % interval over the test images, or one standard "
    "deviation over folds.",
}


def gain_summary(config: PretrainConfig, folder: Path) -> list[str]:
    """Return lines for the end of a run: the comparison with its start, and its best encoder, if there are any."""
    lines, best = [describe_gain(config, read_metrics(folder / "metrics.jsonl"))], read_best(folder)
    if config.keep_best and best is None:
        lines.append(f"warning: --keep-best {config.keep_best} has kept no encoder: the measure has no value")
    elif config.keep_best:
        lines.append(f"best encoder: {best}, in {Path(config.out) / BEST_FOLDER}")
    return [line for line in lines if line]


def describe_gain(config: ModelConfig | None, metrics: list[dict[str, Any]]) -> str:
    """Return a sentence: whether the newest measured encoder is better than the start, with 95 % intervals.

    The difference counts only if its interval excludes zero. It treats both measurements as independent samples, which
    for the same test images is cautious. Empty if the run was not measured on the same images before and after.
    """
    pattern = MEASURES["knn"].key
    lines = [line for line in metrics if is_number(line.get(COUNT)) and find_key(pattern, line)]
    if not isinstance(config, PretrainConfig) or len(lines) < 2 or lines[0]["step"]:
        return ""
    first, last = lines[0], lines[-1]
    key, images = find_key(pattern, first) or "", int(first[COUNT])
    shares: list[Any] = [line.get(key) for line in (first, last)]  # the file may be untrusted
    if not 1 <= images == last[COUNT] or not all(is_number(share) and 0 <= share <= 100 for share in shares):
        return ""
    correct = [round(line[key] * images / 100) for line in (first, last)]
    low, high = difference_interval(correct[0], images, correct[1], images)
    verdict = "better than" if low > 0 else "worse than" if high < 0 else "not clearly different from"
    before, after = (f"{100 * n / images:.1f} % ({_range(*wilson_interval(n, images))})" for n in correct)
    advice = f" Use the start itself: {quote(config.init)}." if config.init and high < 0 else ""
    start = "its start" if config.init else "its start, random weights"
    return (
        f"The encoder is {verdict} {start}: k-NN top-1 ({key.split('/')[1]}) on {images:,} images of "
        f"{label(config.knn.test, 120)} was {before} at the start and is {after} at step {last['step']:,}, a "
        f"difference of {last[key] - first[key]:+z.1f} points ({_range(low, high)}).{advice}"
    )


def verdict(
    config: ModelConfig | None, metrics: list[dict[str, Any]], comparison: Comparison, model: int, folder: Path
) -> str:
    """Return one or two sentences: whether a run learned something, by the best evidence there is; empty without any.

    That is, in this order: k-NN at its start and at its end; an evaluation of the trained and the untrained encoder; an
    evaluation of the trained one; the loss. `model` is the run's number in the comparison of all runs.
    """
    gain = describe_gain(config, metrics)
    if gain:
        return gain
    trained, start = comparison.pairs[model]
    for title in _HEADLINES:
        for row in reversed(comparison.rows):  # the most labels come last
            cell = None if trained is None else row.cells[trained]
            if cell is not None and row.key.endswith("top1") and title.match(_title(row)):
                return _judge(row, cell, None if start is None else row.cells[start])
    losses = [line["loss"] for line in metrics if is_number(line.get("loss"))]
    if len(losses) < 2:
        return ""
    return (
        f"The loss went from {losses[0]:.3f} to {losses[-1]:.3f} in {metrics[-1]['step']:,} steps. Labels show "
        "whether the encoder is useful: "
        f"pixmim evaluate knn {quote(str(folder))} --train DATA --test DATA --untrained."
    )


def _title(row: Row) -> str:
    return row.label.partition(": ")[2] if row.key.startswith("shots/") else row.label


def _judge(row: Row, cell: Cell, start: Cell | None) -> str:
    """Say whether a value is better than that of the initial weights: if both have a band, and these do not overlap."""

    def shown(value: Cell) -> str:
        return value.text + f" ({value.range})" * bool(value.range)

    if start is None:
        return f"{row.label}: {shown(cell)}, on {row.on}. The untrained network was not measured: add --untrained."
    (low, high), (start_low, start_high) = cell.band, start.band
    learned = "It learned" if low > start_high else "It is worse than untrained" if high < start_low else ""
    if any(value.low is None and value.deviation is None for value in (cell, start)):
        learned = ""
    return (
        f"{learned or 'It is not clear that it learned'}: {row.label} {shown(cell)}, on {row.on}, and "
        f"{shown(start)} with the initial weights."
    )


def _range(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f}"


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

    The range in a line is over draws: each draw compares both encoders on the same labels. The data are named if there
    are several.
    """
    lines, found = [], [each for each in _headlines(comparison) if each[0][1] == "shots"]
    several = len({row.on for _, _, row in found}) > 1
    for match, title, row in found:
        labels = labels_per_class(match[2]) + f" on {row.on}" * several
        for trained, initial in comparison.pairs:
            if trained is None or (cell := row.cells[trained]) is None:
                continue
            start = None if initial is None else row.cells[initial]
            gain = f" (start {start.value:.1f} %, {_gain(cell, start)})" if start is not None else ""
            model = f"{comparison.columns[trained]}, " if len(comparison.pairs) > 1 else ""
            lines.append(f"{model}{title} with {labels}: {cell.value:.1f} %{gain}")
    return lines


def _headlines(comparison: Comparison) -> Iterator[tuple[re.Match[str], str, Row]]:
    """Yield key, title and row of the accuracies by labels or block; of k-NN, those of the mean token and its first k.

    They are balanced accuracies where the classes of the test data differ in size.
    """
    found = [(match, row) for row in comparison.rows if (match := _LABELS_OR_BLOCK.fullmatch(row.key))]
    values = {(row.on, match[0]): [cell and round(cell.value, 3) for cell in row.cells] for match, row in found}
    uneven = {on for (on, key), v in values.items() if v != values.get((on, key.replace("top1", "balanced")), v)}
    first: dict[str, str] = {}
    for match, row in found:
        is_first = match[4] is None or first.setdefault(row.on, match[4]) == match[4]
        if is_first and match[5] == ("balanced" if row.on in uneven else "top1"):
            yield match, row.label.partition(": ")[2], row


def _gain(cell: Cell, start: Cell) -> str:
    gains = [a - b for a, b in zip(cell.each, start.each, strict=False)]
    spread = f"; {min(gains):+z.1f} to {max(gains):+z.1f} over {len(gains)} draws" if len(gains) > 1 else ""
    return f"{cell.value - start.value:+z.1f}{spread}"
