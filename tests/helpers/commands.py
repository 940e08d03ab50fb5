"""Run pixmim in processes forked from one that has imported it, so that a start takes milliseconds."""

import gc
import multiprocessing
import os
import resource
import runpy
import socket
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pixmim import cli, run_folder
from pixmim.data.loader import Batch, BatchLoader
from pixmim.data.synthetic import SyntheticShapes
from pixmim.training.checkpoint import CheckpointManager
from pixmim.utils.process import exit_now

_fork = multiprocessing.get_context("forkserver")
_fork.set_forkserver_preload(
    ["pixmim.pretraining", "pixmim.evaluation.evaluate", "pixmim.report", "pixmim.cli.pretrain"]
)


class Started:
    """A function running in one process, or in several as ranks of one group.

    Args:
        output: File for what they print.
        target: The function, at the top level of a module.
        args: Its arguments.
        ranks: Number of processes.
        limit: Maximum size of a file in bytes; 0 is unlimited.
        variables: More environment variables.
    """

    def __init__(
        self,
        output: Path,
        target: Callable[..., object],
        *args: object,
        ranks: int = 1,
        limit: int = 0,
        variables: Mapping[str, str] = MappingProxyType({}),
    ):
        self.output = output
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()  # a process may be killed before it opens the file
        environment = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "XDG_CACHE_HOME") if name in os.environ}
        environment |= variables
        if ranks > 1:
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(ranks)}
        self.processes = []
        for rank in range(ranks):
            own = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
            process = _fork.Process(target=_run, args=(str(output), own, limit, target, args), daemon=True)
            process.start()
            self.processes.append(process)

    @property
    def pids(self) -> list[int]:
        """Process numbers by rank."""
        return [process.pid or 0 for process in self.processes]

    @property
    def text(self) -> str:
        """The output up to now."""
        return self.output.read_text()

    @property
    def running(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition, which must become true while all processes run."""
        deadline = time.monotonic() + 120
        while not condition():
            assert self.running or condition(), self.text
            assert time.monotonic() < deadline, self.text
            time.sleep(0.002)

    def end(self, status: int | None = 0) -> str:
        """Wait until all have ended with this status (None is any but 0), and return the output."""
        wait([process.sentinel for process in self.processes], timeout=120)
        for process in self.processes:
            process.join(timeout=120)
            assert process.exitcode is not None, self.text
            assert (process.exitcode != 0) if status is None else (process.exitcode == status), self.text
        return self.text


class Pretraining(Started):
    """`pixmim pretrain` with these flags, which include the folder `out`."""

    def __init__(self, out: Path, *flags: object, ranks: int = 1, limit: int = 0):
        self.out, self.checkpoints = out, CheckpointManager(out / "checkpoints")
        output = out.with_name(f"{out.name}-{time.monotonic_ns()}.txt")
        super().__init__(output, command_without_report, "pretrain", *map(str, flags), ranks=ranks, limit=limit)

    def reach(self, step: int) -> None:
        """Wait for a checkpoint of `step` or later."""
        self.until(lambda: any(saved >= step for saved in self.checkpoints.steps()))

    def log(self) -> None:
        """Wait for a line of metrics."""
        metrics = self.out / "metrics.jsonl"
        self.until(lambda: metrics.exists() and metrics.stat().st_size > 0)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def _run(
    output: str, environment: dict[str, str], limit: int, target: Callable[..., object], args: tuple[object, ...]
) -> None:
    import torch

    gc.freeze()  # what the server has imported
    torch.set_num_threads(1)
    os.environ.update(environment)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    target(*args)


def command(*args: str) -> None:
    """Run a command as the shell does."""
    sys.argv = ["pixmim", *args]
    sys.exit(cli.main())


def script(path: str, *args: str) -> None:
    """Run a script as Python does."""
    sys.path.insert(0, str(Path(path).parent))
    sys.argv = [path, *args]
    runpy.run_path(path, run_name="__main__")


def command_without_report(*args: str) -> None:
    """Run a command that skips the report at its end."""
    run_folder.write_report = lambda folders, page, *_: page
    command(*args)


def command_in(folder: str, *args: str) -> None:
    """Run a command in a folder, without the report at its end."""
    os.chdir(folder)
    command_without_report(*args)


def unheard_command(*args: str) -> None:
    """Run a command whose stdout is a closed pipe and whose stderr is a full disk."""
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
    command(*args)


def stuck_command(folder: str, images: int, *args: str) -> None:
    """Run a command in `folder` whose data block after a number of images; create `folder`/stuck then."""
    os.chdir(folder)
    os.mkfifo("fifo")
    read_array, remaining = SyntheticShapes.read_array, iter(range(images))

    def read(self: SyntheticShapes, index: int) -> object:
        if next(remaining, None) is None:
            os.open("stuck", os.O_CREAT)
            Path("fifo").read_bytes()
        return read_array(self, index)

    SyntheticShapes.read_array = read  # type: ignore[method-assign,assignment]
    command(*args)


def launch(out: str, processes: int, restarts: int, *args: str) -> None:
    """Train in processes of torch's elastic agent, as torchrun does, which restarts all of them if one is lost.

    The number of a process is in OUT-PROCESSES-START-RANK.pid, where START counts the restarts, and the images of each
    batch that it reads in a line of OUT-PROCESSES-START-RANK.read.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    multiprocessing.process.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # has children
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=out,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=restarts,
        monitor_interval=0.1,
        start_method="fork",
    )
    elastic_launch(config, _rank)(out, *args)


def _rank(out: str, *args: str) -> None:
    names = ("WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT", "RANK")
    stem = "-".join([out, *(os.environ[name] for name in names)])
    Path(f"{stem}.pid").write_text(str(os.getpid()))
    read = BatchLoader.__next__

    def recorded(loader: BatchLoader[Any, Batch]) -> Batch:
        batch = read(loader)
        with Path(f"{stem}.read").open("a") as file:
            print(*batch.indices.tolist(), file=file)
        return batch

    BatchLoader.__next__ = recorded  # type: ignore[method-assign,assignment]
    run_folder.write_report = lambda folders, page, *_: page
    if status := cli.main(["pretrain", *args]):
        exit_now(status)
