"""The product of a run: encoder.safetensors, in timm's names, with what a user must know to feed it."""

import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from pixmim.errors import UserError


def save_encoder(encoder: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Write an encoder's weights in timm's names, whole or not at all; timm's `checkpoint_path` takes the file."""
    beside = path.with_suffix(".tmp")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    beside.write_bytes(save(tensors, metadata={"format": "pt", **metadata}))
    os.replace(beside, path)


def load_encoder(encoder: nn.Module, path: Path) -> dict[str, str]:
    """Load what `save_encoder` wrote into an encoder of the same make, strictly; gives the file's metadata.

    Raises UserError if the file is missing, damaged, or of another make.
    """
    if not path.is_file():
        raise UserError(f"there is no {path}: is the run finished?")
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
        encoder.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{path} does not fit: {error}") from error
    return metadata
