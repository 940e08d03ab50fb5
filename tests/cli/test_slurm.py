"""Test the script for Slurm: parsed like sbatch does, and run by bash with replacements for Slurm's programs."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.cli import say
from helpers.commands import Started, command_in
from pixmim.cli.slurm import Job, sbatch_script
from pixmim.config_io import to_json
from pixmim.recipes import get_recipe
from pixmim.utils.errors import UserError

PROGRAMS = {
    # Records its arguments and exits with $STATUS; with $CANCELLED, it first signals the script, as scancel does.
    "srun": """#!/bin/bash
printf '%s\\0' "$@" > "$NOTES/srun"
echo "$MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS" > "$NOTES/env"
[ -z "$CANCELLED" ] || kill -TERM $PPID
exit "$STATUS"
""",
    "scontrol": """#!/bin/bash
[ "$*" != "show hostnames node[3-4]" ] || printf 'node3\\nnode4\\n'
[ "$1" != requeue ] || echo "$2" >> "$NOTES/requeued"
""",
}


def _start(text: str, folder: Path, status: int, **environment: str) -> tuple[int, bool, str]:
    """Run a script as Slurm would; return its exit status, whether it requeued itself, and its stderr."""
    notes, programs = folder / "notes", folder / "bin"
    for path in (notes, programs):
        path.mkdir(exist_ok=True)
    for name, lines in PROGRAMS.items():
        (programs / name).write_text(lines)
        (programs / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node[3-4]", "SLURM_CPUS_PER_TASK": "12"}
    path = {"PATH": f"{programs}:{os.environ['PATH']}", "NOTES": str(notes), "STATUS": str(status), "CANCELLED": ""}
    path["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    done = subprocess.run(["bash", "-c", text], env=job | path | environment, capture_output=True, text=True)
    requeued = notes / "requeued"
    return done.returncode, requeued.exists() and requeued.read_text() == "123456\n", done.stderr


def _slurm_reads(text: str) -> dict[str, str]:
    """Parse the #SBATCH lines, in which quotes protect blanks and # starts a comment."""
    lines = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    words = [word for line in lines for word in shlex.split(line, comments=True)]
    return dict(word.removeprefix("--").partition("=")[::2] for word in words)


def _job(folder: Path, **changes: object) -> str:
    job = Job(**{"nodes": 2, "gpus": 8, "cpus": 12} | changes)  # type: ignore[arg-type]
    return sbatch_script(job, "name", ["pixmim", "pretrain", "demo"], folder / "run", folder, folder / "job.sh")


@pytest.mark.parametrize(
    ("status", "environment", "requeued"),
    [
        (130, {}, True),  # stopped before the limit
        (130, {"SLURM_RESTART_COUNT": "2"}, True),
        (130, {"SLURM_RESTART_COUNT": "3"}, False),  # the last restart
        (130, {"CANCELLED": "yes"}, False),  # cancelled, or preempted, after which Slurm itself requeues it
        (0, {}, False),  # complete
        (1, {}, False),  # an error of the user
        (137, {}, False),  # killed
    ],
)
def test_the_job_is_requeued_only_if_the_run_stopped_before_the_limit(
    status: int, environment: dict[str, str], requeued: bool, tmp_path: Path
) -> None:
    exited, was_requeued, stderr = _start(_job(tmp_path, restarts=3), tmp_path, status, **environment)
    assert was_requeued == requeued and exited == (0 if requeued else status)
    assert ("stopped after 3 restarts" in stderr) == (environment.get("SLURM_RESTART_COUNT") == "3")


def test_processes_get_the_rendezvous_address(tmp_path: Path) -> None:
    _start(_job(tmp_path), tmp_path, 0)
    assert (tmp_path / "notes" / "env").read_text() == f"node3 {10000 + 123456 % 20000} 12\n"


