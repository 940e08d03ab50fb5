"""Test faults in real processes: after each, the same command resumes and ends like an undisturbed run."""

import dataclasses
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.commands import Pretraining, Started, launch
from pixmim.config import CheckpointConfig, PretrainConfig
from pixmim.config_io import to_json
from pixmim.training.checkpoint import CheckpointManager

Make = Callable[..., PretrainConfig]
STEPS = 40


@pytest.fixture
def config(tiny_run: Make, tmp_path: Path) -> PretrainConfig:
    """Forty steps over five epochs, and the file that starts them."""
    config = tiny_run(
        data="shapes:count=64,size=32", steps=STEPS, threads=1, log_every=2, checkpoint=CheckpointConfig(every=4)
    )
    (tmp_path / "run.json").write_text(to_json(config))
    return config


def torchrun(folder: Path, out: Path, *flags: object) -> Started:
    """Train `folder/run.json` in two processes of torchrun, which restarts them once."""
    launcher = ["--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "--monitor-interval", "0.1"]
    command = [*launcher, "-m", "pixmim.cli", "pretrain", folder / "run.json", "--out", out, *flags]
    return Started(folder / f"{out.name}.txt", launch, *map(str, command))


def workers(launcher: Started) -> list[int]:
    """Return the process numbers of torchrun's workers, by rank."""
    pids = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = dict(pair.split("=", 1) for pair in (path / "environ").read_text().split("\0") if "=" in pair)
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == launcher.pids[0] and "RANK" in environment:
            pids[int(environment["RANK"])] = int(path.name)
    return [pids[rank] for rank in sorted(pids)]


def started(folder: Path, name: str, *flags: object, ranks: int = 1, limit: int = 0) -> Pretraining:
    out = folder / name
    return Pretraining(out, folder / "run.json", "--out", out, *flags, ranks=ranks, limit=limit)


def same(one: Path, other: Path) -> bool:
    a, b = (load_file(out / "encoder/model.safetensors") for out in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc: needs Linux")


@linux
def test_one_of_two_processes_is_killed(config: PretrainConfig, tmp_path: Path) -> None:
    """torchrun restarts both, and they resume from the newest checkpoint."""
    out = tmp_path / "broken"
    broken = torchrun(tmp_path, out)
    checkpoints = CheckpointManager(out / "checkpoints")
    broken.until(lambda: any(step >= 8 for step in checkpoints.steps()))
    os.kill(workers(broken)[1], signal.SIGKILL)
    text = broken.end()
    assert "resuming from step" in text and "another rank has ended" in text
    quiet = started(tmp_path, "quiet", ranks=2)
    quiet.end()
    assert same(quiet.out, out)


@linux
def test_a_stuck_rank_ends_the_run_and_is_named(config: PretrainConfig, tmp_path: Path) -> None:
    broken = started(tmp_path, "broken", "--parallel.timeout", 10, "--steps", 100_000, "--batch-size", 9, ranks=3)
    broken.reach(8)
    os.kill(broken.pids[1], signal.SIGSTOP)
    for rank in (0, 2):
        broken.processes[rank].join(timeout=60)
        assert broken.processes[rank].exitcode == 1, broken.text
    os.kill(broken.pids[1], signal.SIGKILL)
    broken.processes[1].join()
    assert broken.text.count("error: stuck ranks: 1 ") == 1 and "--parallel.timeout" in broken.text


@linux
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_one_process_stops_all_with_a_checkpoint(
    number: int, config: PretrainConfig, tmp_path: Path
) -> None:
    broken = started(tmp_path, "broken", "--steps", 100_000, "--checkpoint.every", 0, ranks=2)
    broken.log()
    os.kill(broken.pids[1], number)
    text = broken.end(130)
    (step,) = broken.checkpoints.steps()
    assert f"stopped after step {step}; resume with: pixmim pretrain --resume {broken.out}" in text


def test_a_full_disk_fails_checkpoints_but_not_the_run(config: PretrainConfig, tmp_path: Path) -> None:
    """A limit on the size of files simulates a full disk: writing fails in the same place."""
    broken = started(tmp_path, "broken", limit=100_000)
    text = broken.end(status=1)
    assert text.count("warning: a checkpoint could not be written") == STEPS // 4 - 1
    assert "error: a checkpoint could not be written" in text and "The same command resumes" in text
    assert broken.checkpoints.steps() == [] and "Traceback" not in text
    with_space, quiet = started(tmp_path, "broken"), started(tmp_path, "quiet")
    with_space.end(), quiet.end()
    assert same(quiet.out, broken.out)


@linux
def test_running_out_of_memory_names_the_flag_to_change(tmp_path: Path) -> None:
    """A limit of addresses simulates a small machine."""
    small = lambda: resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))  # noqa: E731
    flags = ["pixmim-vit-small", "--data", "shapes:count=512,size=32", "--steps", "1", "--out", str(tmp_path / "run")]
    command = [sys.executable, "-m", "pixmim.cli", "pretrain", *flags, "--size", "224", "--precision", "fp32"]
    done = subprocess.run(
        [*command, "--batch-size", "2048", "--accumulation-steps", "1"], capture_output=True, preexec_fn=small
    )
    text = done.stderr.decode()
    assert done.returncode == 1 and "Traceback" not in text
    text = " ".join(text.split())
    assert re.search(
        r"out of memory with 2,048 images computed at once \(.*\): --accumulation-steps 2 halves them", text
    ), text


