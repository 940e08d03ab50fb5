"""Functions of the public API that use an encoder: evaluate it, compute features, draw reconstructions."""

import copy
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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
from pixmim.utils.console import print_plain
from pixmim.utils.errors import UserError, did_you_mean
from pixmim.utils.files import check_output, check_writable
from pixmim.weights.detect import Weights
from pixmim.weights.load import resolve_model

AnyEncoder = nn.Module | PretrainResult | str | os.PathLike[str]
"""A timm module, the result of a run, or a name: a run's folder, a file of weights, timm:NAME or hf:NAME."""

Images = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
"""Anything that --data takes, or a list of image files and folders."""


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
        console: Where to print progress.
        **settings: Settings of the evaluation, such as `train` and `test`, or `labelled`; `pixmim evaluate NAME --help`
            lists them.

    Returns:
        Values by name, shares in per cent: `scores["k20/mean/top1"]`.

    Raises:
        UserError: If there is no such evaluation, setting or encoder, or the data do not suit.
    """
    check_name(evaluation)
    parts = _evaluations(evaluation, settings)
    encoder = _encoder(model, device, precision)
    with TemporaryDirectory(prefix="pixmim-") as scratch:
        context = EvalContext(encoder, Path(out or scratch), "trained", console or Console())
        (result,) = measure(context, _name(model), parts)
        if out is not None:
            save(result, Path(out))
    return result.values


def evaluate_to_folder(
    models: Sequence[str | os.PathLike[str]],
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
        models: Runs' folders, files of weights, timm:NAME or hf:NAME.
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
    parts, console = _evaluations(evaluation, settings), console or Console()
    names = list(dict.fromkeys(os.fspath(model) for model in models))
    root = Path(out) if out is not None else None
    folders = {name: _result_folder(name, root, several=len(names) > 1) for name in names}
    page = report_path(list(folders.values()), root / "report.html" if root else None)
    check_output(page, mark=DATA_MARK)
    for folder in folders.values():
        check_writable(folder / "evaluations" / "results.json")
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
        console: Where to print progress.

    Returns:
        Features, float32 (n, d), and the paths of the n images. Unreadable images are skipped.

    Raises:
        UserError: If the encoder or the data cannot be opened, or no image can be read.
    """
    encoder = _encoder(model, device, precision)
    dataset = _open(data, encoder.image_spec)
    skipped = BadImageLog(None, len(dataset), 1.0)
    rows, paths = list[npt.NDArray[np.float32]](), list[str]()
    batches = embed_batches(encoder, dataset, skipped, batch_size, console=console or Console(), kind=features)
    for batch, indices, _ in batches:
        rows.append(np.concatenate(list(batch.values()), axis=1))
        paths += [dataset.path_of(index) for index in indices.tolist()]
    if not paths:
        raise UserError(f"no image of {dataset.spec} can be read: {skipped.reasons}")
    return np.concatenate(rows), paths


