"""Signals, standard streams and full disks: a command ends when it is told to, and only then."""

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

from helpers.tiny import TINY
from pixmim import cli, pretraining
from pixmim.config import ArchitectureConfig, CheckpointConfig, PretrainConfig
from pixmim.config_io import to_json
from pixmim.training.checkpoint import CheckpointManager
from pixmim.training.metric_logger import read_metrics
from pixmim.training.preemption import Interrupted, PreemptionHandler
from pixmim.utils import process
from pixmim.utils.threads import thread_pool
from pixmim.weights import save as own

Make = Callable[..., PretrainConfig]

SLACK = 15.0
"""Seconds that a busy machine may take for what should take `process.LIMIT`."""

BEGIN = """
import ctypes, os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pixmim import cli
from pixmim.utils import files as disk
from pixmim.training.preemption import PreemptionHandler

def ready(word="ready"):
    os.write(1, word.encode() + b"\\n")

def forever():
    while True:
        pass

def deaf():  # a C function that no signal interrupts
    mutex = ctypes.create_string_buffer(256)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)

def command(args):
    BODY
    return 0

cli.COMMANDS["test"] = command
sys.argv = ["pixmim", "test"]
sys.exit(cli.main())
"""


def start(body: str, **options: object) -> "subprocess.Popen[str]":
    """Start a process whose command is `body`."""
    code = BEGIN.replace("BODY", body.strip().replace("\n", "\n    "))
    given: dict[str, object] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    given |= {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)} | options  # nohup ignores it
    return subprocess.Popen([sys.executable, "-c", code], text=True, **given)  # type: ignore[call-overload]


def heard(started: "subprocess.Popen[str]", word: str = "ready") -> None:
    assert started.stdout is not None
    line = started.stdout.readline()
    assert line == word + "\n", line + started.communicate()[1]


def ended(started: "subprocess.Popen[str]", status: int, limit: float = SLACK) -> str:
    """What a process wrote to stderr, once it has ended in time with this status."""
    try:
        _, text = started.communicate(timeout=limit)
    finally:
        started.kill()
    assert started.returncode == status, text
    assert "Traceback" not in text and "Exception" not in text
    return text


STUCK = {
    "a loop": ("ready()\nforever()", signal.SIGINT),
    "a loop that catches everything": (
        "ready()\nwhile True:\n    try: time.sleep(100)\n    except BaseException: pass",
        signal.SIGTERM,
    ),
    "a pause": ("ready()\ntime.sleep(100)", signal.SIGHUP),
    "a lock": ("lock = threading.Lock()\nready()\nwhile True: lock.acquire()", signal.SIGTERM),
    "a C function": ("ready()\ndeaf()", signal.SIGINT),
    "standard input": ("ready()\nsys.stdin.read()", signal.SIGTERM),
    "a thread that is joined": (
        "with ThreadPoolExecutor(1) as pool:\n    pool.submit(forever)\n    ready()",
        signal.SIGINT,
    ),
    "two of them": (
        "with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as two:\n"
        "    one.submit(deaf)\n    two.submit(forever)\n    ready()\n    one.submit(deaf).result()",
        signal.SIGHUP,
    ),
    "a FIFO": (
        "os.mkfifo(sys.argv[0] + str(os.getpid()))\nready()\nopen(sys.argv[0] + str(os.getpid()))",
        signal.SIGINT,
    ),
}


def test_a_signal_ends_a_command_whatever_it_is_doing(tmp_path: Path) -> None:
    assert process.LIMIT == 2.0
    started = {name: start(body, cwd=tmp_path) for name, (body, _) in STUCK.items()}
    for one in started.values():
        heard(one)
    for name, one in started.items():
        one.send_signal(STUCK[name][1])
    for name, one in started.items():
        assert ended(one, 128 + STUCK[name][1]).count("\n") <= 1, name


def test_a_stuck_thread_does_not_hold_up_the_end() -> None:
    assert ended(start("ThreadPoolExecutor(1).submit(deaf)"), 0) == ""


def test_a_signal_that_arrives_twice_counts_once_and_temporary_files_are_removed(tmp_path: Path) -> None:
    body = "def write(file):\n    ready()\n    time.sleep(100)\ndisk.atomic_write(Path('new.txt'), write)"
    one = start(body, cwd=tmp_path)
    heard(one)
    one.send_signal(signal.SIGINT)
    one.send_signal(signal.SIGTERM)
    ended(one, 130)
    assert not list(tmp_path.iterdir())


