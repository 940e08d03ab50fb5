"""Short pre-training runs and comparisons of their weights."""

import io
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from pixmim.config import PretrainConfig
from pixmim.pretraining import pretrain


def train(config: PretrainConfig, out: Path, **options: Any) -> str:
    """Train without a report, and return the output."""
    file = io.StringIO()
    pretrain(config, out, console=Console(file=file, width=500), report=False, **options)
    return file.getvalue()


def print_training(config: PretrainConfig, out: Path) -> None:
    """Train, as the target of another process."""
    print(train(config, out))


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "encoder/model.safetensors")


def equal(one: Path, two: Path) -> bool:
    a, b = weights(one), weights(two)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
