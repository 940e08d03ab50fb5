"""Signals, standard streams and full disks: a command ends when a signal requires it, and only then."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from helpers.cli import say
from helpers.commands import Started, stuck_command, unheard_command
from helpers.models import TINY
from pixmim import cli, pretraining
from pixmim.config import ArchitectureConfig, CheckpointConfig, PretrainConfig
from pixmim.config_io import to_json
from pixmim.training.checkpoint import CheckpointManager
from pixmim.training.metric_logger import read_metrics
from pixmim.training.preemption import Interrupted, PreemptionHandler
from pixmim.utils import process
from pixmim.utils.threads import ThreadPool, num_threads
from pixmim.weights import save

Make = Callable[..., PretrainConfig]

SLACK = 15.0
"""Seconds that a busy machine may take for what should take `process.LIMIT`."""

BEGIN = """
import ctypes, os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pixmim.training.preemption import PreemptionHandler
from pixmim.utils.process import as_process

def ready(word="ready"):
    os.write(1, word.encode() + b"\\n")

def loop():
    while True:
        pass

def block():  # a C function that no signal interrupts
    mutex = ctypes.create_string_buffer(256)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)

def command():
    BODY
    return 0

sys.exit(as_process(command))
"""


def start(body: str, **options: object) -> "subprocess.Popen[str]":
    """Start a process whose command is `body`."""
    code = BEGIN.replace("BODY", body.strip().replace("\n", "\n    "))
    arguments: dict[str, object] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    arguments |= {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)} | options  # nohup ignores it
    return subprocess.Popen([sys.executable, "-c", code], text=True, **arguments)  # type: ignore[call-overload]


def wait_for(child: "subprocess.Popen[str]", word: str = "ready") -> None:
    """Wait until a process prints a line."""
    assert child.stdout is not None
    line = child.stdout.readline()
    assert line == word + "\n", line + child.communicate()[1]


def end(child: "subprocess.Popen[str]", *statuses: int, limit: float = SLACK) -> str:
    """Wait for a process to end with one of several statuses, and return what it wrote to stderr."""
    try:
        _, text = child.communicate(timeout=limit)
    finally:
        child.kill()
    assert child.returncode in statuses, text
    assert "Traceback" not in text and "Exception" not in text
    return text


STUCK = {
    "a loop": ("ready()\nloop()", signal.SIGINT),
    "a loop that catches everything": (
        "ready()\nwhile True:\n    try: time.sleep(100)\n    except BaseException: pass",
        signal.SIGTERM,
    ),
    "a sleep": ("ready()\ntime.sleep(100)", signal.SIGHUP),
    "a lock": ("lock = threading.Lock()\nready()\nwhile True: lock.acquire()", signal.SIGTERM),
    "a C function": ("ready()\nblock()", signal.SIGINT),
    "standard input": ("ready()\nsys.stdin.read()", signal.SIGTERM),
    "a thread that is joined": (
        "with ThreadPoolExecutor(1) as pool:\n    pool.submit(loop)\n    ready()",
        signal.SIGINT,
    ),
    "two threads that are joined": (
        "with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:\n"
        "    one.submit(block)\n    two.submit(loop)\n    ready()\n    one.submit(block).result()",
        signal.SIGHUP,
    ),
    "a FIFO": (
        "os.mkfifo(sys.argv[0] + str(os.getpid()))\nready()\nopen(sys.argv[0] + str(os.getpid()))",
        signal.SIGINT,
    ),
}


def test_a_signal_ends_a_command_whatever_it_is_executing(tmp_path: Path) -> None:
    assert process.LIMIT == 2.0
    children = {name: start(body, cwd=tmp_path) for name, (body, _) in STUCK.items()}
    for child in children.values():
        wait_for(child)
    for name, child in children.items():
        child.send_signal(STUCK[name][1])
    for name, child in children.items():
        assert end(child, 128 + STUCK[name][1]) == "", name


def test_a_stuck_thread_does_not_delay_the_end() -> None:
    assert end(start("ThreadPoolExecutor(1).submit(block)"), 0) == ""


def test_a_signal_that_arrives_twice_counts_once_and_temporary_files_are_removed(tmp_path: Path) -> None:
    body = "from pixmim.utils import files, process\nprocess.LIMIT = 60\n"  # a busy disk may take two seconds to remove
    body += "def write(file):\n    ready()\n    time.sleep(100)\n"
    child = start(body + "files.atomic_write(Path('new.txt'), write)", cwd=tmp_path)
    wait_for(child)
    child.send_signal(signal.SIGINT)
    child.send_signal(signal.SIGTERM)
    end(child, 130, 143)  # of either: the kernel may deliver both at once
    assert not list(tmp_path.iterdir())


def test_the_signal_of_a_time_limit_gives_the_status_that_restarts_a_job() -> None:
    child = start("ready()\ntime.sleep(100)")
    wait_for(child)
    child.send_signal(signal.SIGUSR1)
    end(child, 130)


def test_nohup_is_respected() -> None:
    child = start("ready()\nsys.stdin.readline()", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    wait_for(child)
    child.send_signal(signal.SIGHUP)
    assert child.stdin is not None
    child.stdin.write("\n")
    end(child, 0)


def test_training_may_finish_its_step_and_the_second_signal_ends_it() -> None:
    child = start(
        "with PreemptionHandler() as handler:\n    ready()\n    while not handler.requested: pass\n"
        "    ready('requested')\n    block()"
    )
    wait_for(child)
    child.send_signal(signal.SIGINT)
    child.send_signal(signal.SIGTERM)  # the same key press, passed on by a parent
    wait_for(child, "requested")
    time.sleep(process.LIMIT + 0.5)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    assert end(child, 130).count("once more to stop now") == 1


def test_a_signal_is_acknowledged_while_a_step_computes() -> None:
    """The main thread runs no signal handler before its C call returns."""
    child = start("with PreemptionHandler():\n    ready()\n    block()")
    wait_for(child)
    child.send_signal(signal.SIGINT)
    assert child.stderr is not None and child.stderr.readline() == "\n"
    assert "once more to stop now" in child.stderr.readline() and child.poll() is None
    time.sleep(1.2)  # sooner, it would count as the same key press
    child.send_signal(signal.SIGINT)
    end(child, 130)


def test_signal_handlers_are_restored_after_a_command() -> None:
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
    before, hook = [signal.getsignal(number) for number in numbers], sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), process.Guard() as guard:
        signal.raise_signal(signal.SIGTERM)
    assert guard.number == signal.SIGTERM and not guard.thread.is_alive()
    assert [signal.getsignal(number) for number in numbers] == before and sys.unraisablehook is hook
    assert signal.set_wakeup_fd(-1) == -1
    with PreemptionHandler(verbose=False) as handler:
        signal.raise_signal(signal.SIGTERM)
    assert handler.requested and [signal.getsignal(number) for number in numbers] == before
    assert not process.deferring


def test_threads_are_those_of_the_cores_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    assert [num_threads(0), num_threads(0, processes=8), num_threads(0, processes=99), num_threads(40)] == [
        12,
        8,
        1,
        40,
    ]
    monkeypatch.delattr(os, "sched_getaffinity")  # macOS, Windows
    assert [num_threads(0), num_threads(0, processes=8)] == [16, 8]


def test_a_pool_that_is_closed_early_abandons_a_stuck_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pixmim.utils.threads.SHUTDOWN_TIMEOUT", 0.1)
    stuck, done = threading.Event(), []
    with pytest.raises(KeyboardInterrupt), ThreadPool(1, "pixmim-stuck") as pool:
        pool.submit(stuck.wait)
        waiting = pool.submit(done.append, 1)
        raise KeyboardInterrupt
    assert waiting.cancelled()
    stuck.set()
    with ThreadPool(2, "pixmim-quick") as pool:  # otherwise it finishes its jobs
        for i in range(10):
            pool.submit(done.append, i)
    assert sorted(done) == list(range(10))


def test_several_processes_are_not_parted_by_a_signal() -> None:
    with PreemptionHandler(verbose=False) as handler:
        with handler.waiting(alone=False):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted), handler.waiting():
            raise AssertionError("the earlier signal was ignored")


@pytest.mark.parametrize("at", [0, 2, 6])
def test_an_interrupted_online_evaluation_is_repeated_on_resume(
    at: int, tiny_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(log_every=1)
    run = type(run)(**{**vars(run), "knn": type(run.knn)(every=0.2)})  # one step, rounded up
    calls: list[int] = []

    def evaluate(_: nn.Module) -> dict[str, float]:
        calls.append(1)
        if len(calls) == at + 1:
            signal.raise_signal(signal.SIGINT)
        return {"knn/top1": float(len(calls))}

    monkeypatch.setattr(pretraining, "online_knn", lambda config, console: evaluate)
    result = pretraining.pretrain(run, tmp_path, console=Console(quiet=True), report=False)
    assert (result.step, result.finished) == (at, False)
    assert pretraining.pretrain(run, tmp_path, console=Console(quiet=True), report=False).finished
    steps = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if "knn/top1" in line]
    assert steps == list(range(7)) and (tmp_path / "encoder/model.safetensors").exists()


def start_stuck(folder: Path, images: int, *args: object) -> Started:
    """Start a command whose data block after `images`, and wait until they do."""
    child = Started(folder / "output.txt", stuck_command, str(folder), images, *map(str, args))
    child.until((folder / "stuck").exists)
    return child


def test_a_run_whose_data_block_saves_and_ends_at_the_first_signal(tiny_run: Make, tmp_path: Path) -> None:
    run = tiny_run(log_every=1, steps=6, checkpoint=CheckpointConfig(every=0), threads=2)
    (tmp_path / "run.json").write_text(to_json(run))
    child = start_stuck(tmp_path, 30, "pretrain", "run.json", "--out", tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    child.until(lambda: metrics.exists() and metrics.read_text().count("\n") == 3)  # of the images before
    os.kill(child.pids[0], signal.SIGINT)
    text = child.end(130)
    assert CheckpointManager(tmp_path / "run" / "checkpoints").steps() == [3]
    assert "stopped after step 3; resume with: pixmim pretrain --resume" in text and "Traceback" not in text
    for folder in ("run", "uninterrupted"):
        assert pretraining.pretrain(run, tmp_path / folder, console=Console(quiet=True), report=False).finished
    resumed, expected = (load_file(tmp_path / name / "encoder/model.safetensors") for name in ("run", "uninterrupted"))
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_a_command_whose_data_block_ends(tmp_path: Path) -> None:
    child = start_stuck(tmp_path, 5, "cache", "shapes:count=40,size=32", "cache", "--size", "32", "--threads", "2")
    os.kill(child.pids[0], signal.SIGTERM)
    assert "Traceback" not in child.end(143)


def test_a_closed_pipe_ends_a_listing_quietly() -> None:
    words = [sys.executable, "-m", "pixmim.cli", "list"]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    assert (child.stderr.read(), child.wait()) == (b"", 0)
    child.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full: LINUX ONLY")
def test_output_that_cannot_be_written_is_dropped() -> None:
    with open("/dev/full", "wb") as full:
        child = start("for _ in range(10000): print('words', file=sys.stderr)\nprint('words', flush=True)", stdout=full)
        assert end(child, 0).count("words\n") == 10_000  # the other stream still works


def test_the_descriptor_of_a_closed_stream_is_not_reused(tmp_path: Path) -> None:
    body = "print('words', flush=True)\nprint('words', file=sys.stderr)\nfile = open('new.txt', 'w')\n"
    body += "file.write(str(file.fileno()))\nos.system('echo words; echo words >&2')"

    def close() -> None:
        for descriptor in (0, 1, 2):
            os.close(descriptor)

    child = start(body, cwd=tmp_path, preexec_fn=close, stdin=None, stdout=None, stderr=None)
    assert child.wait(SLACK) == 0
    assert int((tmp_path / "new.txt").read_text()) > 2


def test_characters_that_the_encoding_lacks_are_escaped() -> None:
    words = [sys.executable, "-m", "pixmim.cli", "pretrain", "--resume", b"/no/M\xfcller/\xc3\xa9"]
    done = subprocess.run(words, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii:strict"})
    assert done.returncode == 1 and done.stderr.startswith(b"error: ") and done.stderr.isascii()
    assert b"fcller" in done.stderr and b"\\xe9" in done.stderr and b"Traceback" not in done.stderr


def test_a_write_waits_for_a_full_non_blocking_pipe() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    stream, received = process._SteadyStream(write, "wb"), bytearray()

    def reader() -> None:
        while part := os.read(read, 50_000):
            received.extend(part)

    thread = threading.Thread(target=reader)
    thread.start()
    remaining = memoryview(bytes(range(256)) * 4096)
    while remaining:
        remaining = remaining[stream.write(remaining) :]
    stream.close()
    thread.join()
    os.close(read)
    assert received == bytes(range(256)) * 4096


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full: LINUX ONLY")
def test_a_run_whose_output_cannot_be_written_completes(tiny_run: Make, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(to_json(tiny_run(steps=2, log_every=1)))
    flags = "pretrain", str(tmp_path / "run.json"), "--out", str(tmp_path / "run")
    assert Started(tmp_path / "output.txt", unheard_command, *flags).end() == ""
    assert (tmp_path / "run" / "encoder/model.safetensors").exists() and (tmp_path / "run" / "report.html").exists()


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Limit the size of files: writes then fail where and how they do on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("trained") / "run"
    model = ArchitectureConfig("mae", "vit_tiny_patch16_224", 16, 1, 2, options=TINY)
    run = PretrainConfig(
        data="shapes:count=8,size=32", steps=1, batch_size=4, size="32", device="cpu", precision="fp32", model=model
    )
    assert pretraining.pretrain(run, out, console=Console(quiet=True), report=False).finished
    return out


FULL = {
    "import": ("import RUN --to OUT/imported", "OUT/imported"),
    "evaluate": (
        "evaluate knn RUN --train shapes:count=20,size=32 --test shapes:count=20,size=32 --device cpu --out OUT/e",
        "OUT/e/evaluations",
    ),
    "stats": ("stats shapes:count=4,size=48", "CACHE/stats"),
    "cache": ("cache shapes:count=40,size=64 OUT/cache --size 64", "OUT/cache/shard-000000.tar"),
    "export": ("export RUN --to timm --out OUT/timm", "OUT/timm"),
    "export, torch": ("export RUN --to mmpretrain --out OUT/mm", "OUT/mm"),
    "embed": ("embed RUN --data shapes:count=40,size=32 --out OUT/features.npy --device cpu", "OUT/features.npy"),
    "reconstruct": ("reconstruct RUN IMAGES --out OUT/r.png", "OUT/r.png"),
    "attention": ("attention RUN IMAGES --out OUT/a.png", "OUT/a.png"),
    "report": ("report RUN --out OUT/report.html", "RUN/reconstructions"),
    "coverage": ("coverage shapes:count=40,size=48 --size 48 --out OUT/coverage", "OUT/coverage/coverage.csv"),
    "slurm": ("slurm demo --out OUT/s --gpus 1", "OUT/s/slurm.sh"),
}
"""Commands, and the paths that they write."""


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_gives_one_line_and_no_partial_file(
    name: str, trained: Path, tmp_path: Path, pictures: Path, memory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    command, path = FULL[name]
    for word, folder in {"OUT": out, "RUN": trained, "IMAGES": pictures, "CACHE": memory}.items():
        command, path = command.replace(word, str(folder)), path.replace(word, str(folder))
    capsys.readouterr()
    with full_disk({"slurm": 100, "stats": 100, "evaluate": 100}.get(name, 3000)):
        status, text = say(capsys, *command.split())
    assert status == 1 and text.count("error: ") == 1 and path in text and "File too large" in text, text
    written = [Path(path), *Path(path).rglob("*"), *out.rglob("*.tmp")]
    assert "Traceback" not in text and not any(file.is_file() for file in written)


def test_a_run_whose_encoder_does_not_fit_on_disk_is_finished_by_the_same_command(
    tiny_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, write = tiny_run(steps=1), save.write_text_atomically

    def full(path: Path, content: str | bytes) -> None:
        with full_disk(5000):
            write(path, content)

    (tmp_path / "run.json").write_text(to_json(run))
    command = "pretrain", tmp_path / "run.json", "--out", tmp_path / "run"
    monkeypatch.setattr(save, "write_text_atomically", full)
    status, text = say(capsys, *command)
    assert status == 1 and f"File too large: '{tmp_path}/run/encoder/model.safetensors'" in text
    assert not (tmp_path / "run" / "encoder/model.safetensors").exists()
    monkeypatch.setattr(save, "write_text_atomically", write)
    status, text = say(capsys, *command)
    assert status == 0 and "the run is complete at step 1" in text


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_out_of_memory_gives_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(args: list[str]) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "test", command)
    status, text = say(capsys, "test")
    assert status == 1 and text.count("error: ") == 1 and "--threads" in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_code_that_holds_the_gil_is_ended_by_the_system(number: int) -> None:
    body = """
from pixmim.utils.process import killable
mutex = ctypes.create_string_buffer(256)
with killable():
    pass
assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL  # restored
with killable():
    ready()
    for _ in range(2):
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)  # a PyDLL call keeps the GIL
"""
    child = start("import signal" + body)
    wait_for(child)
    child.send_signal(number)
    assert end(child, -number) == ""