def test_the_signal_of_a_time_limit_gives_the_status_that_starts_a_job_again() -> None:
    one = start("ready()\ntime.sleep(100)")
    heard(one)
    one.send_signal(signal.SIGUSR1)
    ended(one, 130)


def test_nohup_is_respected() -> None:
    one = start("ready()\nsys.stdin.readline()", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    heard(one)
    one.send_signal(signal.SIGHUP)
    assert one.stdin is not None
    one.stdin.write("\n")
    ended(one, 0)


def test_training_may_end_its_step_and_the_second_signal_ends_it() -> None:
    body = (
        "with PreemptionHandler() as handler:\n    ready()\n    while not handler.requested: pass\n    ready('asked')\n"
        "    deaf()"
    )
    one = start(body)
    heard(one)
    one.send_signal(signal.SIGINT)
    one.send_signal(signal.SIGTERM)  # the same press, from a parent
    heard(one, "asked")
    time.sleep(process.LIMIT + 0.5)
    assert one.poll() is None
    one.send_signal(signal.SIGINT)
    text = ended(one, 130)
    assert text.count("once more to stop now") == 1


def test_a_signal_is_answered_while_a_step_computes() -> None:
    """At once, though the main thread runs no handler before its call into C returns."""
    one = start("with PreemptionHandler():\n    ready()\n    deaf()")
    heard(one)
    one.send_signal(signal.SIGINT)
    assert one.stderr is not None and one.stderr.readline() == "\n"
    assert "once more to stop now" in one.stderr.readline() and one.poll() is None
    time.sleep(1.2)  # what comes sooner is the same press
    one.send_signal(signal.SIGINT)
    ended(one, 130)


def test_signals_are_as_before_once_a_command_is_over() -> None:
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]
    before, hook = [signal.getsignal(number) for number in numbers], sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), process.Guard() as guard:
        signal.raise_signal(signal.SIGTERM)
    assert guard.number == signal.SIGTERM and not guard.thread.is_alive()
    assert [signal.getsignal(number) for number in numbers] == before and sys.unraisablehook is hook
    assert signal.set_wakeup_fd(-1) == -1
    with PreemptionHandler(verbose=False) as interrupts:
        signal.raise_signal(signal.SIGTERM)
    assert interrupts.requested and [signal.getsignal(number) for number in numbers] == before
    assert not process.deferring


def test_a_pool_that_is_closed_early_leaves_a_stuck_thread_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pixmim.utils.threads.PATIENCE", 0.1)
    stuck, done = threading.Event(), []
    with pytest.raises(KeyboardInterrupt), thread_pool(1, "pixmim-stuck") as pool:
        pool.submit(stuck.wait)
        waiting = pool.submit(done.append, 1)
        raise KeyboardInterrupt
    assert waiting.cancelled()
    stuck.set()
    with thread_pool(2, "pixmim-quick") as pool:  # one that is not finishes what it was given
        for i in range(10):
            pool.submit(done.append, i)
    assert sorted(done) == list(range(10))


def test_several_processes_are_not_parted_by_a_signal() -> None:
    with PreemptionHandler(verbose=False) as interrupts:
        with interrupts.waiting(alone=False):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted), interrupts.waiting():
            raise AssertionError("a signal was there before")


@pytest.mark.parametrize("at", [0, 2, 6])
def test_a_measurement_that_is_interrupted_is_made_when_the_run_is_resumed(
    at: int, tiny_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(log_every=1)
    run = type(run)(**{**vars(run), "knn": type(run.knn)(every=0.2)})  # an update, rounded up
    calls: list[int] = []

    def watch(_: nn.Module) -> dict[str, float]:
        calls.append(1)
        if len(calls) == at + 1:
            signal.raise_signal(signal.SIGINT)
        return {"knn/top1": float(len(calls))}

    monkeypatch.setattr(pretraining, "online_knn", lambda config, console: watch)
    outcome = pretraining.pretrain(run, tmp_path, console=Console(quiet=True), report=False)
    assert (outcome.step, outcome.finished) == (at, False)
    assert pretraining.pretrain(run, tmp_path, console=Console(quiet=True), report=False).finished
    noted = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if "knn/top1" in line]
    assert noted == list(range(7)) and (tmp_path / "encoder/model.safetensors").exists()


