"""Functions of the public API that use an encoder: evaluate it, compute features, draw reconstructions."""

import copy
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass, replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, get_args, get_origin

import numpy as np
import numpy.typing as npt
from PIL import Image
from rich.console import Console
from torch import nn

from pixmim.build import image_spec
from pixmim.config import ArchitectureConfig, ModelConfig
from pixmim.data import open_dataset
from pixmim.data.bad_images import BadImageLog
from pixmim.data.dataset import ImageDataset, ImageSpec
from pixmim.data.image_folder import from_paths
from pixmim.data.uri import absolute
from pixmim.evaluation.context import EvalContext
from pixmim.evaluation.embed import Kind, embed_batches
from pixmim.evaluation.embed import embed as write_embeddings
from pixmim.evaluation.evals import EVALS, check_name
from pixmim.evaluation.evaluate import evaluate_many, measure
from pixmim.evaluation.frozen_encoder import FrozenEncoder, encoder_from_module, load_frozen_encoder
from pixmim.evaluation.results import save
from pixmim.evaluation.settings import DATA_FIELDS, EvaluateAllSettings, LabeledSettings
from pixmim.evaluation.visualize import labeled_grid
from pixmim.report import DATA_MARK, write_report
from pixmim.report.reconstruct import reconstruct as draw
from pixmim.report.reconstruct import with_bands
from pixmim.run_folder import PretrainResult
from pixmim.training.precision import Precision
from pixmim.utils.console import print_plain, utf8
from pixmim.utils.errors import UserError, did_you_mean
from pixmim.utils.files import check_output, check_writable, read_json, shortened
from pixmim.utils.torch_defaults import torch_defaults
from pixmim.utils.validation import Count, check_value, from_python, hints_of
from pixmim.weights.detect import Weights
from pixmim.weights.load import describe, resolve_model

Named = str | os.PathLike[str]
"""The result or the folder of a run, a file of weights, timm:NAME or hf:NAME."""

AnyEncoder = nn.Module | Named
"""A timm module, also compiled or in DataParallel, or the name of a model."""

Images = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
"""Anything that --data takes, or several image files and folders."""


@torch_defaults()
def evaluate(
    model: AnyEncoder,
    evaluation: str,
    *,
    out: str | os.PathLike[str] | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    console: Console | None = None,
    **settings: Any,
) -> dict[str, float]:
    """Evaluate an encoder.

    Args:
        model: The encoder. A module is evaluated as a copy: its weights and its mode stay as they are.
        evaluation: "knn", "linear", "attentive", "finetune", "segmentation", "detection", "robustness" or "shape-bias".
        out: Folder for the result and unfinished work, to resume from. By default nothing is saved.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        precision: "auto", "bf16", "fp16" or "fp32".
        console: Where to print progress, and how far the weights are trained and what of them was assumed.
        **settings: Settings of the evaluation, such as `train` and `test`, or `labelled`; `pixmim evaluate NAME --help`
            lists them.

    Returns:
        Values by name, shares in per cent: `scores["k20/mean/top1"]`.

    Raises:
        UserError: If there is no such evaluation, setting or encoder, or the data do not suit.
    """
    check_name(evaluation)
    parts = _evaluations(evaluation, settings)
    folder = None if out is None else _path(out)
    if folder is not None:
        _check_folder(folder)
    console = console or Console()
    encoder = _encoder(model, device, precision, console)
    with TemporaryDirectory(prefix="pixmim-") as scratch:
        context = EvalContext(encoder, folder or Path(scratch), "trained", console)
        name = type(_unwrapped(model)).__name__ if isinstance(model, nn.Module) else _file(model)
        (result,) = measure(context, name, parts)
        if folder is not None:
            save(result, folder)
    return result.values