def embed_to_file(
    model: PretrainResult | Weights | str | os.PathLike[str],
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
        model: A result, a run's folder, a file of weights, timm:NAME, hf:NAME, or opened weights.
        data: The images.
        out: A .npy file, float32 (n, d), written with a .csv of the n paths; or a .parquet file.
        features: "mean" of the patch tokens, "cls" for the class token (without one, the vector that the network
            pools), or "both", cls first.
        batch_size: Images per forward pass.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        precision: "auto", "bf16", "fp16" or "fp32".
        thumbnails: Add thumbnails and a projection to the plane to a .parquet file, for embedding-atlas and others.
        overwrite: Replace existing files.
        console: Where to print progress and the names of the files.

    Raises:
        UserError: If the encoder or the data cannot be opened, no image can be read, or `out` exists.
    """
    weights = model if isinstance(model, Weights) else resolve_model(_name(model))
    dataset, console = _open(data, image_spec(weights.config)), console or Console()
    options: Any = {"device": device, "precision": precision, "overwrite": overwrite, "console": console}
    options["thumbnails"] = thumbnails
    if dataset.left_out:
        print_plain(console, dataset.left_out)
    for line in write_embeddings(weights, dataset, Path(out), features, batch=batch_size, **options):
        print_plain(console, line)


def reconstruct(
    model: PretrainResult | Weights | str | os.PathLike[str], data: Images, *, count: int = 4, bands: str = ""
) -> Image.Image:
    """Draw what a model predicts of hidden patches.

    Args:
        model: A run with its decoder: a result, a folder, a file of weights, or opened weights.
        data: The images. Of more than `count`, a random but fixed selection.
        count: Number of images, one per row.
        bands: Channels to draw as red, green and blue, counted from 1, such as "4,3,2".

    Returns:
        The drawing, with a column for each of `pixmim.report.reconstruct.COLUMNS`.

    Raises:
        UserError: If the model has no decoder, its pre-training is unknown, or no image can be read.
    """
    weights = model if isinstance(model, Weights) else resolve_model(_name(model), with_decoder=True)
    weights = with_bands(weights, bands)
    drawing = draw(weights, _open(data, image_spec(weights.config)), count)
    return labeled_grid(drawing.columns, drawing.names)


def report_path(folders: list[Path], page: Path | None) -> Path:
    """Return the path of the report: `page`, or a file in the only folder, or in the working directory."""
    return page or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))


def _result_folder(model: str, out: Path | None, *, several: bool) -> Path:
    name = re.sub(r"[^A-Za-z0-9.]+", "-", model).strip("-")
    if out is not None:
        return out / name if several else out
    folder = Path(model).expanduser()
    return folder if folder.is_dir() else Path("evaluations") / name


def _evaluations(evaluation: str, settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return the evaluations by name, with their settings and absolute paths of data. Raises UserError."""
    kind = EvaluateAllSettings if evaluation == "all" else EVALS[evaluation].settings
    known = [field.name for field in fields(kind)]
    values = dict(settings)
    for name, value in settings.items():
        if name not in known:
            raise UserError(f"{evaluation} has no setting '{name}'{did_you_mean(name, known)}")
        if isinstance(value, os.PathLike):
            values[name] = str(value)
    checked = with_full_paths(kind(**values))
    if isinstance(checked, LabeledSettings):
        checked = checked.resolved()
    return checked.parts() if isinstance(checked, EvaluateAllSettings) else [(evaluation, checked)]


def with_full_paths(settings: Any) -> Any:
    """Return an evaluation's settings with absolute paths of data, which results are saved with."""
    data = [field.name for field in fields(settings) if field.name in DATA_FIELDS]
    return replace(settings, **{name: absolute(getattr(settings, name)) for name in data})


def _name(model: AnyEncoder) -> str:
    if isinstance(model, nn.Module):
        return type(model).__name__
    return str(model.folder if isinstance(model, PretrainResult) else os.fspath(model))


def _open(data: Images, spec: ImageSpec) -> ImageDataset:
    if isinstance(data, str | os.PathLike):
        return open_dataset(absolute(os.fspath(data)), spec)
    return from_paths([Path(path) for path in data], spec)


def _encoder(model: AnyEncoder, device: str, precision: Precision) -> FrozenEncoder:
    if isinstance(model, nn.Module):
        config = getattr(model, "pixmim_config", None) or _timm_config(model)
        return encoder_from_module(config, copy.deepcopy(model), device, precision)
    return load_frozen_encoder(_name(model), device=device, precision=precision)


def _timm_config(module: nn.Module) -> ModelConfig:
    """Return the configuration of a timm module. Raises UserError for any other module."""
    cfg: Any = getattr(module, "pretrained_cfg", None)
    if not cfg or "architecture" not in cfg:
        raise UserError(f"{type(module).__name__} is not a timm model: its pretrained_cfg names no architecture")
    channels, *size = cfg["input_size"]
    h, w = getattr(getattr(module, "patch_embed", None), "img_size", None) or size
    classes = getattr(module, "num_classes", 0)
    return ModelConfig(
        model=ArchitectureConfig("timm", cfg["architecture"], options={"num_classes": classes} if classes else {}),
        size=f"{h}x{w}",
        channels=channels,
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
    )
