"""Helpers of tests: evaluated."""

from pathlib import Path

from pixmim.evaluation.evaluate import evaluate
from pixmim.evaluation.results import Result
from pixmim.evaluation.settings import PROTOCOLS


def measured(name: str, folder: Path, train: str, test: str, **options: object) -> Result:
    """One evaluation of the encoder in a folder, on the CPU."""
    settings = PROTOCOLS[name].settings(train, test)
    (result,) = evaluate(str(folder), [(name, settings)], folder, device="cpu", **options)  # type: ignore[arg-type]
    return result
