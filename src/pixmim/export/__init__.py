"""Export encoders to timm, Hugging Face, mmpretrain, detectron2 and ONNX."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from pixmim.export.frameworks import to_detectron2, to_mmpretrain, to_timm
from pixmim.export.huggingface import to_hf
from pixmim.export.onnx import to_onnx
from pixmim.utils.errors import UserError, first_line
from pixmim.utils.files import atomic_folder
from pixmim.weights.detect import Weights
from pixmim.weights.load import build_encoder_with_weights, describe, resolve_model

FORMATS: dict[str, Callable[[Weights, nn.Module, Path], list[str]]] = {
    "timm": to_timm,
    "hf": to_hf,
    "mmpretrain": to_mmpretrain,
    "detectron2": to_detectron2,
    "onnx": to_onnx,
}
"""Functions that write a model for each project into an empty folder, and return lines on how to load it there."""


def export_model(
    name: str, to: str, folder: Path | None = None, push: str = "", known: Mapping[str, Any] | None = None
) -> list[str]:
    """Write a model for another project into a new folder.

    Args:
        name: The model: see `resolve_model`.
        to: One of FORMATS.
        folder: The folder. Default: MODEL-FORMAT.
        push: A repository of the Hugging Face hub to upload the folder to.
        known: What a file does not say of its model: see `resolve_model`.

    Returns:
        Lines on what was written and how to load it.

    Raises:
        UserError: If the project has no such model, or the folder cannot be written.
    """
    weights = resolve_model(name, with_decoder=True, hints=known)
    folder = folder or Path(f"{Path(name.replace(':', '-')).name}-{to}")
    if os.path.lexists(folder):
        raise UserError(f"{folder} is there already: choose another --out")
    encoder = build_encoder_with_weights(weights)
    try:
        with atomic_folder(folder) as beside:
            how = FORMATS[to](weights, encoder, beside)
    except OSError as error:
        raise UserError(f"{folder} could not be written: {error.strerror or error}") from error
    lines = [
        *describe(name, weights),
        f"written to {folder}",
        *(f"  {line.replace('FOLDER', _literal(folder))}" for line in how),
    ]
    eps = weights.config.model.options.get("norm_eps")
    if eps is not None and to in ("timm", "mmpretrain", "detectron2"):
        lines.append(f"  {to} adds another value than {eps:g} in its layer norms: features differ by a few thousandths")
    return [*lines, _push(folder, push)] if push else lines


def _literal(folder: Path) -> str:
    """Return a folder as text between the quotes of a Python string, of either kind."""
    return json.dumps(str(folder))[1:-1].replace("'", "\\'")


def _push(folder: Path, repository: str) -> str:
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError as error:
        raise UserError("pushing needs huggingface_hub: pip install 'pixmim[hub]'") from error
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        url = api.upload_folder(repo_id=repository, folder_path=folder)
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(f"{folder} is written, but could not be pushed to {repository}: {first_line(error)}") from error
    return f"pushed to {url}"
