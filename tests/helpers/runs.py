"""Short pre-training runs and comparisons of their weights."""

import io
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load_file

from pixmim.config import PretrainConfig
from pixmim.pretrain import pretrain


def train(run: PretrainConfig, out: Path, watch: object = None) -> str:
    console = Console(file=io.StringIO(), width=500)
    pretrain(run, out, console, watch)  # type: ignore[arg-type]
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "encoder/model.safetensors")


def equal(one: Path, two: Path) -> bool:
    a, b = weights(one), weights(two)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
