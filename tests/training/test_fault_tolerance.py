"""Test faults in real processes: after each, the same command resumes and ends like an undisturbed run."""

import dataclasses
import os
import random
import re
import signal
import time
from collections.abc import Callable, Sequence
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


def started(folder: Path, name: str, *flags: object, ranks: int = 1, limit: int = 0) -> Pretraining:
    out = folder / name
    return Pretraining(out, folder / "run.json", "--out", out, *flags, ranks=ranks, limit=limit)


def same(one: Path, other: Path) -> bool:
    a, b = (load_file(out / "encoder/model.safetensors") for out in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc: needs Linux")
long = pytest.mark.skipif(not os.environ.get("PIXMIM_LONG"), reason="kills for minutes: make test-long")


def kill_in_turn(folder: Path, processes: int, victims: Sequence[int], *flags: str) -> tuple[Path, str]:
    """Train in processes of torch's elastic agent and kill these ranks one after another, each after a checkpoint.

    Returns the folder of the run, and its output.
    """
    out = folder / "broken"
    args = (str(folder / "run.json"), "--out", str(out), *flags)
    broken = Started(folder / "broken.txt", launch, str(out), processes, len(victims), *args)
    checkpoints = CheckpointManager(out / "checkpoints")
    for start, victim in enumerate(victims):
        before = max(checkpoints.steps(), default=0)
        broken.until(lambda before=before: max(checkpoints.steps(), default=0) > before)  # type: ignore[misc]
        os.kill(int((folder / f"broken-{start}-{victim}.pid").read_text()), signal.SIGKILL)
    return out, broken.end()


@linux
def test_one_of_two_processes_is_killed(config: PretrainConfig, tmp_path: Path) -> None:
    """torch's agent restarts both, and they resume from the newest checkpoint."""
    length = ("--steps", "100", "--checkpoint.every", "8")  # the run is still far from its end when a process is killed
    out, text = kill_in_turn(tmp_path, 2, [1], *length)
    assert "resuming from step" in text
    quiet = started(tmp_path, "quiet", *length, ranks=2)
    quiet.end()
    assert same(quiet.out, out)


def test_a_rank_whose_peer_is_killed_ends_with_the_reason(config: PretrainConfig, tmp_path: Path) -> None:
    broken = started(tmp_path, "broken", "--steps", 100_000, ranks=2)
    broken.reach(8)
    os.kill(broken.pids[1], signal.SIGKILL)
    broken.processes[0].join(timeout=120)
    assert broken.processes[0].exitcode == 1 and "another rank has ended" in broken.text


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
@long
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


@linux
@long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("processes", [4, 8])
def test_each_rank_is_killed_in_turn(processes: int, strategy: str, config: PretrainConfig, tmp_path: Path) -> None:
    """Each rank accumulates over parts of one and two images."""
    length = ("--batch-size", str(3 * processes), "--accumulation-steps", "2", "--parallel.strategy", strategy)
    length += ("--steps", str(8 * processes))
    out, text = kill_in_turn(tmp_path, processes, range(processes), *length)
    resumed = [int(step) for step in re.findall(r"resuming from step (\d+)", text)]
    quiet = started(tmp_path, "quiet", *length, ranks=processes)
    quiet.end()
    print(f"{strategy}, {processes} processes, killed in turn: resumed from steps {resumed}")
    assert len(resumed) == processes and resumed == sorted(set(resumed)) and same(quiet.out, out)
