"""Compare the encoder of a run with its start (--init), by the k-NN accuracy measured during training."""

from pathlib import Path
from shlex import quote
from typing import Any

from pixmim.config import ModelConfig, PretrainConfig
from pixmim.evaluation.best import BEST_FOLDER, MEASURES, find_key, read_best
from pixmim.evaluation.classification import difference_interval, wilson_interval
from pixmim.training.metric_logger import is_number, read_metrics
from pixmim.utils.console import label

COUNT = "knn/images"
"""Key of the number of test images in metrics.jsonl."""


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
    for the same test images is cautious.

    Args:
        config: Configuration of the run.
        metrics: Lines of its metrics.jsonl.

    Returns:
        The sentence; empty if the run has no --init, or was not measured on the same images before and after.
    """
    pattern = MEASURES["knn"].key
    lines = [line for line in metrics if is_number(line.get(COUNT)) and find_key(pattern, line)]
    if not isinstance(config, PretrainConfig) or not config.init or len(lines) < 2 or lines[0]["step"]:
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
    advice = f" Use the start itself: {quote(config.init)}." if high < 0 else ""
    return (
        f"The encoder is {verdict} its start: k-NN top-1 ({key.split('/')[1]}) on {images:,} images of "
        f"{label(config.knn.test, 120)} was {before} at the start and is {after} at step {last['step']:,}, a "
        f"difference of {last[key] - first[key]:+.1f} points ({_range(low, high)}).{advice}"
    )


def _is_share(value: Any) -> bool:
    """Return True for a share in per cent: the file may be untrusted."""
    return is_number(value) and 0 <= value <= 100


def _range(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f}"
