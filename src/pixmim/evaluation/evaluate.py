"""Evaluate encoders. `EVALUATIONS` names the functions; `evals.EVALS` their settings."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import nn

from pixmim.build import image_spec
from pixmim.config import PretrainConfig
from pixmim.data import open_dataset
from pixmim.evaluation.classification import check_labeled
from pixmim.evaluation.context import EvalContext, Values
from pixmim.evaluation.detection import check_detection, evaluate_detection
from pixmim.evaluation.evals import check_name
from pixmim.evaluation.features import extract_features
from pixmim.evaluation.finetune import check_finetune, evaluate_finetune
from pixmim.evaluation.frozen_encoder import fingerprint, load_frozen_encoder, wrap_live_encoder
from pixmim.evaluation.knn import DEFAULT_K, check_knn, evaluate_knn, knn, usable_k
from pixmim.evaluation.linear_probe import check_linear, evaluate_linear
from pixmim.evaluation.results import Result, versions
from pixmim.evaluation.robustness import check_robustness, evaluate_robustness
from pixmim.evaluation.segmentation import check_segmentation, evaluate_segmentation
from pixmim.evaluation.shape_bias import check_shape_bias, evaluate_shape_bias
from pixmim.training.precision import Precision, choose_device, choose_precision
from pixmim.utils.console import print_plain
from pixmim.utils.errors import UserError


class Evaluation(NamedTuple):
    """Functions of one evaluation.

    Attributes:
        check: Raises UserError for data, settings or an encoder that `run` would refuse, as far as can be known before
            anything is trained or measured.
        run: Yields the values.
    """

    check: Callable[[EvalContext, Any], object]
    run: Callable[[EvalContext, Any], Values]


EVALUATIONS = {
    "knn": Evaluation(check_knn, evaluate_knn),
    "linear": Evaluation(check_linear, evaluate_linear),
    "finetune": Evaluation(check_finetune, evaluate_finetune),
    "segmentation": Evaluation(check_segmentation, evaluate_segmentation),
    "detection": Evaluation(check_detection, evaluate_detection),
    "robustness": Evaluation(check_robustness, evaluate_robustness),
    "shape-bias": Evaluation(check_shape_bias, evaluate_shape_bias),
}


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
    """Evaluate an encoder in one or several ways; features are computed once for all of them.

    Args:
        model: A run, an imported folder, a file of weights, or timm:NAME.
        evaluations: Keys of EVALUATIONS, each with its settings.
        folder: Where results and unfinished work are kept.
        untrained: Evaluate the initial weights of a run instead.
        device: Device, such as cuda:1.
        precision: Precision of the forward passes.
        console: Where to print; None prints nothing.
        known: What a file does not say of its model: see `weights.load.resolve_model`.
        overwrite: Replace a classifier that was fine-tuned with other settings, and train an existing one again.

    Yields:
        Each result as soon as it is there.

    Raises:
        UserError: For an unknown evaluation, a model without an encoder, or unsuitable data or settings; before the
            first evaluation starts.
    """
    for name, _ in evaluations:
        check_name(name)
    encoder = load_frozen_encoder(model, device=device, precision=precision, untrained=untrained, hints=known)
    for line in encoder.notes:
        print_plain(console or Console(quiet=True), line)
    which = "untrained" if untrained else "trained"
    yield from measure(EvalContext(encoder, folder, which, console, overwrite), model, evaluations)


def evaluate_many(
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
    """Evaluate several encoders in the same ways.

    Args:
        models: Models as for `evaluate`, each with the folder for its results.
        evaluations: As for `evaluate`.
        untrained: Evaluate the initial weights of each run as well: once, if several runs began with the same.
        device: As for `evaluate`.
        precision: As for `evaluate`.
        console: As for `evaluate`.
        known: As for `evaluate`.
        overwrite: As for `evaluate`.

    Yields:
        Each result and its folder, as soon as it is there.

    Raises:
        UserError: As `evaluate`, for each of several models before any is evaluated.
    """
    for name, _ in evaluations:
        check_name(name)
    for model, folder in models.items() if len(models) > 1 or untrained else ():
        encoder = load_frozen_encoder(model, device=device, precision=precision, hints=known)
        _check(EvalContext(encoder, folder, overwrite=overwrite), evaluations)
        if untrained:
            encoder = load_frozen_encoder(model, device=device, precision=precision, untrained=True)
            tunings = [each for each in evaluations if each[0] == "finetune"]  # these keep a classifier of their own
            _check(EvalContext(encoder, folder, "untrained", overwrite=overwrite), tunings)
    begun: dict[str, list[Result]] = {}
    for model, folder in models.items():
        if untrained:
            encoder = load_frozen_encoder(model, device=device, precision=precision, untrained=True)
            start = fingerprint(encoder)
            for result in begun.get(start, []):
                yield replace(result, model=model), folder
            if start not in begun:
                begun[start] = []
                for result in measure(
                    EvalContext(encoder, folder, "untrained", console, overwrite), model, evaluations
                ):
                    begun[start].append(result)
                    yield result, folder
        how: Any = {"device": device, "precision": precision, "console": console, "known": known}
        how["overwrite"] = overwrite
        for result in evaluate(model, evaluations, folder, **how):
            yield result, folder


def _check(context: EvalContext, evaluations: list[tuple[str, Any]]) -> None:
    """Raise UserError for data and settings of any of these evaluations; measures nothing."""
    for name, settings in evaluations:
        try:
            EVALUATIONS[name].check(context, settings)
        except UserError as error:
            raise UserError(f"{name}: {error}" if len(evaluations) > 1 else str(error)) from error


def measure(context: EvalContext, model: str, evaluations: list[tuple[str, Any]]) -> Iterator[Result]:
    """Measure the encoder of a context in one or several ways; `model` is its name in the results."""
    encoder = context.encoder
    _check(context, evaluations)
    for name, settings in evaluations:
        context.images.clear()
        values = dict(EVALUATIONS[name].run(context, settings))
        yield Result(
            evaluation=name,
            model=model,
            encoder=context.encoder_state,
            step=encoder.step,
            settings=asdict(settings),
            values=values,
            config=asdict(encoder.config),
            device=str(encoder.device),
            precision=encoder.precision,
            versions=versions(),
            pictures=dict(context.images),
        )


def online_knn(
    config: PretrainConfig, console: Console | None = None
) -> Callable[[nn.Module], dict[str, float]] | None:
    """Return a function that measures k-NN of an encoder in training; None if the run does not ask for it.

    The function returns no number if features are not finite. Raises UserError for data without labels.
    """
    if not config.knn.every:
        return None
    if not (config.knn.train and config.knn.test):
        raise UserError("--knn.every needs labeled data: give --knn.train and --knn.test")
    sets = tuple(
        open_dataset(spec, image_spec(config), config.shard_cache_gib) for spec in (config.knn.train, config.knn.test)
    )
    try:
        check_labeled(sets[0], sets[1], console)
    except UserError as error:
        raise UserError(f"--knn.train and --knn.test: {error}") from None
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    warned: set[str] = set()

    def watch(module: nn.Module) -> dict[str, float]:
        encoder = wrap_live_encoder(config, module, device, precision)
        train, test = (extract_features(encoder, data) for data in sets)
        if not all(bool(torch.isfinite(part.mean).all()) for part in (train, test)):
            return {}
        _, line = usable_k(DEFAULT_K, len(train.labels))
        if line and line not in warned:
            warned.add(line)
            print_plain(console or Console(quiet=True), line)
        names = ("top1", "balanced", "majority")
        return {
            f"knn/{key}": value for key, value in knn(train, test) if key.count("/") < 3 and key.split("/")[-1] in names
        }

    return watch
