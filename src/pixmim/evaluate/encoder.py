"""The encoder that is measured, ready to use: a run's product, the same untrained, or one in training."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pixmim.config import Run, from_json
from pixmim.engine.device import Precision, choose_attention, choose_device, choose_precision
from pixmim.errors import UserError
from pixmim.parts import build_model
from pixmim.weights.export import load_encoder


@dataclass(frozen=True)
class Encoder:
    """A timm module with what is needed to feed it. size: (h, w) in pixels; mean, std: per channel, on the device."""

    module: nn.Module
    size: tuple[int, int]
    channels: int
    mean: Tensor
    std: Tensor
    device: torch.device
    precision: Precision
    step: int


def read_run(folder: Path) -> Run:
    """The configuration of the run in `folder`. Raises UserError if that is no run."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a run: it has no config.json")
    return from_json(path.read_text(), path)


def of_run(folder: Path, *, device: str = "auto", precision: Precision = "auto", untrained: bool = False) -> Encoder:
    """The encoder of a finished run, or with `untrained` the one it began with. Raises UserError."""
    run = read_run(folder)
    module = build_model(run).encoder
    step = 0
    if not untrained:
        step = int(load_encoder(module, folder / "encoder.safetensors").get("step", "0"))
    where = choose_device(device)
    chosen = choose_precision(precision, where)
    choose_attention(module, where, chosen)
    return in_training(run, module.to(where), where, chosen, step)


def in_training(run: Run, module: nn.Module, device: torch.device, precision: Precision, step: int = 0) -> Encoder:
    """Wrap a module that is on its device already."""
    mean, std = (torch.tensor(values, device=device) for values in run.statistics)
    return Encoder(module, run.hw, run.channels, mean, std, device, precision, step)
