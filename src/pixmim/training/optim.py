"""Optimizers (AdamW, LARS, LAMB), and steps that are skipped for bad gradients without a device sync."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def adamw(
    model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float, exempt: tuple[str, ...] = ()
) -> torch.optim.AdamW:
    """Fused AdamW over the parameters that have a gradient.

    Norms, biases, position tables and single tokens are not decayed: everything of one axis, and everything whose
    leading axis counts one (`cls_token`, `mask_token`, `pos_embed` are 1 x n x d).

    exempt  what is not decayed besides: all whose name contains one of these
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (plain if _is_exempt(name, p, exempt) else decayed).append(p)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def layer_decay_param_groups(
    model: nn.Module, layers: Mapping[str, int], decay: float, weight_decay: float, exempt: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Groups of parameters for an optimizer: each layer's learning rate is `decay` of that of the layer above it.

    layers  the layer of each parameter by name; the greatest gets the full rate
    exempt  what is not decayed (pulled to zero) besides what `adamw` exempts: all whose name contains one of these

    A group's "scale" is for `SyncFreeOptimizer`, which multiplies the learning rate with it.
    """
    top = max(layers.values())
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault((layers[name], _is_exempt(name, p, exempt)), []).append(p)
    return [
        {"params": params, "scale": decay ** (top - layer), "weight_decay": 0.0 if plain else weight_decay}
        for (layer, plain), params in sorted(groups.items(), key=lambda item: item[0])
    ]


def _is_exempt(name: str, p: nn.Parameter, exempt: tuple[str, ...]) -> bool:
    return p.ndim < 2 or p.shape[0] == 1 or any(part in name for part in exempt)


class SyncFreeOptimizer:
    """Applies gradients to weights: unscales, clips, and leaves the weights untouched where the gradient is not finite.

    All three happen inside the fused AdamW kernel, which divides by `grad_scale` and does nothing when `found_inf`
    is one (the two values torch's own GradScaler hands it); so no step waits for the device. LARS and LAMB take
    the two values as well.

    clip     largest norm of the gradient, or None
    scaling  multiply the loss against underflow, as float16 needs: halved on a bad step, doubled after 2000 good ones
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, clip: float | None, scaling: bool, device: torch.device
    ) -> None:
        self.optimizer, self.device = optimizer, device
        self._clip, self._scaling = clip, scaling
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        zero = torch.zeros((), device=device)
        self.state: dict[str, Tensor] = {
            "scale": torch.full((), 2.0**16 if scaling else 1.0, device=device),
            "good": zero.clone(),  # steps since the scale last changed
            "skipped": zero.clone(),  # steps without an update, all together
            "streak": zero.clone(),  # and in a row, up to now
        }
        """Counts and loss scale, as scalars on the device; part of a checkpoint."""

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a loss."""
        (loss * self.state["scale"]).backward() if self._scaling else loss.backward()

    def step(self, lr: float) -> Tensor:
        """Apply and clear the accumulated gradient at this learning rate, times a group's own "scale" if it has one.

        Gives the gradient's norm, a scalar on the device.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        s = self.state
        norm = total_norm(self._parameters) / s["scale"]
        finite = torch.isfinite(norm)
        over = norm / self._clip if self._clip is not None else torch.ones_like(norm)
        self.optimizer.grad_scale = s["scale"] * over.clamp(min=1.0).nan_to_num()  # type: ignore[attr-defined]
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        s["skipped"] += ~finite
        s["streak"].copy_(torch.where(finite, 0.0, s["streak"] + 1))
        if self._scaling:
            s["good"].copy_(torch.where(finite, s["good"] + 1, 0.0))
            grow = s["good"] == 2000
            s["scale"] *= torch.where(finite, torch.where(grow, 2.0, 1.0), 0.5)
            s["good"].masked_fill_(grow, 0.0)
        return norm


def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The Euclidean norm of all gradients together, of all processes' shards where they are sharded."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


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
    as well; here that is for `SyncFreeOptimizer` to do.
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