def damage(folder: Path, kind: str) -> None:
    path = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    if kind == "a byte":
        content[len(content) // 2] ^= 1
    path.write_bytes(content if kind == "a byte" else content[:-100])
    if kind == "a file":
        path.unlink()


@pytest.mark.parametrize("kind", ["a byte", "the end", "a file"])
def test_a_damaged_checkpoint_is_set_aside(kind: str, config: PretrainConfig, tmp_path: Path) -> None:
    from rich.console import Console

    from pixmim.pretraining import pretrain

    short = dataclasses.replace(config, steps=8)
    pretrain(short, tmp_path / "run", console=Console(quiet=True), report=False)
    before = load_file(tmp_path / "run" / "encoder/model.safetensors")
    damage(tmp_path / "run" / "checkpoints" / "step-000000008", kind)
    with (tmp_path / "output.txt").open("w") as file:
        pretrain(short, tmp_path / "run", console=Console(file=file, width=500), report=False)
    text = (tmp_path / "output.txt").read_text()
    assert "the checkpoint of step 8 is damaged (" in text and "resuming from step 4" in text
    assert (tmp_path / "run" / "checkpoints" / "damaged-step-000000008").is_dir()
    after = load_file(tmp_path / "run" / "encoder/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


@linux
@pytest.mark.skipif(not os.environ.get("PIXMIM_LONG"), reason="sixty random kills take minutes: make test-long")
@pytest.mark.parametrize(("processes", "killed"), [(1, 1), (2, 2), (2, 1)])
def test_killed_at_twenty_random_moments(processes: int, killed: int, config: PretrainConfig, tmp_path: Path) -> None:
    """Kill a run while it starts, trains, or writes one of its many checkpoints."""
    # A rank whose peer was killed before the two connected waits for it until the timeout.
    length = ("--steps", 1500, "--checkpoint.every", 3, "--parallel.timeout", 60)
    quiet = started(tmp_path, "quiet", *length, ranks=processes)
    quiet.end()
    generator, kills, writing = random.Random(0), 0, 0
    broken = started(tmp_path, "broken", *length, ranks=processes)
    while kills < 20:
        before = max(broken.checkpoints.steps(), default=0)
        if generator.random() < 0.8:
            broken.reach(before + 3)
        time.sleep(generator.uniform(0, 1))
        for victim in generator.sample(broken.pids, killed):
            with suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                kills += 1
        broken.end(status=None)
        writing += any((broken.out / "checkpoints").glob("*.tmp"))
        broken = started(tmp_path, "broken", *length, ranks=processes)
    broken.end()
    assert writing and same(quiet.out, broken.out)
    print(f"{processes} processes, {kills} kills of {killed} at once, {writing} in the middle of a checkpoint")
