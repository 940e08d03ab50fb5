"""LARS and LAMB: each tensor moves in proportion to its own length, for very large batches.

Both can be stepped by `Updater`: they divide the gradient by `grad_scale` and leave weights and state untouched where
`found_inf` is one, without asking the device.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step along a matrix is `trust` of the matrix's length (arXiv 1708.03888).

    As MAE's linear probe uses it: vectors (biases, norms) take the plain step. No weight decay.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, params: Any, lr: float, momentum: float = 0.9, trust: float = 0.001) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                gradient, good = _usable(p.grad, self.grad_scale, self.found_inf)
                if p.ndim > 1:
                    gradient = gradient * _ratio(p, gradient, group["trust"])
                moved = group["momentum"] * state["momentum"] + gradient
                state["momentum"].copy_(torch.where(good > 0, moved, state["momentum"]))
                p.sub_(state["momentum"] * good, alpha=group["lr"])


class LAMB(torch.optim.Optimizer):
    """AdamW whose step along a decayed tensor is as long as the tensor times the rate (arXiv 1904.00962).

    As apex's FusedLAMB, DeiT III's optimizer: tensors without decay take Adam's step. It clips the gradient at norm 1
    as well; here that is for `Updater` to do.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), device=p.device)
                    state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
                gradient, good = _usable(p.grad, self.grad_scale, self.found_inf)
                state["step"] += good
                state["mean"].lerp_(gradient, (1 - b1) * good)
                state["square"].lerp_(gradient.square(), (1 - b2) * good)
                step = state["step"].clamp(min=1)
                update = state["mean"] / (1 - b1**step)
                update /= (state["square"] / (1 - b2**step)).sqrt() + group["eps"]
                if group["weight_decay"]:
                    update += group["weight_decay"] * p
                    update *= _ratio(p, update, 1.0)
                p.sub_(update * good, alpha=group["lr"])


def _usable(gradient: Tensor, scale: Tensor | None, found_inf: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradient without its scale, zero where it is not finite; and one, or zero if the step is to be left out."""
    good = torch.ones((), device=gradient.device) if found_inf is None else 1 - found_inf
    gradient = gradient if scale is None else gradient / scale
    return gradient.nan_to_num(0.0, 0.0, 0.0), good


def _ratio(p: Tensor, update: Tensor, trust: float) -> Tensor:
    """trust |p| / |update|; 1 where either is zero."""
    length, step = p.norm(), update.norm()
    return torch.where((length > 0) & (step > 0), trust * length / step, 1.0)