STUCK_DATA = """
import os, sys
from pixmim import cli
from pixmim.data.synthetic import SyntheticShapes
os.mkfifo("fifo")
read, left = SyntheticShapes.array, iter(range(int(sys.argv.pop(1))))
def read_array(self, index):
    if next(left, None) is None:
        os.open("stuck", os.O_CREAT)
        open("fifo").read()
    return read(self, index)
SyntheticShapes.array = array
sys.exit(cli.main())
"""


def stuck_data(folder: Path, images: int, *args: object) -> "subprocess.Popen[str]":
    """Start a command in `folder` whose data stop after so many images, and wait until they do."""
    one = subprocess.Popen(
        [sys.executable, "-c", STUCK_DATA, str(images), *map(str, args)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (folder / "stuck").exists():
        assert one.poll() is None and time.monotonic() < deadline, one.communicate()
        time.sleep(0.02)
    return one


def test_a_run_whose_data_never_come_saves_and_ends_at_the_first_signal(tiny_run: Make, tmp_path: Path) -> None:
    run = tiny_run(log_every=1, steps=6, checkpoint=CheckpointConfig(every=0), threads=2)
    (tmp_path / "run.json").write_text(to_json(run))
    one = stuck_data(tmp_path, 30, "pretrain", "run.json", "--out", tmp_path / "run")
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") == 3) and time.monotonic() < deadline:
        time.sleep(0.02)  # until those updates are done whose images are there
    one.send_signal(signal.SIGINT)
    out, err = one.communicate(timeout=SLACK)
    assert one.returncode == 130, err
    (step,) = CheckpointManager(tmp_path / "run" / "checkpoints").steps()
    assert step == 3
    assert f"stopped after step {step}; resume with: pixmim pretrain --resume" in out and "Traceback" not in err
    for folder in ("run", "quiet"):
        assert pretraining.pretrain(run, tmp_path / folder, console=Console(quiet=True), report=False).finished
    one_end, other = (load_file(tmp_path / folder / "encoder/model.safetensors") for folder in ("run", "quiet"))
    assert all(torch.equal(one_end[name], other[name]) for name in other)


def test_a_command_whose_data_never_come_ends(tmp_path: Path) -> None:
    one = stuck_data(tmp_path, 5, "cache", "shapes:count=40,size=32", "cache", "--size", "32", "--threads", "2")
    one.send_signal(signal.SIGTERM)
    ended(one, 143)


def test_a_listing_that_nobody_reads_ends_quietly(tmp_path: Path) -> None:
    for words in (["list"], ["evaluate", "list"], ["pretrain", "--help"]):
        one = subprocess.Popen(
            [sys.executable, "-m", "pixmim.cli", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert one.stdout is not None and one.stderr is not None
        one.stdout.close()
        assert (one.stderr.read(), one.wait()) == (b"", 0)
        one.stderr.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full: LINUX ONLY")
def test_output_that_cannot_be_written_is_dropped() -> None:
    with open("/dev/full", "wb") as full:
        one = start("for _ in range(10000): print('words', file=sys.stderr)\nprint('words', flush=True)", stdout=full)
        assert ended(one, 0).count("words\n") == 10_000  # one stream does not take the other along


def test_a_closed_stream_is_not_given_to_the_next_file(tmp_path: Path) -> None:
    body = "print('words', flush=True)\nprint('words', file=sys.stderr)\nfile = open('new.txt', 'w')\n"
    body += "file.write(str(file.fileno()))\nos.system('echo words; echo words >&2')"

    def close() -> None:
        for descriptor in (0, 1, 2):
            os.close(descriptor)

    one = start(body, cwd=tmp_path, preexec_fn=close, stdin=None, stdout=None, stderr=None)
    assert one.wait(SLACK) == 0
    assert int((tmp_path / "new.txt").read_text()) > 2


def test_names_that_a_terminal_cannot_show_are_escaped() -> None:
    words = [sys.executable, "-m", "pixmim.cli", "pretrain", "--resume", b"/no/M\xfcller/\xc3\xa9"]
    done = subprocess.run(words, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii:strict"})
    assert done.returncode == 1 and done.stderr.startswith(b"error: ") and done.stderr.isascii()
    assert b"fcller" in done.stderr and b"\\xe9" in done.stderr and b"Traceback" not in done.stderr


def test_a_full_pipe_that_does_not_block_is_waited_for() -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    stream, got = process._Steady(write, "wb"), bytearray()

    def reader() -> None:
        while part := os.read(read, 50_000):
            got.extend(part)

    thread = threading.Thread(target=reader)
    thread.start()
    left = memoryview(bytes(range(256)) * 4096)
    while left:
        left = left[stream.write(left) :]
    stream.close()
    thread.join()
    os.close(read)
    assert got == bytes(range(256)) * 4096


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full: LINUX ONLY")
def test_a_run_that_nobody_listens_to_goes_on_to_its_end(tiny_run: Make, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(to_json(tiny_run(steps=2, log_every=1)))
    words = [sys.executable, "-m", "pixmim.cli", "pretrain", tmp_path / "run.json", "--out", tmp_path / "run"]
    read, write = os.pipe()
    os.close(read)
    with open("/dev/zero", "rb") as zero, open("/dev/full", "wb") as full:
        done = subprocess.run(words, stdin=zero, stdout=write, stderr=full, timeout=180)
    os.close(write)
    assert done.returncode == 0
    assert (tmp_path / "run" / "encoder/model.safetensors").exists() and (tmp_path / "run" / "report.html").exists()


def say(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    status = cli.main([str(arg) for arg in args])
    seen = capsys.readouterr()
    return status, seen.out + seen.err


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """A limit on the size of files, which stands for a full disk: writing fails in the same place, in the same way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
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
    "stats": ("stats shapes:count=4,size=48", "MEMORY/stats"),
    "cache": ("cache shapes:count=40,size=64 OUT/cache --size 64", "OUT/cache/shard-000000.tar"),
    "export": ("export RUN --to timm --out OUT/timm", "OUT/timm"),
    "export, torch": ("export RUN --to mmpretrain --out OUT/mm", "OUT/mm"),
    "embed": ("embed RUN --data shapes:count=40,size=32 --out OUT/features.npy --device cpu", "OUT/features.npy"),
    "reconstruct": ("reconstruct RUN PICTURES --out OUT/r.png", "OUT/r.png"),
    "attention": ("attention RUN PICTURES --out OUT/a.png", "OUT/a.png"),
    "report": ("report RUN --out OUT/report.html", "RUN/reconstructions"),
    "coverage": ("coverage shapes:count=40,size=48 --size 48 --out OUT/coverage", "OUT/coverage/coverage.csv"),
    "slurm": ("slurm demo --out OUT/s --gpus 1", "OUT/s/slurm.sh"),
}
"""Commands, and what they would have written."""


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_gives_one_line_and_no_half_file(
    name: str, trained: Path, tmp_path: Path, pictures: Path, memory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    places = {"OUT": out, "RUN": trained, "PICTURES": pictures, "MEMORY": memory}
    command, named = FULL[name]
    for word, place in places.items():
        command, named = command.replace(word, str(place)), named.replace(word, str(place))
    capsys.readouterr()
    with full_disk({"slurm": 100, "stats": 100, "evaluate": 100}.get(name, 3000)):
        status, text = say(capsys, *command.split())
    assert status == 1 and text.count("error: ") == 1 and named in text and "File too large" in text, text
    written = [path for path in [Path(named), *Path(named).rglob("*"), *out.rglob("*.tmp")] if path.is_file()]
    assert "Traceback" not in text and not written


def test_a_run_whose_last_file_does_not_fit_is_ended_by_the_same_command(
    tiny_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, write = tiny_run(), own.write_text_atomically

    def full(path: Path, content: str | bytes) -> None:
        with full_disk(5000):
            write(path, content)

    (tmp_path / "run.json").write_text(to_json(run))
    command = "pretrain", tmp_path / "run.json", "--out", tmp_path / "run"
    monkeypatch.setattr(own, "write_text_atomically", full)
    status, text = say(capsys, *command)
    assert status == 1 and f"File too large: '{tmp_path}/run/encoder/model.safetensors'" in text
    assert not (tmp_path / "run" / "encoder/model.safetensors").exists()
    monkeypatch.setattr(own, "write_text_atomically", write)
    status, text = say(capsys, *command)
    assert status == 0 and "the run is complete at step 6" in text


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_memory_that_is_not_enough_gives_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(args: list[str]) -> int:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "test", command)
    status, text = say(capsys, "test")
    assert status == 1 and text.count("\n") == 1 and "--threads" in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_holds_pythons_lock_is_ended_by_the_system(number: int) -> None:
    body = """
from pixmim.utils.process import killable
mutex = ctypes.create_string_buffer(256)
with killable():
    pass
assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL  # as it was
with killable():
    ready()
    for _ in range(2):
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)  # a PyDLL keeps Python's lock: no other thread runs
"""
    one = start("import signal" + body)
    heard(one)
    one.send_signal(number)
    assert ended(one, -number) == ""