@torch_defaults()
def evaluate_to_folder(
    models: Named | Iterable[Named],
    evaluation: str,
    out: str | os.PathLike[str] | None = None,
    *,
    untrained: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    precision: Precision = "auto",
    hints: Mapping[str, Any] | None = None,
    console: Console | None = None,
    **settings: Any,
) -> tuple[list[Path], Path]:
    """Evaluate encoders side by side, save each result, and write one report. Resumes if it was interrupted.

    Args:
        models: Runs, files of weights, timm:NAME or hf:NAME; one, or several.
        evaluation: As for `evaluate`, or "all".
        out: Folder for results and report. By default results are saved in a run's folder, or in evaluations/MODEL, and
            the report of several models in report.html.
        untrained: Evaluate the initial weights of runs as well; `shots` does so where they are known.
        overwrite: Replace a classifier that was fine-tuned with other settings, and train an existing one again.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        precision: "auto", "bf16", "fp16" or "fp32".
        hints: What a file of weights does not contain, such as `size` or `num_heads`.
        console: Where to print progress.
        **settings: Settings of the evaluation, as for `evaluate`.

    Returns:
        The folder of each model's results, and the report.

    Raises:
        UserError: As for `evaluate`, before the first evaluation starts.
    """
    if evaluation != "all":
        check_name(evaluation)
    parts, console = _evaluations(evaluation, settings), console or Console()
    several = [models] if isinstance(models, nn.Module | str | os.PathLike) else models
    names = list(dict.fromkeys(map(_file, several)))
    if not names:
        raise UserError("no model is given: pass a run, a file of weights, timm:NAME or hf:NAME")
    root = _path(out) if out is not None else None
    folders = _result_folders(names, root)
    page = report_path(list(folders.values()), root / "report.html" if root else None)
    check_output(page, mark=DATA_MARK)
    for folder in folders.values():
        _check_folder(folder)
    splits: dict[Path, None] = {}
    for result, folder in evaluate_many(
        folders,
        parts,
        ("untrained", "trained") if untrained or settings.get("shots") else ("trained",),
        device=device,
        precision=precision,
        console=console,
        hints=hints,
        overwrite=overwrite,
        optional_start=not untrained,
    ):
        path = save(result, folder)
        if result.split:
            splits[path.with_name(result.split_file)] = None
    for path in splits:
        print_plain(console, f"which image was in which part: {path}")
    write_report(list(folders.values()), page, warn=lambda line: print_plain(console, f"warning: {line}"))
    return list(folders.values()), page


@torch_defaults()
def embed(
    model: AnyEncoder,
    data: Images,
    *,
    features: Kind = "mean",
    batch_size: int = 256,
    device: str = "auto",
    precision: Precision = "auto",
    console: Console | None = None,
) -> tuple[npt.NDArray[np.float32], list[str]]:
    """Compute the features of every readable image of a dataset.

    Args:
        model: The encoder.
        data: The images.
        features: "mean" of the patch tokens, "cls" for the class token (without one, the vector that the network
            pools), or "both", cls first.
        batch_size: Images per forward pass.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        precision: "auto", "bf16", "fp16" or "fp32".
        console: Where to print progress, how many images are skipped, and as for `evaluate`.

    Returns:
        Features, float32 (n, d), and the paths of the n images. Unreadable images are skipped.

    Raises:
        UserError: If the encoder or the data cannot be opened, or no image can be read.
    """
    _check_embedding(features, batch_size)
    console = console or Console()
    encoder = _encoder(model, device, precision, console)
    dataset = _open(data, encoder.image_spec, console)
    skipped = BadImageLog(None, len(dataset), 1.0)
    rows, paths = list[npt.NDArray[np.float32]](), list[str]()
    batches = embed_batches(encoder, dataset, skipped, batch_size, console=console, kind=features)
    for batch, indices, _ in batches:
        rows.append(np.concatenate(list(batch.values()), axis=1))
        paths += [dataset.path_of(index) for index in indices.tolist()]
    if not paths:
        raise UserError(f"no image of {dataset.spec} can be read: {skipped.reasons}")
    if line := skipped.summary(dataset):
        print_plain(console, line)
    return np.concatenate(rows), paths