def test_a_machine_list_that_slurm_cannot_read_ends_the_script(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    text = _job(tmp_path).replace("machines=$(", f"echo 'exit 1' > {programs}/scontrol\nmachines=$(")
    status, requeued, _ = _start(text, tmp_path, 0)
    assert status == 1 and not requeued and not (tmp_path / "notes" / "srun").exists()


def test_options_of_sbatch(tmp_path: Path) -> None:
    options = _slurm_reads(_job(tmp_path, hours=36.5, partition="gpu", account="a", qos="q", mem="0", signal=120))
    assert options == {
        "job-name": "name",
        "chdir": str(tmp_path),
        "output": f"{tmp_path}/run/slurm-%j.out",
        "open-mode": "append",
        "nodes": "2",
        "ntasks-per-node": "8",
        "gres": "gpu:8",
        "cpus-per-task": "12",
        "partition": "gpu",
        "account": "a",
        "qos": "q",
        "mem": "0",
        "time": "36:30:00",
        "signal": "USR1@120",
        "requeue": "",
    }
    assert not {"partition", "account", "qos", "mem"} & _slurm_reads(_job(tmp_path)).keys()


def test_names_with_blanks_and_special_characters_are_quoted(tmp_path: Path) -> None:
    folder = tmp_path / "a b#c" / '50% of "it\'s" $HOME é'
    folder.mkdir(parents=True)
    words = [
        "pixmim",
        "pretrain",
        "demo",
        "--data",
        f"{folder}/x*3+y",
        "--model.options",
        "name",
        "a 'b' $(c)",
        "--out=",
    ]
    text = sbatch_script(Job(), "my run", words, folder, folder, folder / "job.sh")
    options = _slurm_reads(text)
    assert options["job-name"] == "my run" and options["chdir"] == str(folder)
    assert options["output"] == str(folder).replace("%", "%%") + "/slurm-%j.out"
    assert _start(text, tmp_path, 0)[0] == 0
    given = (tmp_path / "notes" / "srun").read_text().rstrip("\0").split("\0")
    assert given[-len(words) :] == words and "--cpus-per-task=12" in given
    stderr = _start(text, tmp_path, 130, SLURM_RESTART_COUNT="100")[2].strip()
    assert shlex.split(stderr.partition("To resume: ")[2]) == ["sbatch", str(folder / "job.sh")]


@pytest.mark.parametrize("path", ["two\nlines", "back\\slash"])
def test_a_path_that_slurm_would_change_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="which Slurm changes"):
        sbatch_script(Job(), "name", ["pixmim"], tmp_path / path, tmp_path, tmp_path / "job.sh")


