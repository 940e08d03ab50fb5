"""Say whether a run learned something: what its encoder gained over its start, or over the untrained network."""

import re
from pathlib import Path
from shlex import quote
from typing import Any

from pixmim.config import ModelConfig, PretrainConfig
from pixmim.evaluation.best import BEST_FOLDER, MEASURES, find_key, read_best
from pixmim.evaluation.classification import difference_interval, wilson_interval
from pixmim.report.repeated import initial_cell
from pixmim.report.results import Cell, Comparison, Row
from pixmim.training.metric_logger import is_number, read_metrics
from pixmim.utils.console import label

COUNT = "knn/images"
"""Key of the number of test images in metrics.jsonl."""

_HEADLINES = [
    re.compile(title) for title in ("attentive probe", "linear probe", r"k-NN \(k = \d+\), mean of .*", "fine-tuned")
]
"""Labels of the values that a verdict may rest on, the best first."""


def gain_summary(config: PretrainConfig, folder: Path) -> list[str]:
    """Return lines for the end of a run: the comparison with its start, and its best encoder, if there are any."""
    lines, best = [describe_gain(config, read_metrics(folder / "metrics.jsonl"))], read_best(folder)
    if config.keep_best and best is None:
        lines.append(f"warning: --keep-best {config.keep_best} has kept no encoder: the measure has no value")
    elif config.keep_best:
        lines.append(f"best encoder: {best}, in {folder / BEST_FOLDER}")
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
    key = find_key(pattern, first)
    images = int(first[COUNT])
    if key is None or not 1 <= images == last[COUNT] or not all(_is_share(line.get(key)) for line in (first, last)):
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
        f"difference of {last[key] - first[key]:+.1f} points ({_range(low, high)}).{advice}"
    )


def verdict(
    config: ModelConfig | None, metrics: list[dict[str, Any]], comparison: Comparison, name: str, folder: Path
) -> str:
    """Return one or two sentences: whether a run learned something, by the best evidence there is; empty without any.

    That is, in this order: k-NN at its start and at its end; an evaluation of the trained and the untrained encoder; an
    evaluation of the trained one; the loss. `name` is that of the run in the comparison of all runs.
    """
    gain = describe_gain(config, metrics)
    if gain:
        return gain
    columns = comparison.columns
    trained = next((columns.index(each) for each in (name, "trained") if each in columns), None)
    for title in _HEADLINES:
        rows = [row for row in comparison.rows if title.fullmatch(row.label)]
        row = next((row for row in reversed(rows) if trained is not None and row.cells[trained] is not None), None)
        if row is not None and trained is not None and (cell := row.cells[trained]) is not None:
            return _judge(row, cell, initial_cell(comparison, row, name))
    losses = [line["loss"] for line in metrics if is_number(line.get("loss"))]
    if len(losses) < 2:
        return ""
    return (
        f"The loss went from {losses[0]:.3f} to {losses[-1]:.3f} in {metrics[-1]['step']:,} steps. Labels show "
        "whether the encoder is useful: "
        f"pixmim evaluate knn {quote(str(folder))} --train DATA --test DATA --untrained."
    )


def _judge(row: Row, cell: Cell, start: Cell | None) -> str:
    """Say whether a value is better than that of the initial weights: if their 95 % intervals do not overlap."""

    def shown(value: Cell) -> str:
        return value.text + f" ({value.range})" * bool(value.range)

    if start is None:
        return f"{row.label}: {shown(cell)}, on {row.on}. The untrained network was not measured: add --untrained."
    (low, high), (start_low, start_high) = cell.band, start.band
    learned = "It learned" if low > start_high else "It is worse than untrained" if high < start_low else ""
    return (
        f"{learned or 'It is not clear that it learned'}: {row.label} {shown(cell)}, on {row.on}, and "
        f"{shown(start)} with the initial weights."
    )


def _is_share(value: Any) -> bool:
    """Return True for a share in per cent: the file may be untrusted."""
    return is_number(value) and 0 <= value <= 100


def _range(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f}"
