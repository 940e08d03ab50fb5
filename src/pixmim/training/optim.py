"""Learning rate schedule, optimizers (AdamW, LARS, LAMB), and steps that skip bad gradients without a device sync."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pixmim.config import OptimConfig, PretrainConfig


@dataclass(frozen=True)
class Schedule:
    """Learning rate of each step: linear warm-up, then half a cosine, or one drop to a tenth.

    MAE's cosine starts after the warm-up (arXiv 2111.06377, appendix A). SimMIM's and DeiT III's starts at step 0, and
    the warm-up replaces its first part (timm's CosineLRScheduler with `warmup_prefix=False`).

    Attributes:
        steps: Number of steps of the run. The first `decoder` train only the decoder: a short rise, then the peak.
        warmup: Number of steps of warm-up, from the learning rate `first` to `peak`.
        final: Learning rate at the end of the cosine. It starts after the warm-up; without `warmup_prefix`, at step 0.
        drop: Step from which on the rate is a tenth of the peak (SimMIM over 800 epochs); None: a cosine.
    """

    steps: int
    warmup: int
    peak: float
    final: float
    first: float = 0.0
    drop: int | None = None
    warmup_prefix: bool = True
    decoder: int = 0

    @staticmethod
    def of(config: PretrainConfig, images: int) -> "Schedule":
        """Return the schedule of a run over `images` images. Each warm-up takes at most a fifth of the steps."""
        steps_per_epoch, optim = images / config.batch_size, config.optim
        steps = config.steps if config.steps is not None else max(1, round(config.epochs * steps_per_epoch))
        decoder = min(round(optim.decoder_warmup * steps_per_epoch), steps // 5)
        warmup = min(round(optim.warmup * steps_per_epoch), (steps - decoder) // 5)
        drop = round(optim.lr_drop_at * (steps - decoder)) if optim.schedule == "step" else None
        first, prefix = optim.warmup_start_lr, optim.warmup_prefix
        return Schedule(steps, warmup, config.lr, optim.min_lr, first, drop, prefix, decoder)

    def lr(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.decoder:
            return self.peak * min(1.0, 5 * (step + 1) / self.decoder)
        step, steps = step - self.decoder, self.steps - self.decoder
        if step < self.warmup:
            return self.first + (self.peak - self.first) * step / self.warmup
        if self.drop is not None:
            return self.peak if step < self.drop else self.peak / 10
        start = self.warmup if self.warmup_prefix else 0
        progress = (step - start) / (steps - start)
        return self.final + (self.peak - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


def adamw(
    model: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float, exempt: tuple[str, ...] = ()
) -> torch.optim.AdamW:
    """Create fused AdamW over the parameters that require a gradient.

    Weight decay is not applied to norms, biases, position tables and single tokens: parameters with one axis, or with
    a leading axis of length 1 (`cls_token`, `mask_token`, `pos_embed` are 1 x n x d), and those whose name contains one
    of `exempt`.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (plain if _is_exempt(name, p, exempt) else decayed).append(p)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def adamw_by_layer(
    model: nn.Module,
    layers: Mapping[str, int],
    lr: float,
    optim: OptimConfig,
    exempt: tuple[str, ...] = (),
    decoder_steps: int = 0,
) -> torch.optim.AdamW:
    """Create fused AdamW with layer-wise learning rates for a model whose encoder may be frozen at first.

    `layers` holds the layer of each parameter of the model's `encoder`. All other parameters count as one layer above
    it, with the full rate. In the first `decoder_steps`, the encoder stays as it is. See `adamw` for `exempt`.
    """
    if optim.layer_decay == 1 and not decoder_steps:
        return adamw(model, lr, optim.betas, optim.weight_decay, exempt)
    top = max(layers.values()) + 1
    encoder = {f"encoder.{name}": layer for name, layer in layers.items()}
    named = {name: encoder.get(name, top) for name, _ in model.named_parameters()}
    groups = layer_decay_param_groups(model, named, optim.layer_decay, optim.weight_decay, exempt)
    for group in groups:
        group["from_step"] = decoder_steps if group["layer"] < top else 0
    return torch.optim.AdamW(groups, lr=lr, betas=optim.betas, fused=True)


def layer_decay_param_groups(
    model: nn.Module, layers: Mapping[str, int], decay: float, weight_decay: float, exempt: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Return parameter groups in which each layer's learning rate is `decay` times that of the layer above it.

    `layers` holds the layer of each parameter by name; the last one gets the full learning rate. The "scale" of a group
    is applied by `SyncFreeOptimizer`. Weight decay is not applied to what `adamw` exempts.
    """
    top = max(layers.values())
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault((layers[name], _is_exempt(name, p, exempt)), []).append(p)
    return [
        {"params": p, "layer": layer, "scale": decay ** (top - layer), "weight_decay": 0.0 if plain else weight_decay}
        for (layer, plain), p in sorted(groups.items(), key=lambda item: item[0])
    ]


def _is_exempt(name: str, p: nn.Parameter, exempt: tuple[str, ...]) -> bool:
    return p.ndim < 2 or p.shape[0] == 1 or any(part in name for part in exempt)


class SyncFreeOptimizer:
    """Unscale and clip gradients, and take a step unless they are not finite, without waiting for the device.

    Fused AdamW does all three in its kernel: it divides by `grad_scale`, and does nothing if `found_inf` is 1 (the two
    values that torch's GradScaler passes to it). LARS and LAMB below take the same two values.

    `clip` is the largest norm of the gradient. `scaling` scales the loss against underflow, as float16 needs: halved on
    a bad step, doubled after 2000 good ones.

    Attributes:
        state: Loss scale and counts, as scalars on the device; part of a checkpoint.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, clip: float | None, scaling: bool, device: torch.device
    ) -> None:
        self.optimizer, self.device = optimizer, device
        self._clip, self._scaling = clip, scaling
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        zero = torch.zeros((), device=device)
        self.state: dict[str, Tensor] = {
            "scale": torch.full((), 2.0**16, device=device),  # unused without scaling, until a run resumes with it
            "good": zero.clone(),  # steps since the scale last changed
            "skipped": zero.clone(),  # skipped steps
            "streak": zero.clone(),  # skipped steps in a row, up to now
        }

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of a loss."""
        (loss * self.state["scale"]).backward() if self._scaling else loss.backward()

    def step(self, lr: float, number: int = 0) -> Tensor:
        """Apply and clear the accumulated gradient, at this learning rate times the "scale" of each group, if any.

        Until the step number of its "from_step", if any, a group has rate 0: its weights stay bitwise as they are. To
        freeze it by `requires_grad` instead would compile the model again, and change what ranks reduce.

        `number` is that of the step, counted from 0.

        Returns:
            The norm of the gradient, a scalar on the device.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1.0) if number >= group.get("from_step", 0) else 0.0
        s = self.state
        scale = s["scale"] if self._scaling else 1.0
        norm = total_norm(self._parameters) / scale
        finite = torch.isfinite(norm)
        over = norm / self._clip if self._clip is not None else torch.ones_like(norm)
        self.optimizer.grad_scale = scale * over.clamp(min=1.0).nan_to_num()  # type: ignore[attr-defined]
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

    def frozen(self, number: int) -> set[int]:
        """Return the ids of the parameters that stay as they are in a step."""
        groups = (group for group in self.optimizer.param_groups if number < group.get("from_step", 0))
        return {id(p) for group in groups for p in group["params"]}


def total_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the Euclidean norm of all gradients, including the shards of other ranks."""
    norm = torch.nn.utils.get_total_norm([grad for p in parameters if (grad := p.grad) is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class _Skippable(torch.optim.Optimizer):
    """An optimizer that takes a scaled gradient, and takes no step if `found_inf` is 1, without a device sync."""

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take a step with every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    good = torch.ones((), device=p.device) if self.found_inf is None else 1 - self.found_inf
                    gradient = p.grad if self.grad_scale is None else p.grad / self.grad_scale
                    self._step(p, gradient.nan_to_num(0.0, 0.0, 0.0), good, group, self.state[p])

    def _step(self, p: Tensor, gradient: Tensor, good: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        raise NotImplementedError  # takes a step with one parameter; if `good` is 0, leaves it and its state unchanged


class LARS(_Skippable):
    """SGD with momentum whose step along a matrix is `trust` times the norm of the matrix (arXiv 1708.03888).

    As in MAE's linear probe: vectors (biases, norms) take the plain step. No weight decay.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.9, trust: float = 0.001) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "trust": trust})

    def _step(self, p: Tensor, gradient: Tensor, good: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        if not state:
            state["momentum"] = torch.zeros_like(p)
        if p.ndim > 1:
            gradient = gradient * _ratio(p, gradient, group["trust"])
        moved = group["momentum"] * state["momentum"] + gradient
        state["momentum"].copy_(torch.where(good > 0, moved, state["momentum"]))
        p.sub_(state["momentum"] * good, alpha=group["lr"])


class LAMB(_Skippable):
    """AdamW whose step along a decayed tensor has the tensor's norm times the learning rate (arXiv 1904.00962).

    As apex's FusedLAMB, DeiT III's optimizer: tensors without weight decay take Adam's step. FusedLAMB also clips the
    gradient to norm 1, which is left to `SyncFreeOptimizer`.
    """

    def __init__(self, params: Any, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    def _step(self, p: Tensor, gradient: Tensor, good: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        b1, b2 = group["betas"]
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
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


def _ratio(p: Tensor, update: Tensor, trust: float) -> Tensor:
    """Return trust |p| / |update|, or 1 if either norm is zero."""
    norm, step = p.norm(), update.norm()
    return torch.where((norm > 0) & (step > 0), trust * norm / step, 1.0)