@torch_defaults()
def embed_to_file(
    model: Named | Weights,
    data: Images,
    out: str | os.PathLike[str],
    *,
    features: Kind = "both",
    batch_size: int = 256,
    device: str = "auto",
    precision: Precision = "auto",
    thumbnails: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> None:
    """Write the features of every readable image of a dataset to a file. Resumes if it was interrupted.

    Args:
        model: A run, a file of weights, timm:NAME, hf:NAME, or opened weights.
        data: The images.
        out: A .npy file, float32 (n, d), written with a .csv of the n paths; or a .parquet file.
        features: "mean" of the patch tokens, "cls" for the class token (without one, the vector that the network
            pools), or "both", cls first.
        batch_size: Images per forward pass.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        precision: "auto", "bf16", "fp16" or "fp32".
        thumbnails: Add thumbnails and a projection to the plane to a .parquet file, for embedding-atlas and others.
        overwrite: Replace existing files.
        console: Where to print progress, the names of the files, and as for `embed`.

    Raises:
        UserError: If the encoder or the data cannot be opened, no image can be read, or `out` exists.
    """
    _check_embedding(features, batch_size)
    console = console or Console()
    weights = model if isinstance(model, Weights) else _resolve(model, console)
    dataset = _open(data, image_spec(weights.config), console)
    options: Any = {"device": device, "precision": precision, "overwrite": overwrite, "console": console}
    options["thumbnails"] = thumbnails
    for line in write_embeddings(weights, dataset, _path(out), features, batch=batch_size, **options):
        print_plain(console, line)


@torch_defaults()
def reconstruct(
    model: Named | Weights, data: Images, *, count: int = 4, bands: str = "", console: Console | None = None
) -> Image.Image:
    """Draw what a model predicts of hidden patches.

    Args:
        model: A run or a file of weights with its decoder, or opened weights.
        data: The images. Of more than `count`, a random but fixed selection.
        count: Number of images, one per row.
        bands: Channels to draw as red, green and blue, counted from 1, such as "4,3,2".
        console: Where to print as for `evaluate`.

    Returns:
        The drawing, with a column for each of `pixmim.report.reconstruct.COLUMNS`.

    Warns:
        UserWarning: For each unreadable image.

    Raises:
        UserError: If the model has no decoder, its pre-training is unknown, or no image can be read.
    """
    check_value("count", count, Count)
    console = console or Console()
    weights = model if isinstance(model, Weights) else _resolve(model, console, with_decoder=True)
    weights = with_bands(weights, bands)
    drawing = draw(weights, _open(data, image_spec(weights.config), console), count)
    for line in drawing.errors:
        warnings.warn(f"left out: {line}", stacklevel=3)  # of the caller: 2 is torch_defaults
    return labeled_grid(drawing.columns, drawing.names)


def report_path(folders: list[Path], page: Path | None) -> Path:
    """Return the path of the report: `page`, or a file in the only folder, or in the working directory."""
    return page or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))


def _result_folders(models: Sequence[str], out: Path | None) -> dict[str, Path]:
    """Return a folder for each model's results: another one for each, whatever their names have in common."""
    folders = dict[str, Path]()
    for model in models:
        own = Path(model).expanduser()
        if out is None and own.is_dir():
            folders[model] = own
        elif out is not None and len(models) == 1:
            folders[model] = out
        else:
            name = re.sub(r"[^\w.]+", "-", model).strip("-.") or "model"
            folder = (out or Path("evaluations")) / name
            if folder in folders.values() or _holds_another(folder, model):
                folder = folder.with_name(f"{name}-{sha256(utf8(model).encode()).hexdigest()[:8]}")
            folders[model] = folder
    return folders


def _holds_another(folder: Path, model: str) -> bool:
    """Return True if a folder holds results of another model."""
    for path in sorted(folder.glob("evaluations/*.json"))[:1]:
        with suppress(UserError, OSError):
            content = read_json(path)
            return isinstance(content, dict) and content.get("model") not in (None, model)
    return False


def _check_folder(folder: Path) -> None:
    """Raise UserError or OSError, before the work, if results cannot be written into a folder."""
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder} is not a folder: pass another one as out")
    check_writable(folder / "evaluations" / "results.json")


def _check_embedding(features: object, batch_size: object) -> None:
    check_value("features", features, Kind)
    check_value("batch_size", batch_size, Count)


