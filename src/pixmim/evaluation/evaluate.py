"""Says how good an encoder is. One literal dict names the evaluations; their settings stand in `protocols/`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from pixmim.build import image_form
from pixmim.config import PretrainConfig
from pixmim.data import open_dataset
from pixmim.evaluation import detection, finetune, knn, robustness, segmentation, shape_bias
from pixmim.evaluation import linear_probe as linear
from pixmim.evaluation.classification import check_labelled
from pixmim.evaluation.context import Bench, Values
from pixmim.evaluation.features import freeze
from pixmim.evaluation.frozen_encoder import in_training, of_model, sameness
from pixmim.evaluation.results import Result, versions
from pixmim.evaluation.settings import PROTOCOLS
from pixmim.training.precision import Precision, choose_device, choose_precision
from pixmim.utils.console import say
from pixmim.utils.errors import UserError, nearest

EVALUATIONS: dict[str, Callable[[Bench, Any], Values]] = {
    "knn": knn.measure,
    "linear": linear.measure,
    "finetune": finetune.measure,
    "segmentation": segmentation.measure,
    "detection": detection.measure,
    "robustness": robustness.measure,
    "shape-bias": shape_bias.measure,
}

CHECKS: dict[str, Callable[[Bench, Any], object]] = {
    "knn": knn.check,
    "linear": linear.check,
    "finetune": finetune.check,
    "segmentation": segmentation.check,
    "detection": detection.check,
    "robustness": robustness.check,
    "shape-bias": shape_bias.check,
}
"""What refuses data and settings of each evaluation before the first one starts: all that can be known by then."""


def evaluate(
    model: str,
    evaluations: list[tuple[str, Any]],
    folder: Path,
    *,
    untrained: bool = False,
    device: str = "auto",
    precision: Precision = "auto",
    console: Console | None = None,
    known: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Iterator[Result]:
    """Measure an encoder in one or several ways; features are computed once for all of them.

    model        a run, an imported folder, a file of weights, or timm:NAME
    evaluations  (name, settings): a key of EVALUATIONS, and that protocol's settings
    folder       where results and unfinished work are kept
    untrained    measure the weights that a run began with instead
    known        what a file does not say of its model: see `pretrained.open_model`
    overwrite    replace a classifier that was fine-tuned with other settings, and train one again that is there

    Yields each evaluation's result as soon as it is there. Raises UserError for an unknown evaluation, for what holds
    no encoder, and for data that do not suit: before the first evaluation starts.
    """
    _known(evaluations)
    encoder = of_model(model, device=device, precision=precision, untrained=untrained, known=known)
    for line in encoder.notes:
        say(console or Console(quiet=True), line)
    which = "untrained" if untrained else "trained"
    yield from measure(Bench(encoder, folder, which, console, overwrite), model, evaluations)


def side_by_side(
    models: Mapping[str, Path],
    evaluations: list[tuple[str, Any]],
    *,
    untrained: bool = False,
    device: str = "auto",
    precision: Precision = "auto",
    console: Console | None = None,
    known: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Iterator[tuple[Result, Path]]:
    """Measure several encoders in the same ways.

    models     what is measured, each as for `evaluate`, with the folder where its results are kept
    untrained  measure the weights that each run began with as well: once, where several began with the same
    known      what their files do not say of them: see `pretrained.open_model`
    overwrite  as for `evaluate`

    Yields each result, and its folder, as soon as it is there. Raises UserError as `evaluate` does, for each of several
    models before any is measured.
    """
    _known(evaluations)
    for model, folder in models.items() if len(models) > 1 or untrained else ():
        encoder = of_model(model, device=device, precision=precision, known=known)
        _check(Bench(encoder, folder, overwrite=overwrite), evaluations)
        if untrained:
            encoder = of_model(model, device=device, precision=precision, untrained=True)
            tunings = [each for each in evaluations if each[0] == "finetune"]  # these keep a classifier of their own
            _check(Bench(encoder, folder, "untrained", overwrite=overwrite), tunings)
    begun: dict[str, list[Result]] = {}
    for model, folder in models.items():
        if untrained:
            encoder = of_model(model, device=device, precision=precision, untrained=True)
            start = sameness(encoder)
            for result in begun.get(start, []):
                yield replace(result, model=model), folder
            if start not in begun:
                begun[start] = []
                for result in measure(Bench(encoder, folder, "untrained", console, overwrite), model, evaluations):
                    begun[start].append(result)
                    yield result, folder
        how: Any = {"device": device, "precision": precision, "console": console, "known": known}
        how["overwrite"] = overwrite
        for result in evaluate(model, evaluations, folder, **how):
            yield result, folder


def _known(evaluations: list[tuple[str, Any]]) -> None:
    """Raise UserError for an unknown evaluation."""
    for name, _ in evaluations:
        if name not in EVALUATIONS:
            names = ", ".join(EVALUATIONS)
            raise UserError(f"there is no evaluation '{name}'{nearest(name, EVALUATIONS)} Known: {names}")


def _check(bench: Bench, evaluations: list[tuple[str, Any]]) -> None:
    """Raise UserError for data and settings of any of these evaluations. Measures nothing."""
    for name, settings in evaluations:
        try:
            CHECKS[name](bench, settings)
        except UserError as error:
            raise UserError(f"{name}: {error}" if len(evaluations) > 1 else str(error)) from error


def measure(bench: Bench, model: str, evaluations: list[tuple[str, Any]]) -> Iterator[Result]:
    """Measure the encoder of a context in one or several ways; `model` is its name in the results."""
    encoder = bench.encoder
    _check(bench, evaluations)
    for name, settings in evaluations:
        bench.pictures.clear()
        values = dict(EVALUATIONS[name](bench, settings))
        yield Result(
            evaluation=name,
            model=model,
            encoder=bench.which,
            step=encoder.step,
            settings=asdict(settings),
            values=values,
            config=asdict(encoder.run),
            device=str(encoder.device),
            precision=encoder.precision,
            versions=versions(),
            pictures=dict(bench.pictures),
        )


def online_knn(run: PretrainConfig, console: Console | None = None) -> Callable[[nn.Module], dict[str, float]] | None:
    """Return a function that measures k-NN of an encoder in training; None if the run does not ask for it.

    The function returns no number if features are not finite. Raises UserError for data without labels.
    """
    if not run.knn.every:
        return None
    if not (run.knn.train and run.knn.test):
        raise UserError("--knn.every needs labelled data: give --knn.train and --knn.test")
    sets = tuple(open_dataset(spec, image_form(run), run.local_copy) for spec in (run.knn.train, run.knn.test))
    try:
        check_labelled(sets[0], sets[1], console)
    except UserError as error:
        raise UserError(f"--knn.train and --knn.test: {error}") from None
    device = choose_device(run.device)
    precision = choose_precision(run.precision, device)
    warned: set[str] = set()

    def watch(module: nn.Module) -> dict[str, float]:
        encoder = in_training(run, module, device, precision)
        train, test = (freeze(encoder, data) for data in sets)
        if not all(bool(torch.isfinite(part.mean).all()) for part in (train, test)):
            return {}
        _, line = knn.usable(knn.DEFAULT, len(train.labels))
        if line and line not in warned:
            warned.add(line)
            say(console or Console(quiet=True), line)
        names = ("top1", "balanced", "majority")
        return {
            f"knn/{key}": value
            for key, value in knn.knn(train, test)
            if key.count("/") < 3 and key.split("/")[-1] in names
        }

    return watch


__all__ = ["EVALUATIONS", "PROTOCOLS", "Result", "evaluate", "online_knn", "side_by_side"]
