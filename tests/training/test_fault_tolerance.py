"""Test faults in real processes: after each, the same command resumes and ends like an undisturbed run."""

import dataclasses
import os
import random
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from helpers.commands import Pretraining, Started, launch
from pixmim.config import CheckpointConfig, PretrainConfig
from pixmim.config_io import to_json
from pixmim.training.checkpoint import CheckpointManager
from pixmim.training.distributed import Distributed, _agree_on_name
from pixmim.training.metric_logger import read_metrics

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


def launched(
    folder: Path, name: str, processes: int, *flags: str, victims: Sequence[int] = (), restarts: int = 0
) -> tuple[Path, str]:
    """Train in processes of torch's elastic agent and kill some ranks one after another, each after a checkpoint.

    Returns the folder of the run, and the output, once the run has ended: with an error if there are fewer restarts
    than victims.
    """
    out, output = folder / name, folder / f"{name}-{processes}.txt"
    args = (str(folder / "run.json"), "--out", str(out), *flags)
    process = Started(output, launch, str(out), processes, restarts, *args)
    checkpoints = CheckpointManager(out / "checkpoints")
    for start, victim in enumerate(victims):
        before = max(checkpoints.steps(), default=0)
        process.until(lambda before=before: max(checkpoints.steps(), default=0) > before)  # type: ignore[misc]
        os.kill(int((folder / f"{name}-{processes}-{start}-{victim}.pid").read_text()), signal.SIGKILL)
    return out, process.end(None if restarts < len(victims) else 0)


def images_read(folder: Path, name: str, launches: Mapping[int, int]) -> list[list[int]]:
    """Return the images of each step, over all ranks, given the first step of each number of processes."""
    steps: list[list[int]] = []
    for processes, first in launches.items():
        files = [folder / f"{name}-{processes}-0-{rank}.read" for rank in range(processes)]
        batches = zip(*([line.split() for line in file.read_text().splitlines()] for file in files), strict=False)
        steps[first:] = [[int(index) for share in batch for index in share] for batch in batches]
    return steps


@linux
def test_one_of_two_processes_is_killed(config: PretrainConfig, tmp_path: Path) -> None:
    """torch's agent restarts both, and they resume from the newest checkpoint."""
    length = ("--steps", "100", "--checkpoint.every", "8")  # the run is still far from its end when a process is killed
    out, text = launched(tmp_path, "broken", 2, *length, victims=[1], restarts=1)
    assert "resuming from step" in text
    quiet = started(tmp_path, "quiet", *length, ranks=2)
    quiet.end()
    assert same(quiet.out, out)


def test_starts_in_one_store_do_not_mix() -> None:
    """The store of torchrun's agent outlives its processes, also if there are others afterwards."""
    server = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)  # type: ignore[attr-defined]

    def name(rank: int, size: int) -> str:
        store = dist.TCPStore("127.0.0.1", server.port, None, False)  # type: ignore[attr-defined]
        return _agree_on_name(store, Distributed(rank, size), timeout=30)

    agreed = []
    for size in (4, 2, 3, 3):
        with ThreadPoolExecutor(size) as pool:
            agreed.append(set(pool.map(name, reversed(range(size)), [size] * size)))
    assert [len(names) for names in agreed] == [1] * 4 and len(set.union(*agreed)) == 4
    with pytest.raises(RuntimeError, match=r"waited 0\.1 s for the other ranks"):
        _agree_on_name(server, Distributed(0, 2), timeout=0.1)


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


def resumed_from(text: str) -> list[int]:
    return [int(step) for step in re.findall(r"resuming from step (\d+)", text)]


@linux
@long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("processes", [4, 8])
def test_each_rank_is_killed_in_turn(processes: int, strategy: str, config: PretrainConfig, tmp_path: Path) -> None:
    """Each rank accumulates over parts of one and two images."""
    length = ("--batch-size", str(3 * processes), "--accumulation-steps", "2", "--parallel.strategy", strategy)
    length += ("--steps", str(8 * processes))
    out, text = launched(tmp_path, "broken", processes, *length, victims=range(processes), restarts=processes)
    resumed = resumed_from(text)
    quiet = started(tmp_path, "quiet", *length, ranks=processes)
    quiet.end()
    print(f"{strategy}, {processes} processes, killed in turn: resumed from steps {resumed}")
    assert len(resumed) == processes and resumed == sorted(set(resumed)) and same(quiet.out, out)


@linux
@long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_other_numbers_of_processes_read_each_image_once(strategy: str, config: PretrainConfig, tmp_path: Path) -> None:
    """Four processes, then two, then three, each killed or complete within an epoch of 5.3 steps."""
    flags = ("--batch-size", "12", "--steps", "32", "--log-every", "1", "--parallel.strategy", strategy)
    quiet, _ = launched(tmp_path, "quiet", 1, *flags)
    launches = {4: 0}
    launched(tmp_path, "broken", 4, *flags, victims=[1])
    for processes, victims in ((2, [0]), (3, [])):
        broken, text = launched(tmp_path, "broken", processes, *flags, victims=victims)
        (launches[processes],) = resumed_from(text)
    assert 0 < launches[2] < launches[3] < 32 and launches[2] * 12 % 64 and launches[3] * 12 % 64, launches
    print(f"{strategy}: resumed on other numbers of processes at {launches}")
    one, several = ([line["loss"] for line in read_metrics(out / "metrics.jsonl")] for out in (quiet, broken))
    assert len(one) == 32 and several == pytest.approx(one, rel=2e-5)
    read = images_read(tmp_path, "broken", launches)
    assert read == images_read(tmp_path, "quiet", {1: 0})
    assert [sorted(epoch) for epoch in np.reshape(read, (6, 64)).tolist()] == [list(range(64))] * 6
