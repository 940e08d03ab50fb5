"""Evaluate encoders. `EVALUATIONS` holds the functions of each evaluation; `evals.EVALS` its settings and labels."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from rich.console import Console
from torch import nn

from pixmim.build import image_spec
from pixmim.config import PretrainConfig
from pixmim.data import open_dataset
from pixmim.evaluation.attentive_probe import check_attentive, evaluate_attentive
from pixmim.evaluation.classification import check_labeled
from pixmim.evaluation.context import EvalContext, Values, describe_labels, extract_features
from pixmim.evaluation.detection import check_detection, evaluate_detection
from pixmim.evaluation.evals import check_name
from pixmim.evaluation.finetune import check_finetune, evaluate_finetune
from pixmim.evaluation.frozen_encoder import fingerprint, load_frozen_encoder, wrap_live_encoder
from pixmim.evaluation.knn import DEFAULT_K, check_knn, evaluate_knn, knn, usable_k
from pixmim.evaluation.linear_probe import check_linear, evaluate_linear
from pixmim.evaluation.repeated import split_table
from pixmim.evaluation.results import Result, versions
from pixmim.evaluation.robustness import check_robustness, evaluate_robustness
from pixmim.evaluation.segmentation import check_segmentation, evaluate_segmentation
from pixmim.evaluation.settings import DATA_FIELDS
from pixmim.evaluation.shape_bias import check_shape_bias, evaluate_shape_bias
from pixmim.training.precision import Precision, choose_device, choose_precision
from pixmim.utils.console import print_plain
from pixmim.utils.errors import UserError

State = Literal["trained", "untrained"]


class Evaluation(NamedTuple):
    """Functions of one evaluation."""

    # raises UserError for data, settings or an encoder that `run` would refuse, as far as can be known before anything
    # is trained or evaluated
    check: Callable[[EvalContext, Any], object]
    run: Callable[[EvalContext, Any], Values]  # yields the values


EVALUATIONS = {
    "knn": Evaluation(check_knn, evaluate_knn),
    "linear": Evaluation(check_linear, evaluate_linear),
    "attentive": Evaluation(check_attentive, evaluate_attentive),
    "finetune": Evaluation(check_finetune, evaluate_finetune),
    "segmentation": Evaluation(check_segmentation, evaluate_segmentation),
    "detection": Evaluation(check_detection, evaluate_detection),
    "robustness": Evaluation(check_robustness, evaluate_robustness),
    "shape-bias": Evaluation(check_shape_bias, evaluate_shape_bias),
}


def evaluate_many(
    models: Mapping[str, Path],
    evaluations: list[tuple[str, Any]],
    states: Sequence[State] = ("trained",),
    *,
    device: str = "auto",
    precision: Precision = "auto",
    console: Console | None = None,
    hints: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    optional_start: bool = False,
) -> Iterator[tuple[Result, Path]]:
    """Evaluate encoders, and yield each result with its folder. Weights, datasets and features are loaded once.

    `models` are names as for `resolve_model`, each with the folder for its results and unfinished work; "untrained"
    evaluates the initial weights of each run: once, if several runs have the same. With `optional_start`, a line is
    printed for models whose initial weights are unknown. `overwrite` trains a classifier again, also one of other
    settings. Raises UserError before the first evaluation starts.
    """
    for name, _ in evaluations:
        check_name(name)
    shared: dict[tuple[Any, ...], Any] = {}
    order, contexts = list[tuple[str, Path, str]](), dict[str, EvalContext]()
    for model, folder in models.items():
        for state in states:
            untrained = state == "untrained"
            options: Any = {"device": device, "precision": precision, "hints": None if untrained else hints}
            try:
                encoder = load_frozen_encoder(model, untrained=untrained, **options)
            except UserError as error:
                if not (untrained and optional_start):
                    raise
                print_plain(console, f"{model} is evaluated without its start: {error}")
                continue
            key = fingerprint(encoder) if untrained else model
            order.append((model, folder, key))
            if key not in contexts:
                for line in encoder.notes:
                    print_plain(console, line)
                contexts[key] = EvalContext(encoder, folder, state, console, overwrite, shared=shared)
                check(contexts[key], evaluations)
            del encoder
    results: dict[str, list[Result]] = {}
    for model, folder, key in order:
        if key in results:
            yield from ((replace(result, model=model), folder) for result in results[key])
            continue
        results[key] = []
        for result in measure(contexts[key], model, evaluations):
            results[key].append(result)
            yield result, folder
        del contexts[key]  # its features may fill the memory


def check(context: EvalContext, evaluations: list[tuple[str, Any]]) -> None:
    """Raise UserError for data, settings or an encoder that an evaluation would refuse."""
    for name, settings in evaluations:
        try:
            EVALUATIONS[name].check(context, settings)
        except UserError as error:
            raise UserError(f"{name}: {error}" if len(evaluations) > 1 else str(error)) from error


def measure(context: EvalContext, model: str, evaluations: list[tuple[str, Any]]) -> Iterator[Result]:
    """Run evaluations on the encoder of a context; `model` is its name in the results."""
    encoder = context.encoder
    check(context, evaluations)
    for name, settings in evaluations:
        context.images.clear()
        values = dict(EVALUATIONS[name].run(context, settings))
        context.print_skipped()
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
            data_digest=digest_data(context, name, settings),
            pictures=dict(context.images),
            split=split_table(context, settings),
        )


def digest_data(context: EvalContext, name: str, settings: Any) -> str:
    """Return a digest of the images' names and labels, masks or boxes of an evaluation; ImageNet-C's are left out."""

    def describe(spec: str) -> str:
        return context.once_for_all(("truth", spec), lambda: describe_labels(context.data(spec)))

    if name == "segmentation":
        truth = list(check_segmentation(context, settings)[-1])
    elif name == "detection":
        truth = [data.truth for data in check_detection(context, settings)[:2]]
    else:
        specs = (getattr(settings, field, "") for field in DATA_FIELDS if field != "imagenet_c")
        truth = [describe(spec) for spec in specs if spec]
    return sha256(repr(truth).encode()).hexdigest()[:8]


def online_knn(
    config: PretrainConfig, console: Console | None = None
) -> Callable[[nn.Module], dict[str, float]] | None:
    """Return a function that evaluates an encoder in training by k-NN; None if the run does not use it.

    The function returns no values if features are not finite. Raises UserError for data without labels.
    """
    if not (config.knn.train or config.knn.test or config.knn.every):
        return None
    if not (config.knn.train and config.knn.test):
        raise UserError("k-NN during training needs labeled data: pass --knn.train and --knn.test")
    sources = config.knn.train, config.knn.test
    train_data, test_data = (open_dataset(data, image_spec(config), config.shard_cache_gib) for data in sources)
    try:
        check_labeled(train_data, test_data, console)
    except UserError as error:
        raise UserError(f"--knn.train and --knn.test: {error}") from None
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    warned, measured = set[str](), False

    def evaluate_encoder(module: nn.Module) -> dict[str, float]:
        nonlocal measured
        encoder = wrap_live_encoder(config, module, device, precision)
        try:
            train, test = (extract_features(encoder, data) for data in (train_data, test_data))
        except UserError as error:
            if not measured:  # nothing is lost yet
                raise UserError(f"--knn.train and --knn.test: {error}") from None
            print_plain(console, f"warning: k-NN is not measured, since its images cannot be read: {error}")
            return {}
        measured = True
        if not all(
            bool(torch.isfinite(x).all()) for features in (train, test) for x in (features.mean, features.vector)
        ):
            return {}
        _, warning = usable_k(DEFAULT_K, len(train.labels))
        if warning and warning not in warned:
            warned.add(warning)
            print_plain(console, warning)
        names = ("top1", "balanced", "majority")
        values = {f"knn/{k}": v for k, v in knn(train, test) if k.count("/") < 3 and k.split("/")[-1] in names}
        return values | {"knn/images": len(test.labels)}

    return evaluate_encoder
