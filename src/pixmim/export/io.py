"""Tensors under another project's names, and the files they go into."""

import io
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from pixmim.utils.errors import UserError
from pixmim.utils.files import write_whole
from pixmim.weights.detect import Weights
from pixmim.weights.format import Source
from pixmim.weights.formats.huggingface import HF_BEIT, HF_SWIN, HF_SWIN_BODY
from pixmim.weights.formats.openmmlab import MM
from pixmim.weights.tensor_ops import move_downsampling_back, split_qkv


def only_encoder(weights: Weights) -> dict[str, Tensor]:
    """The encoder's tensors with pixmim's names for a whole model."""
    return {f"encoder.{key}": value for key, value in weights.encoder.items()}


def named(source: Source, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under another project's names: what `Source.translate` does, undone."""
    if source is not MM:
        tensors = split_qkv(tensors)
    if source in (HF_SWIN, HF_SWIN_BODY):
        tensors = move_downsampling_back(tensors)
    if source is HF_BEIT:
        tensors = {key: value for key, value in tensors.items() if not key.endswith("k_bias")}
    found = {}
    for key, value in tensors.items():
        name = source.names.theirs(key)
        if name is None:
            raise UserError(f"{source.name} has no place for {key}")
        found[name] = value.detach().clone().contiguous()
    return found


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON that a person can read."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write safetensors as torch's libraries expect them."""
    plain = {key: value.detach().contiguous() for key, value in tensors.items()}
    write_whole(path, save(plain, metadata={"format": "pt"}))


def write_torch(path: Path, content: dict[str, Any]) -> None:
    """Write what torch.load reads. torch itself would not raise OSError where the disk is full."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getvalue())
