"""Says how good an encoder is. One literal dict names the evaluations."""

from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from torch import nn

from pixmim.config import Run
from pixmim.data import open_data
from pixmim.data.skipped import Skipped
from pixmim.engine.device import Precision, choose_device, choose_precision
from pixmim.errors import UserError, nearest
from pixmim.evaluate.encoder import in_training, of_model
from pixmim.evaluate.features import Frozen, freeze
from pixmim.evaluate.knn import knn
from pixmim.evaluate.linear import linear
from pixmim.evaluate.results import Result, versions
from pixmim.parts import image_form

EVALUATIONS: dict[str, Callable[[Frozen, Frozen], Iterator[tuple[str, float]]]] = {"knn": knn, "linear": linear}


def evaluate(
    name: str,
    folder: Path,
    train: str,
    test: str,
    *,
    untrained: bool = False,
    device: str = "auto",
    precision: Precision = "auto",
    console: Console | None = None,
) -> Result:
    """Measure a finished run's encoder, or the untrained one it began as, on two labelled data sets.

    Raises UserError for an unknown evaluation, a folder that is no finished run, or data without labels.
    """
    if name not in EVALUATIONS:
        raise UserError(f"there is no evaluation '{name}'{nearest(name, EVALUATIONS)} Known: {', '.join(EVALUATIONS)}")
    encoder = of_model(str(folder), device=device, precision=precision, untrained=untrained)
    frozen = []
    for spec in (train, test):
        data = open_data(spec, encoder.form)
        frozen.append(
            freeze(encoder, data, Skipped(folder / "evaluations-skipped.csv", len(data), 0.25), console=console)
        )
    values = dict(EVALUATIONS[name](*frozen))
    which = "untrained" if untrained else "trained"
    return Result(name, which, encoder.step, train, test, values, versions())


def knn_watch(run: Run) -> Callable[[nn.Module], dict[str, float]] | None:
    """What measures k-NN while a run trains, for `pretrain`; None if the run does not ask for it. Raises UserError."""
    if not run.knn.every:
        return None
    if not (run.knn.train and run.knn.test):
        raise UserError("--knn.every needs labelled data: give --knn.train and --knn.test")
    sets = [open_data(spec, image_form(run)) for spec in (run.knn.train, run.knn.test)]
    if any(data.labels is None for data in sets):
        raise UserError("--knn.train and --knn.test need classes: one subfolder for each, or a column of them (label=)")
    device = choose_device(run.device)
    precision = choose_precision(run.precision, device)

    def watch(module: nn.Module) -> dict[str, float]:
        encoder = in_training(run, module, device, precision)
        train, test = (freeze(encoder, data) for data in sets)
        return {f"knn/{key}": value for key, value in knn(train, test) if key.count("/") == 1}

    return watch
