"""How a backbone leaves the house: folders that other projects read strictly. One literal dict names them."""

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
from pixmim.utils.files import whole_folder
from pixmim.weights.detect import Weights
from pixmim.weights.load import assemble_encoder, describe, open_model

FORMATS: dict[str, Callable[[Weights, nn.Module, Path], list[str]]] = {
    "timm": to_timm,
    "hf": to_hf,
    "mmpretrain": to_mmpretrain,
    "detectron2": to_detectron2,
    "onnx": to_onnx,
}
"""What writes a model for each project, into an empty folder; gives the lines that say how it is loaded there."""


def hand_over(
    name: str, to: str, folder: Path | None = None, push: str = "", known: Mapping[str, Any] | None = None
) -> list[str]:
    """Write the model that `name` means (see `open_model`) for one of FORMATS into a new folder; says how to load it.

    push   a repository on the Hugging Face hub, to which the folder goes as well
    known  what a file does not say of its model: see `open_model`

    Raises UserError where the other project has no such model, or lacks what writing it takes.
    """
    weights = open_model(name, whole=True, known=known)
    folder = folder or Path(f"{Path(name.replace(':', '-')).name}-{to}")
    if os.path.lexists(folder):
        raise UserError(f"{folder} is there already: choose another --out")
    encoder = assemble_encoder(weights)
    try:
        with whole_folder(folder) as beside:
            how = FORMATS[to](weights, encoder, beside)
    except OSError as error:
        raise UserError(f"{folder} could not be written: {error.strerror or error}") from error
    lines = [
        *describe(name, weights),
        f"written to {folder}",
        *(f"  {line.replace('FOLDER', _literal(folder))}" for line in how),
    ]
    eps = weights.run.model.options.get("norm_eps")
    if eps is not None and to in ("timm", "mmpretrain", "detectron2"):
        lines.append(f"  {to} adds another value than {eps:g} in its layer norms: features differ by a few thousandths")
    return [*lines, _push(folder, push)] if push else lines


def _literal(folder: Path) -> str:
    """A folder's name as it stands between the quotes of a Python string, of either kind."""
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
