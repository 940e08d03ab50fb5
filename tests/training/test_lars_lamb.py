"""Test LARS against a slow formula and LAMB against timm, with SyncFreeOptimizer."""

import pytest
import timm.optim
import torch
from torch import nn

from pixmim.training.optim import LAMB, LARS, SyncFreeOptimizer

CPU = torch.device("cpu")


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def batch(step: int) -> torch.Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(step))


def trained(kind: type, steps: int, scaling: bool = False, spoil: int = -1, **options: object) -> nn.Module:
    model = network()
    optimizer = SyncFreeOptimizer(kind(model.parameters(), lr=1.0, **options), None, scaling, CPU)
    for step in range(steps):
        x = batch(step) * (float("nan") if step == spoil else 1.0)
        optimizer.backward(model(x).square().mean())
        optimizer.step(0.5 * (step + 1))
    return model


@pytest.mark.parametrize("scaling", [False, True])
def test_lars_by_hand(scaling: bool) -> None:
    """Matrices take a step of 0.001 times their norm, with momentum; biases and norms take the plain gradient."""
    model = network().double()
    velocity = [torch.zeros_like(p) for p in model.parameters()]
    for step in range(6):
        model.zero_grad()
        model(batch(step).double()).square().mean().backward()
        for p, v in zip(model.parameters(), velocity, strict=True):
            assert p.grad is not None
            g = p.grad.clone()
            if p.ndim == 2:
                g *= 0.001 * sum(float(x) ** 2 for x in p.detach().flatten()) ** 0.5
                g /= sum(float(x) ** 2 for x in p.grad.flatten()) ** 0.5
            v.mul_(0.9).add_(g)
            p.data -= 0.5 * (step + 1) * v
    for p, expected in zip(trained(LARS, 6, scaling).parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, expected.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scaling", [False, True])
def test_lamb_is_timms(scaling: bool) -> None:
    def groups(model: nn.Module) -> list[dict[str, object]]:
        decayed, plain = ([p for p in model.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False))
        return [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]

    model, reference = network(), network()
    optimizer = SyncFreeOptimizer(LAMB(groups(model), lr=1.0), None, scaling, CPU)
    other = timm.optim.Lamb(groups(reference), lr=1.0, eps=1e-8, max_grad_norm=None)
    for step in range(6):
        optimizer.backward(model(batch(step)).square().mean())
        optimizer.step(0.01)
        other.zero_grad()
        reference(batch(step)).square().mean().backward()
        for group in other.param_groups:
            group["lr"] = 0.01
        other.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("optimizer", [LARS, LAMB])
def test_a_bad_gradient_changes_nothing(optimizer: type) -> None:
    for a, b in zip(trained(optimizer, 4, spoil=3).parameters(), trained(optimizer, 3).parameters(), strict=True):
        assert torch.equal(a, b)
