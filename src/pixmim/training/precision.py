"""Which device computes, and in which precision."""

from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import nn

from pixmim.utils.errors import UserError, first_line

Precision = Literal["auto", "bf16", "fp16", "fp32"]


def choose_device(name: str) -> torch.device:
    """Return a device by name; "auto" takes a GPU where there is one. Raises UserError if it does not exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"no device '{name}' here: {first_line(error)}") from error
    return device


def choose_precision(name: Precision, device: torch.device) -> Precision:
    """bf16 where the device computes in it natively, else fp16 on a CUDA GPU, else fp32; or what `name` says."""
    if name != "auto":
        if name == "fp16" and device.type != "cuda":
            raise UserError("fp16 needs a CUDA device; on this one choose bf16 or fp32")
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    # Without such instructions a CPU emulates bf16, slower than fp32.
    native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return "bf16" if native else "fp32"


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """The context a forward pass runs in."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def choose_attention(model: nn.Module, device: torch.device, precision: Precision) -> None:
    """On a CPU in bf16, write attention out: the backward pass of the fused kernel is several times slower there."""
    if device.type == "cpu" and precision == "bf16":
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                setattr(module, "fused_attn", False)  # noqa: B010
