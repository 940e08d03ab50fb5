"""Real processes, really killed: a run that was interrupted ends bitwise as one that was not."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pixmim.build import build_model
from pixmim.config import Run, Saving
from pixmim.runfile import to_json
from pixmim.training.checkpoint import Checkpoints

Make = Callable[..., Run]
STEPS = 60  # the 64 images make an epoch of eight steps


@pytest.fixture
def run(tiny_run: Make) -> Run:
    return tiny_run(data="shapes:count=64,size=32", steps=STEPS, saving=Saving(every=3), log_every=2)


def start(*args: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pixmim.cli", "pretrain", *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], status: int = 0) -> str:
    text, _ = process.communicate(timeout=120)
    assert process.returncode == status, text
    return text


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def state(run: Run, out: Path) -> dict[str, torch.Tensor]:
    model = build_model(run)
    assert Checkpoints(out / "checkpoints").load_model(model)[0] == STEPS
    return {f"model.{k}": v for k, v in model.state_dict().items()} | load_file(out / "encoder/model.safetensors")


def test_killed_and_resumed_is_bitwise_the_same(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(to_json(run))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    undisturbed = start(tmp_path / "run.json", "--out", whole)

    checkpoints = Checkpoints(broken / "checkpoints")
    process = start(tmp_path / "run.json", "--out", broken)
    wait_for(lambda: len(checkpoints.steps()) >= 2, process)  # in the first epoch, between two checkpoints
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_at = checkpoints.steps()[-1]
    assert 0 < killed_at < STEPS

    process = start("--resume", broken)  # past an epoch's end, and while a checkpoint is being written
    wait_for(lambda: checkpoints.steps()[-1] > killed_at + 8 and any((broken / "checkpoints").glob("*.tmp")), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_again = checkpoints.steps()[-1]
    assert killed_at + 8 < killed_again < STEPS

    finish(start("--resume", broken))
    finish(undisturbed)
    one, two = state(run, whole), state(run, broken)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    steps = [line.split(",")[0] for line in (broken / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == len(set(steps)) == STEPS // 2  # no line twice, none missing
    assert not list((broken / "checkpoints").glob("*.tmp"))
    assert (broken / "report.html").exists()


def test_ctrl_c_saves_and_says_how_to_go_on(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(to_json(run))
    out = tmp_path / "out"
    process = start(tmp_path / "run.json", "--out", out, "--steps", 100_000, "--saving.every", 0)
    wait_for(lambda: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size > 0, process)
    process.send_signal(signal.SIGINT)
    text = finish(process, status=130)
    assert f"go on with: pixmim pretrain --resume {out}" in text and "Traceback" not in text
    (step,) = Checkpoints(out / "checkpoints").steps()
    assert f"stopped after step {step}" in text
