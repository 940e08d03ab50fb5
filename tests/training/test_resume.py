"""Test with killed processes that an interrupted run ends bitwise like an uninterrupted one."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from helpers.commands import Pretraining
from pixmim.build import build_model
from pixmim.config import CheckpointConfig, PretrainConfig
from pixmim.config_io import to_json
from pixmim.pretraining import pretrain
from pixmim.training.checkpoint import CheckpointManager

Make = Callable[..., PretrainConfig]
STEPS = 60  # the 64 images make an epoch of eight steps


@pytest.fixture
def config(tiny_run: Make, tmp_path: Path) -> PretrainConfig:
    config = tiny_run(data="shapes:count=64,size=32", steps=STEPS, checkpoint=CheckpointConfig(every=3), log_every=2)
    (tmp_path / "run.json").write_text(to_json(config))
    return config


def kill(process: Pretraining) -> int:
    """Kill a process, and return the step of its newest checkpoint."""
    os.kill(process.pids[0], signal.SIGKILL)
    process.end(-signal.SIGKILL)
    return process.checkpoints.steps()[-1]


def state(config: PretrainConfig, out: Path) -> dict[str, torch.Tensor]:
    model = build_model(config)
    assert CheckpointManager(out / "checkpoints").load_model(model)[0] == STEPS
    return {f"model.{k}": v for k, v in model.state_dict().items()} | load_file(out / "encoder/model.safetensors")


def test_killed_and_resumed_is_bitwise_the_same(config: PretrainConfig, tmp_path: Path) -> None:
    undisturbed, broken = tmp_path / "undisturbed", tmp_path / "broken"
    process = Pretraining(broken, tmp_path / "run.json", "--out", broken)
    checkpoints = process.checkpoints
    process.until(lambda: len(checkpoints.steps()) >= 2)  # in the first epoch, between two checkpoints
    killed_at = kill(process)
    assert 0 < killed_at < STEPS

    process = Pretraining(broken, "--resume", broken)  # past an epoch's end, and while a checkpoint is being written
    process.until(lambda: checkpoints.steps()[-1] > killed_at + 8 and any((broken / "checkpoints").glob("*.tmp")))
    killed_again = kill(process)
    assert killed_at + 8 < killed_again < STEPS

    Pretraining(broken, "--resume", broken).end()
    pretrain(config, undisturbed, console=Console(quiet=True), report=False)
    one, two = state(config, undisturbed), state(config, broken)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    steps = [line.split(",")[0] for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == len(set(steps)) == STEPS // 2  # no line twice, none missing
    assert not list((broken / "checkpoints").glob("*.tmp"))


def test_ctrl_c_saves_and_prints_how_to_resume(config: PretrainConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = Pretraining(out, tmp_path / "run.json", "--out", out, "--steps", 100_000, "--checkpoint.every", 0)
    process.log()
    os.kill(process.pids[0], signal.SIGINT)
    text = process.end(130)
    assert f"resume with: pixmim pretrain --resume {out}" in text and "Traceback" not in text
    (step,) = process.checkpoints.steps()
    assert f"stopped after step {step}" in text
