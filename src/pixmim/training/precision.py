"""Device and precision of a computation."""

from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import nn

from pixmim.utils.errors import UserError, first_line
from pixmim.utils.validation import check_value

Precision = Literal["auto", "bf16", "fp16", "fp32"]


def choose_device(name: str) -> torch.device:
    """Return a device by name; "auto" prefers a GPU. Raises UserError if the device does not exist."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} is not available: {first_line(error)}") from error
    return device


def choose_precision(name: Precision, device: torch.device) -> Precision:
    """Resolve "auto": bf16 if the device supports it natively, else fp16 on a CUDA GPU, else fp32.

    Raises:
        UserError: For fp16 on any other device, and for an unknown name.
    """
    check_value("--precision", name, Precision)
    if name != "auto":
        if name == "fp16" and device.type != "cuda":
            raise UserError(f"--precision fp16 needs a CUDA device, not {device.type}: choose bf16 or fp32")
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    # Other CPUs emulate bf16, which is slower than fp32.
    return "bf16" if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Return the autocast context of a forward pass."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")


def choose_attention(model: nn.Module, device: torch.device, precision: Precision) -> None:
    """Disable fused attention on a CPU in bf16, where its backward pass is several times slower."""
    if device.type == "cpu" and precision == "bf16":
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                setattr(module, "fused_attn", False)  # noqa: B010
