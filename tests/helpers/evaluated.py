"""Single evaluations of encoders on disk."""

from pathlib import Path

from pixmim.evaluation.evals import EVALS
from pixmim.evaluation.evaluate import evaluate
from pixmim.evaluation.results import Result


def measured(name: str, folder: Path, train: str, test: str, **options: object) -> Result:
    """Run one evaluation of the encoder in a folder on the CPU."""
    settings = EVALS[name].settings(train, test)
    (result,) = evaluate(str(folder), [(name, settings)], folder, device="cpu", **options)  # type: ignore[arg-type]
    return result