def test_the_command_writes_what_the_same_command_line_would_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    args = [
        "slurm",
        "demo",
        "--nodes",
        "2",
        "--optim.base_lr",
        "0.002",
        "--gpus=4",
        "--data",
        "no such",
        "--name",
        "a b",
    ]
    status, text = say(capsys, *args)
    file = tmp_path / "runs" / "a b" / "slurm.sh"
    assert status == 0 and "sbatch 'runs/a b/slurm.sh'" in text
    assert "each computes 16 of the 128 images" in text and "no such does not exist on this machine" in text
    subprocess.run(["bash", "-n", file], check=True)
    assert _start(file.read_text(), tmp_path, 0)[0] == 0
    given = (tmp_path / "notes" / "srun").read_text().rstrip("\0").split("\0")
    assert given[given.index(sys.executable) :] == [
        *(sys.executable, "-m", "pixmim.cli", "pretrain", "demo"),
        *("--optim.base_lr", "0.002", "--data", "no such", "--out", "runs/a b", "--threads", "8"),
    ]

    file.write_text("mine")
    status, text = say(capsys, *args)
    assert status == 1 and "--overwrite" in text and file.read_text() == "mine"
    assert say(capsys, *args, "--script", "elsewhere/job.sh")[0] == 0 and (tmp_path / "elsewhere" / "job.sh").exists()
    assert say(capsys, *args, "--overwrite", "--threads", "3", "--out", "out")[0] == 0
    assert "--threads 3" in (tmp_path / "out" / "slurm.sh").read_text() and file.read_text() == "mine"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "no recipe given"),
        (["demmo"], "did you mean 'demo'"),
        (["demo", "--batchsize", "3"], "--batch-size"),
        (["demo", "--node", "3"], "--node"),
        (["demo", "--nodes", "three"], "--nodes"),
        (["demo", "--gpus", "0"], "--gpus must be an integer from 1"),
        (["demo", "--hours", "0"], "--hours must be a number above 0"),
        (["demo", "--hours", "0.05"], "must be less than --hours 0.05"),
        (["demo", "--signal", "70000"], "--signal must be an integer from 1 to 65,535"),
        (["demo", "--restarts", "-1"], "--restarts must be an integer from 0"),
        (["demo", "--gpus", "3"], "--batch-size 128 is not divisible by 3 GPUs"),
        (
            ["demo", "--gpus", "8", "--accumulation-steps", "32"],
            "--accumulation-steps 32 exceeds the 16 images",
        ),
        (["demo", "--size", "50"], "multiples of 8"),
        (["demo", "--model.backbone", "vit_tiny_patch16_225"], "did you mean"),
        (["demo", "--mask.kind", "blocks", "--mask.block-size", "12"], "not a multiple"),
        (["pixmim-vit-base"], "no data given"),
    ],
)
def test_errors_are_reported_before_the_job_is_queued(
    args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    status, text = say(capsys, "slurm", *args)
    assert status != 0 and message in text and "Traceback" not in text
    assert not list(tmp_path.iterdir())


def test_an_existing_run_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    run = replace(get_recipe("demo"), out="run", data="shapes:count=8", mean=(0.5, 0.5, 0.5))
    (tmp_path / "run" / "config.json").write_text(to_json(run))
    args = ["slurm", "demo", "--out", "run", "--data", "shapes:count=8"]
    status, text = say(capsys, *args)
    assert status == 0 and "the job resumes it" in text
    status, text = say(capsys, *args, "--overwrite", "--optim.base-lr", "1")
    assert status == 1 and "holds a run with another --optim" in text


SRUN = """#!/bin/bash
# Leaves the tasks to the test: notes its command and environment, and exits with the status that the test sends.
printf '%s\\0' "${@:5}" > "$NOTES/command"
env -0 > "$NOTES/variables.tmp"
mv "$NOTES/variables.tmp" "$NOTES/variables"
read status < "$NOTES/status"
exit "$status"
"""


def _run_tasks(folder: Path, notes: Path, interrupt: bool) -> int:
    """Run what `srun` was called with in two processes, as Slurm does, and return the higher exit status."""
    deadline = time.monotonic() + 60
    while not (notes / "variables").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    words = (notes / "command").read_text().rstrip("\0").split("\0")
    assert words[:4] == [sys.executable, "-m", "pixmim.cli", "pretrain"]
    pairs = [line.partition("=")[::2] for line in (notes / "variables").read_text().split("\0")]
    given = {name: value for name, value in pairs if name.startswith(("SLURM_", "MASTER_", "OMP_"))}
    (notes / "variables").unlink()
    tasks = []
    for number in ("0", "1"):
        own = {"SLURM_NTASKS": "2", "SLURM_PROCID": number, "SLURM_LOCALID": number}
        output = folder / f"task-{number}.txt"
        tasks.append(Started(output, command_in, str(folder), *words[3:], variables=given | own))
    if interrupt:
        metrics = folder / "run" / "metrics.jsonl"
        tasks[0].until(lambda: metrics.exists() and metrics.stat().st_size > 0)
        for task in tasks:
            os.kill(task.pids[0], signal.SIGUSR1)
    for task in tasks:
        task.processes[0].join(120)
    statuses = [-1 if task.processes[0].exitcode is None else task.processes[0].exitcode for task in tasks]
    assert all(status in (0, 130) for status in statuses), "".join(task.text for task in tasks)
    return max(status or 0 for status in statuses)


def test_two_real_processes_stop_in_time_and_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run the script with two processes: rendezvous by Slurm's variables, USR1, requeue, and the end of the run."""
    monkeypatch.chdir(tmp_path)
    small = ["--size", "48", "--batch-size", "4", "--data", "shapes:count=40,size=48", "--model.decoder-depth", "1"]
    alone = ["--knn.train", "", "--knn.test", "", "--knn.every", "0", "--device", "cpu", "--precision", "fp32"]
    args = [*small, *alone, "--steps", "60", "--log-every", "1"]
    assert say(capsys, "slurm", "demo", "--gpus", "2", "--cpus", "1", "--out", "run", *args)[0] == 0
    text = (tmp_path / "run" / "slurm.sh").read_text()
    monkeypatch.setitem(PROGRAMS, "srun", SRUN)
    monkeypatch.setitem(PROGRAMS, "scontrol", PROGRAMS["scontrol"].replace("node3", "127.0.0.1"))
    job = {"SLURM_JOB_ID": str(_free_port() - 10000), "SLURM_CPUS_PER_TASK": "1"}
    notes = tmp_path / "notes"
    notes.mkdir()
    os.mkfifo(notes / "status")
    status_of_tasks = os.open(notes / "status", os.O_RDWR)

    def run(interrupt: bool, **more: str) -> None:
        with ThreadPoolExecutor(1) as pool:
            script, status = pool.submit(_start, text, tmp_path, 0, **job, **more), 1
            try:
                status = _run_tasks(tmp_path, notes, interrupt)
            finally:
                os.write(status_of_tasks, f"{status}\n".encode())
            status, _, stderr = script.result(timeout=60)
        assert status == 0, stderr
        assert (notes / "requeued").read_text().split() == [job["SLURM_JOB_ID"]]  # only once

    def losses() -> list[int]:
        lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        return [line["step"] for line in lines if "loss" in line]

    run(interrupt=True)
    stopped = losses()[-1]
    assert 0 < stopped < 60 and not (tmp_path / "run" / "encoder/model.safetensors").exists()

    run(interrupt=False, SLURM_RESTART_COUNT="1")
    assert losses() == list(range(1, 61)) and (tmp_path / "run" / "encoder/model.safetensors").exists()
    os.close(status_of_tasks)


def _free_port() -> int:
    """Return a free port in the range that scripts use."""
    for port in range(10000, 30000):
        with socket.socket() as attempt:
            try:
                attempt.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise AssertionError("no port is free")
