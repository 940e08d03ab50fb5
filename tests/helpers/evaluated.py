"""Evaluations of encoders on disk."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pixmim.evaluation.evals import EVALS
from pixmim.evaluation.evaluate import State, evaluate_many
from pixmim.evaluation.results import Result


def evaluate(
    model: str, evaluations: list[tuple[str, Any]], folder: Path, *, untrained: bool = False, **options: Any
) -> Iterator[Result]:
    """Evaluate one encoder, or with `untrained` the initial weights of a run instead: see `evaluate_many`."""
    states: tuple[State, ...] = ("untrained",) if untrained else ("trained",)
    for result, _ in evaluate_many({model: folder}, evaluations, states, **options):
        yield result


def measured(name: str, folder: Path, train: str, test: str, **options: object) -> Result:
    """Run one evaluation of the encoder in a folder on the CPU."""
    settings = EVALS[name].settings(train, test)
    (result,) = evaluate(str(folder), [(name, settings)], folder, device="cpu", **options)
    return result
