"""What to do with an encoder, a call each: measure it, compute features, draw reconstructions."""

import copy
import os
from collections.abc import Sequence
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
from pixmim.evaluation.evaluate import measure
from pixmim.evaluation.frozen_encoder import FrozenEncoder, load_frozen_encoder, of_module
from pixmim.evaluation.results import save
from pixmim.evaluation.settings import DATA_FIELDS
from pixmim.evaluation.visualize import labeled_grid
from pixmim.pretraining import PretrainResult
from pixmim.report.reconstruct import reconstruct as draw
from pixmim.report.reconstruct import with_bands
from pixmim.training.precision import Precision
from pixmim.utils.console import print_plain
from pixmim.utils.errors import UserError, did_you_mean
from pixmim.weights.detect import Weights
from pixmim.weights.load import resolve_model

AnyEncoder = nn.Module | PretrainResult | str | os.PathLike[str]
"""A timm module, the result of a run, or a name: a run's folder, a file of weights, or timm:NAME."""

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
    """Measure an encoder.

    Args:
        model: The encoder. A module is measured as a copy: its weights and its mode stay as they are.
        evaluation: "knn", "linear", "finetune", "segmentation", "detection", "robustness" or "shape-bias".
        out: Folder in which the result is kept, and unfinished work is resumed; otherwise nothing is kept.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        precision: "auto", "bf16", "fp16" or "fp32".
        console: Where progress is printed.
        **settings: Settings of the evaluation, such as `train` and `test`; `pixmim evaluate NAME --help` lists them.

    Returns:
        Values by name, shares in per cent: `scores["k20/mean/top1"]`.

    Raises:
        UserError: If there is no such evaluation, setting or encoder, or the data do not suit.
    """
    check_name(evaluation)
    kind = EVALS[evaluation].settings
    known = [field.name for field in fields(kind)]
    for name in settings:
        if name not in known:
            raise UserError(f"{evaluation} has no setting '{name}'{did_you_mean(name, known)}")
    given = {name: str(value) if isinstance(value, os.PathLike) else value for name, value in settings.items()}
    encoder = _encoder(model, device, precision)
    with TemporaryDirectory(prefix="pixmim-") as scratch:
        context = EvalContext(encoder, Path(out or scratch), "trained", console or Console())
        (result,) = measure(context, _name(model), [(evaluation, with_full_paths(kind(**given)))])
        if out is not None:
            save(result, Path(out))
    return result.values


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
        features: "mean" of the patch tokens, "cls" for the class token, or "both", cls first.
        batch_size: Images per forward pass.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        precision: "auto", "bf16", "fp16" or "fp32".
        console: Where progress is printed.

    Returns:
        Features, float32 (n, d), and the paths of the n images. Unreadable images are left out.

    Raises:
        UserError: If the encoder or the data cannot be opened, or no image can be read.
    """
    encoder = _encoder(model, device, precision)
    source = _open(data, encoder.image_spec)
    skipped = BadImageLog(None, len(source), 1.0)
    rows, paths = list[npt.NDArray[np.float32]](), list[str]()
    names = ("cls", "mean") if features == "both" else (features,)
    for found, indices, _ in embed_batches(encoder, source, skipped, batch_size, console=console or Console()):
        rows.append(np.concatenate([found[name] for name in names], axis=1))
        paths += [source.path_of(index) for index in indices.tolist()]
    if not paths:
        raise UserError(f"no image of {source.spec} can be read: {skipped.reasons}")
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
    overwrite: bool = False,
    console: Console | None = None,
) -> None:
    """Write the features of every readable image of a dataset to a file. Resumes if it was interrupted.

    Args:
        model: A result, a run's folder, a file of weights, timm:NAME, or weights that are open.
        data: The images.
        out: A .npy, float32 (n, d), with a .csv of the n paths beside it; or a .parquet.
        features: "mean" of the patch tokens, "cls" for the class token, or "both", cls first.
        batch_size: Images per forward pass.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps".
        precision: "auto", "bf16", "fp16" or "fp32".
        overwrite: Replace files that exist.
        console: Where progress and the names of the files are printed.

    Raises:
        UserError: If the encoder or the data cannot be opened, no image can be read, or `out` exists.
    """
    weights = model if isinstance(model, Weights) else resolve_model(_name(model))
    source, console = _open(data, image_spec(weights.config)), console or Console()
    how: Any = {"device": device, "precision": precision, "overwrite": overwrite, "console": console}
    for line in write_embeddings(weights, source, Path(out), features, batch=batch_size, **how):
        print_plain(console, line)


def reconstruct(
    model: PretrainResult | Weights | str | os.PathLike[str], data: Images, *, count: int = 4, bands: str = ""
) -> Image.Image:
    """Draw what a model predicts of hidden patches.

    Args:
        model: A run with its decoder: a result, a folder, a file of weights, or weights that are open.
        data: The images. Of more than `count`, a random choice that is the same each time.
        count: Number of images, a row each.
        bands: Channels to draw as red, green and blue, counted from 1, such as "4,3,2".

    Returns:
        The drawing, with a column for each of `pixmim.report.reconstruct.COLUMNS`.

    Raises:
        UserError: If the model has no decoder, its pre-training is unknown, or no image can be read.
    """
    weights = model if isinstance(model, Weights) else resolve_model(_name(model), with_decoder=True)
    weights = with_bands(weights, bands)
    found = draw(weights, _open(data, image_spec(weights.config)), count)
    return labeled_grid(found.columns, found.names)


def with_full_paths(settings: Any) -> Any:
    """Return an evaluation's settings with full paths of data, so that results tell what they were measured on."""
    data = [field.name for field in fields(settings) if field.name in DATA_FIELDS]
    return replace(settings, **{name: absolute(getattr(settings, name)) for name in data})


def _name(model: AnyEncoder) -> str:
    if isinstance(model, nn.Module):
        return type(model).__name__
    return str(model.folder if isinstance(model, PretrainResult) else os.fspath(model))


def _open(data: Images, form: ImageSpec) -> ImageDataset:
    if isinstance(data, str | os.PathLike):
        return open_dataset(absolute(os.fspath(data)), form)
    return from_paths([Path(path) for path in data], form)


def _encoder(model: AnyEncoder, device: str, precision: Precision) -> FrozenEncoder:
    if isinstance(model, nn.Module):
        config = getattr(model, "pixmim_config", None) or _config_of(model)
        return of_module(config, copy.deepcopy(model), device, precision)
    return load_frozen_encoder(_name(model), device=device, precision=precision)


def _config_of(module: nn.Module) -> ModelConfig:
    """Return the configuration of a module of timm's. Raises UserError for any other module."""
    known: Any = getattr(module, "pretrained_cfg", None)
    if not known or "architecture" not in known:
        raise UserError(f"{type(module).__name__} is not a timm model: its pretrained_cfg names no architecture")
    patches: Any = getattr(module, "patch_embed", None)
    channels, *size = known["input_size"]
    h, w = getattr(patches, "img_size", None) or size
    classes = getattr(module, "num_classes", 0)
    return ModelConfig(
        model=ArchitectureConfig("timm", known["architecture"], options={"num_classes": classes} if classes else {}),
        size=f"{h}x{w}",
        channels=channels,
        mean=tuple(known["mean"]),
        std=tuple(known["std"]),
    )