def _evaluations(evaluation: str, settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the evaluations by name, with their settings and absolute paths of data. Raises UserError."""
    kind: Any = EvaluateAllSettings if evaluation == "all" else EVALS[evaluation].settings
    known = [field.name for field in fields(kind)]
    hints = {
        name: get_args(hint)[0] if get_origin(hint) is Annotated else hint for name, hint in hints_of(kind).items()
    }
    parts: dict[str, Any] = {name: each for name, each in hints.items() if is_dataclass(get_origin(each) or each)}
    part_of = {inner.name: name for name, part in parts.items() for inner in fields(get_origin(part) or part)}
    values, nested = dict[str, Any](), {name: dict[str, Any]() for name in parts}
    for name, value in settings.items():
        value = str(value) if isinstance(value, os.PathLike) else value
        if name in part_of and name not in known:
            nested[part_of[name]][name] = value
        elif name not in known:
            raise UserError(f"{evaluation} has no setting '{name}'{did_you_mean(name, [*known, *part_of])}")
        elif name in parts and isinstance(value, Mapping):
            nested[name] |= value
        else:
            values[name] = value
    for name, part in parts.items():  # whose flags are those of the command
        if unknown := [inner for inner in nested[name] if part_of.get(inner) != name]:
            raise UserError(f"{name} has no setting '{unknown[0]}'{did_you_mean(unknown[0], part_of)}")
        if nested[name]:
            values[name] = part(**from_python(get_origin(part) or part, nested[name]))
    checked = with_full_paths(kind(**from_python(kind, values)))
    if isinstance(checked, LabeledSettings):
        checked = checked.resolved()
    return checked.parts() if isinstance(checked, EvaluateAllSettings) else [(evaluation, checked)]


def with_full_paths(settings: Any) -> Any:
    """Return an evaluation's settings with absolute paths of data, which results are saved with."""
    data = [field.name for field in fields(settings) if field.name in DATA_FIELDS]
    return replace(settings, **{name: absolute(getattr(settings, name)) for name in data})


def _file(model: object) -> str:
    """Return the name of a model that is in files. Raises UserError for anything else."""
    if isinstance(model, nn.Module):
        raise UserError(f"pass a run, a file of weights or opened weights, not a module ({type(model).__name__})")
    if isinstance(model, PretrainResult):
        return str(shortened(model.folder))  # as on the command line
    name = os.fspath(model) if isinstance(model, str | os.PathLike) else None
    if not isinstance(name, str):
        raise UserError(f"a model is a module, a run, or the path of weights, not of type {type(model).__name__}")
    return name


def _resolve(model: Named, console: Console, with_decoder: bool = False) -> Weights:
    """Read the weights of a model, and print how far they are trained and what of them was assumed."""
    weights = resolve_model(name := _file(model), with_decoder=with_decoder)
    for line in describe(name, weights):
        print_plain(console, line)
    return weights


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return the module that torch.compile, DataParallel or both of them wrap; others unchanged."""
    wrapped: Any = getattr(module, "_orig_mod", None)
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        wrapped = module.module
    return module if wrapped is None else _unwrapped(wrapped)


def _path(out: str | os.PathLike[str]) -> Path:
    """Return a path, with ~ expanded to the home folder, as by a shell."""
    return Path(os.path.expanduser(out))


def _open(data: Images, spec: ImageSpec, console: Console) -> ImageDataset:
    """Open images, and print which of them are left out. Raises UserError."""
    if isinstance(data, str | os.PathLike):
        dataset = open_dataset(absolute(os.fspath(data)), spec)
    else:
        try:
            paths = [Path(path) for path in data]
        except TypeError as error:
            text = f"images are given as a path, or as several of them, not as {type(data).__name__}"
            raise UserError(f"{text}: pass the folder, or a list of files") from error
        if not paths:
            raise UserError("no images given: the list of files and folders is empty")
        dataset = from_paths(paths, spec)
    if dataset.left_out:
        print_plain(console, dataset.left_out)
    return dataset


def _encoder(model: AnyEncoder, device: str, precision: Precision, console: Console) -> FrozenEncoder:
    if isinstance(model, nn.Module):
        model = _unwrapped(model)
        config = getattr(model, "pixmim_config", None) or _timm_config(model)
        return encoder_from_module(config, copy.deepcopy(model).float(), device, precision)
    encoder = load_frozen_encoder(_file(model), device=device, precision=precision)
    for line in encoder.notes:
        print_plain(console, line)
    return encoder


def _timm_config(module: nn.Module) -> ModelConfig:
    """Return the configuration of a timm module. Raises UserError for any other module."""
    cfg: Any = getattr(module, "pretrained_cfg", None)
    if not cfg or "architecture" not in cfg:
        raise UserError(f"{type(module).__name__} is not a timm model: its pretrained_cfg names no architecture")
    channels, *size = cfg["input_size"]
    first = next((layer for layer in module.modules() if isinstance(layer, nn.Conv2d)), None)
    own = channels if first is None else first.in_channels
    h, w = getattr(getattr(module, "patch_embed", None), "img_size", None) or size
    classes = getattr(module, "num_classes", 0)
    return ModelConfig(
        model=ArchitectureConfig("timm", cfg["architecture"], options={"num_classes": classes} if classes else {}),
        size=f"{h}x{w}",
        channels=own,
        mean=tuple(cfg["mean"]) if own == channels else None,
        std=tuple(cfg["std"]) if own == channels else None,
    )
