"""Process groups: the ranks of a run, and their communication.

torchrun or Slurm's srun starts one process per device, and describes it in environment variables. Without either there
is a single process, which communicates with no other. No other module creates process groups.
"""

import hashlib
import os
import platform
import shlex
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from pixmim.utils.errors import UserError, first_line

T = TypeVar("T")

_GRACE = 10.0
"""Seconds within which all ranks that wait for the same rank time out."""


@dataclass(frozen=True)
class Distributed:
    """The ranks of a run. With a single process, every method returns at once."""

    rank: int = 0
    size: int = 1
    local: int = 0  # number of this process among those of its machine
    store: Any = None  # of keys and values. It also works while ranks wait in a collective
    saving: Any = None  # process group for checkpoints, which are written in a thread
    host: Any = None  # process group on the host, on which the training loop synchronizes
    timeout: float = 0.0  # of a collective of these two groups, in seconds
    _pending: list[tuple[Tensor, Any]] = field(default_factory=list)

    @property
    def is_main(self) -> bool:
        """True on rank 0, which prints and writes for all."""
        return self.rank == 0

    def any_rank_delayed(self, *flags: bool) -> list[bool]:
        """All-reduce boolean flags asynchronously, and return the result of the previous call.

        Ranks do not wait for each other, and all get the same result in the same step. A single process gets its own
        flags at once.
        """
        if self.size == 1:
            return list(flags)
        values = torch.tensor(flags, dtype=torch.int32)
        work = dist.all_reduce(values, dist.ReduceOp.MAX, self.host, async_op=True)
        self._pending.append((values, work))
        if len(self._pending) == 1:
            return [False] * len(flags)
        previous, work = self._pending.pop(0)
        work.wait()
        return previous.bool().tolist()

    def barrier(self) -> None:
        """Wait on the host until every rank has called this."""
        if self.size > 1:
            dist.barrier(self.host)

    @contextmanager
    def naming_stuck_ranks(self) -> Iterator[None]:
        """Turn the timeout of a collective into a UserError that names the stuck ranks.

        Every rank that timed out sets a key in the store. The ranks without one are stuck.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or "timed out" not in str(error).lower():
                raise
            stuck, deadline = [0], time.monotonic() + min(self.timeout, _GRACE)
            with suppress(RuntimeError):  # rank 0 may host the store
                self.store.set(f"waited/{self.rank}", "")
                while True:
                    stuck = [rank for rank in range(self.size) if not self.store.check([f"waited/{rank}"])]
                    if len(stuck) <= 1 or time.monotonic() > deadline:
                        break
                    time.sleep(0.05)
            raise UserError(
                f"stuck ranks: {', '.join(map(str, stuck)) or 'all'} (the others waited for {self.timeout:g} s, see "
                "--parallel.timeout). The same command resumes the run from the newest checkpoint"
            ) from error

    def total(self, values: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place. Collective."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: T, group: Any = None) -> list[T]:
        """Return the values of all ranks, in order, on every rank. Collective."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group)
        return values

    def broadcast(self, value: T) -> T:
        """Return the value of rank 0. Collective."""
        return self.gather(value)[0]

    def local_world_size(self) -> int:
        """Return the number of ranks on this machine. Collective."""
        return self.gather(platform.node()).count(platform.node())

    def claim_once(self, text: str) -> bool:
        """Return True on the first rank to report this message, so that a shared failure is printed once."""
        if self.size == 1:
            return True
        try:
            return int(self.store.add("reported/" + hashlib.sha256(text.encode()).hexdigest(), 1)) == 1
        except RuntimeError:  # the process that hosts the store has ended
            return True


SINGLE_PROCESS = Distributed()


def find_rank() -> Distributed:
    """Return this process's position, from the environment variables of torchrun or Slurm, without process groups.

    Slurm's count only together with MASTER_ADDR, since it also numbers independent processes. Raises UserError if the
    variables describe one of several processes, but not completely.
    """
    known = [("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if "MASTER_ADDR" in os.environ:
        known.append(("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
    for names in known:
        if all(os.environ.get(name, "").isdecimal() for name in names):
            rank, size, local = (int(os.environ[name]) for name in names)
            return Distributed(rank, size, local)
    if os.environ.get("RANK") and os.environ.get("WORLD_SIZE", "1") != "1":
        given = " ".join(f"{name}={shlex.quote(os.environ.get(name, ''))}" for name in known[0])
        raise UserError(
            f"{given} do not describe a process: start the processes with torchrun, or set LOCAL_RANK too, to 0 if "
            "each machine has one"
        )
    return SINGLE_PROCESS


def _agree_on_name(store: Any, info: Distributed, timeout: float) -> str:
    """Return a new name on which all ranks of this start agree. Raises RuntimeError if a rank does not come.

    torchrun's store survives its processes, so each start needs keys of its own. torchrun counts restarts, but the
    counts of two machines differ once one of them has noticed a failure as a change of the other. So rank 0 answers
    every request, which may be that of a process that has ended, until all ranks have read the answer.
    """
    own = uuid.uuid4().hex
    if not info.is_main:
        store.set(f"request/{info.rank}", own)
        name = store.get(f"name/{own}").decode()
        store.add(f"{name}/read", 1)
        return name
    answered, deadline = set[str](), time.monotonic() + timeout
    while store.add(f"{own}/read", 0) < info.size - 1:
        if time.monotonic() > deadline:
            raise RuntimeError(f"waited {timeout:g} s for the other ranks")
        for key in (f"request/{rank}" for rank in range(1, info.size)):
            if store.check([key]) and (request := store.get(key).decode()) not in answered:
                store.set(f"name/{request}", own)
                answered.add(request)
        time.sleep(0.02)
    return own


@contextmanager
def init_distributed(device: str, timeout: float) -> Iterator[Distributed]:
    """Initialize the process group of a run, if there are several processes.

    With --device "auto" or "cuda", each rank gets a GPU of its own. A rank that waits for others gives up after
    `timeout` seconds.

    Raises:
        UserError: If the process group cannot be initialized, or another rank ends.
    """
    info = find_rank()
    if info.size == 1:
        yield info
        return
    gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if gpu:
        if device not in ("auto", "cuda"):
            raise UserError(f"--device {device} is one GPU for {info.size} processes: leave it out, so each gets one")
        if info.local >= torch.cuda.device_count():
            raise UserError(
                f"process {info.local} on this machine has no GPU: start at most {torch.cuda.device_count()} processes"
            )
        torch.cuda.set_device(info.local)
    limit = timedelta(seconds=timeout)
    try:
        store: Any = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            info.size,
            is_master=info.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            timeout=limit,
        )
        store = PrefixStore(f"pixmim/{_agree_on_name(store, info, timeout)}", store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=PrefixStore("group", store),
            rank=info.rank,
            world_size=info.size,
            # NCCL ends the process without naming a rank, so the groups on the host must time out first.
            timeout=2 * limit if gpu else limit,
        )
    except (RuntimeError, KeyError, ValueError) as error:
        raise UserError(
            f"rank {info.rank} of {info.size} failed to initialize the process group: {first_line(error)}"
        ) from error
    saving, host = (dist.new_group(backend="gloo", timeout=limit) for _ in range(2))
    world = replace(info, store=store, saving=saving, host=host, timeout=timeout, _pending=[])
    try:
        yield world
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise UserError(
                f"another rank has ended ({first_line(error)}): see its output for the reason. The same command "
                "resumes from the newest checkpoint"
            ) from error
        raise
    for _, work in world._pending:
        work.wait()
    world.gather(None)  # no rank leaves while another one still works
