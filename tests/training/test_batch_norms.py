"""Test that batch norms resume bitwise, and that trial steps leave no trace in them."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from helpers.models import CNNS
from helpers.runs import equal, train, weights
from pixmim.config import CheckpointConfig, ParallelConfig, PretrainConfig
from pixmim.training.parallelize import trial_step
from pixmim.utils.errors import UserError

Make = Callable[..., PretrainConfig]


class StoppedError(Exception):
    """Ends a run after a step."""


def test_statistics_resume_bitwise_with_accumulated_gradients(tiny_run: Make, tmp_path: Path) -> None:
    config = tiny_run(
        model=CNNS["resnet"], size="64", steps=4, accumulation_steps=2, checkpoint=CheckpointConfig(every=2)
    )
    printed = train(config, tmp_path / "one")
    assert "batch norms: statistics of 4 images at a time" in printed

    def stop(step: int) -> None:
        if step == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(config, tmp_path / "two", on_step_end=stop)
    train(config, tmp_path / "two")
    assert equal(tmp_path / "one", tmp_path / "two")
    assert weights(tmp_path / "one")["layer4.0.bn2.num_batches_tracked"] == 4 * 2


def test_flags_about_blocks_that_would_do_nothing_or_harm_are_refused(
    tiny_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", None)  # refused before the compiler is tried, which takes seconds
    for backbone, options, message in (
        ("test_resnet", {"recompute": True}, "no blocks to recompute"),
        ("test_resnet", {"compile": "blocks"}, "no blocks to recompute or compile"),
        ("test_efficientnet", {"recompute": True}, "count each image twice"),
    ):
        config = tiny_run(
            size="64", model=replace(CNNS["resnet"], backbone=backbone), parallel=ParallelConfig(**options)
        )
        with pytest.raises(UserError, match=message):
            train(config, tmp_path / backbone)
    for rates in ({"drop_path_rate": 0.1}, {"proj_drop_rate": 0.1}):
        model = replace(tiny_run().model, options=tiny_run().model.options | {"depth": 2} | rates)
        with pytest.raises(UserError, match="drop other values in the backward pass"):
            train(tiny_run(model=model, parallel=ParallelConfig(recompute=True)), tmp_path / "drops")


def test_trial_steps_leave_no_trace() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout()).train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    with trial_step(model, torch.optim.SGD(model.parameters())):
        model(torch.randn(2, 3, 8, 8)).sum().backward()
        assert model[2].training and not model[1].training
        assert model[1].weight.grad is not None  # type: ignore[union-attr]
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers()) and model[1].training
    assert all(p.grad is None for p in model.parameters())
