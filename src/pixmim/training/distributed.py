"""The processes of a run: which of them this one is, and what they tell each other.

Each computes on its own device. torchrun or Slurm's srun starts them and says in the environment who is who; without
either there is one process, which talks to nobody. This is the only file that makes process groups.
"""

import hashlib
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from pixmim.utils.errors import UserError, first_line

T = TypeVar("T")

_GRACE = 10.0
"""Seconds within which all ranks that wait for the same one give up."""


@dataclass(frozen=True)
class RankInfo:
    """Where a process sits: number `rank` of `size`, and number `local` of those on its machine."""

    rank: int = 0
    size: int = 1
    local: int = 0


def rank_info() -> RankInfo:
    """What the environment says of this process.

    Slurm numbers every process, those that do not belong together as well, so its numbers count only where
    MASTER_ADDR says that they meet.
    """
    known = [("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if "MASTER_ADDR" in os.environ:
        known.append(("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"))
    for names in known:
        if all(name in os.environ for name in names):
            return RankInfo(*(int(os.environ[name]) for name in names))
    return RankInfo()


@dataclass(frozen=True)
class Distributed:
    """The processes of a run, seen from one of them. A World of one does all it is asked for without any other.

    store   where processes leave notes for each other; works while they wait in a collective
    saving  a group apart for what is saved behind the loop's back
    host    a group over which the loops agree, on the host whatever computes
    timeout  seconds that a collective of the last two waits
    """

    rank_info: RankInfo = RankInfo()
    store: Any = None
    saving: Any = None
    host: Any = None
    timeout: float = 0.0
    _asked: list[tuple[Tensor, Any]] = field(default_factory=list)

    @property
    def rank(self) -> int:
        return self.rank_info.rank

    @property
    def size(self) -> int:
        return self.rank_info.size

    @property
    def is_main(self) -> bool:
        """Whether this is the process that speaks and writes for all."""
        return self.rank == 0

    def any_rank_delayed(self, *wishes: bool) -> list[bool]:
        """Give this process's wishes, and hear which any process had at the call before.

        A step late, so that nobody waits for the answer, and all hear the same in the same step. A World of one
        hears its wishes at once.
        """
        if self.size == 1:
            return list(wishes)
        votes = torch.tensor(wishes, dtype=torch.int32)
        work = dist.all_reduce(votes, dist.ReduceOp.MAX, self.host, async_op=True)
        self._asked.append((votes, work))
        if len(self._asked) == 1:
            return [False] * len(wishes)
        before, done = self._asked.pop(0)
        done.wait()
        return before.bool().tolist()

    def meet(self) -> None:
        """Wait on the host until every rank has called this."""
        if self.size > 1:
            dist.barrier(self.host)

    @contextmanager
    def naming_stuck_ranks(self) -> Iterator[None]:
        """Raise UserError, with the ranks that are stuck, for a collective that times out.

        Every rank that waited in vain leaves a note in the store. The ranks without one are stuck.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or "timed out" not in str(error).lower():
                raise
            stuck, deadline = [0], time.monotonic() + min(self.timeout, _GRACE)
            with suppress(RuntimeError):  # rank 0 may keep the store
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
        """The sum over all processes, of tensors of one shape."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: T, group: Any = None) -> list[T]:
        """What each process gives, in their order; on all of them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group)
        return values

    def broadcast(self, value: T) -> T:
        """What the first process gives."""
        return self.gather(value)[0]

    def local_world_size(self) -> int:
        """How many of the processes share this one's machine; all of them must ask."""
        return self.gather(platform.node()).count(platform.node())

    def claim_once(self, text: str) -> bool:
        """Whether no other process has said the same before: what goes wrong for all is said once."""
        if self.size == 1:
            return True
        try:
            return int(self.store.add("said/" + hashlib.sha256(text.encode()).hexdigest(), 1)) == 1
        except RuntimeError:  # the process that kept the notes is gone
            return True


SINGLE_PROCESS = Distributed()


@contextmanager
def init_distributed(device: str, timeout: float) -> Iterator[Distributed]:
    """Meet the other processes of the run, if there are any; once in a process, which ends by `process.leave`.

    device   "auto", "cuda" or "cpu", as the user asked: decides how processes talk, and gives each its own GPU
    timeout  seconds after which a process that waits for the others gives up

    Raises UserError where they cannot meet, and for an error that another process's end has caused.
    """
    here = rank_info()
    if here.size == 1:
        yield SINGLE_PROCESS
        return
    gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if gpu:
        if device not in ("auto", "cuda"):
            raise UserError(
                f"--device {device} is one GPU for {here.size} processes: leave it out, and each gets its own"
            )
        if here.local >= torch.cuda.device_count():
            raise UserError(
                f"process {here.local} of this machine finds {torch.cuda.device_count()} GPUs: start as many"
            )
        torch.cuda.set_device(here.local)
    patience = timedelta(seconds=timeout)
    try:
        store = _init_store(here, patience)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpu else "gloo",
            store=PrefixStore("group", store),
            rank=here.rank,
            world_size=here.size,
            # NCCL ends the process without naming a rank, so the host's groups must give up first.
            timeout=2 * patience if gpu else patience,
        )
    except (RuntimeError, KeyError) as error:
        raise UserError(f"process {here.rank} of {here.size} could not meet the others: {first_line(error)}") from error
    saving, host = (dist.new_group(backend="gloo", timeout=patience) for _ in range(2))
    world = Distributed(here, store, saving, host, timeout)
    try:
        yield world
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise UserError(
                f"another process of the run has ended ({first_line(error)}), and what it printed says why. The same "
                "command goes on from the newest checkpoint"
            ) from error
        raise
    for _, work in world._asked:
        work.wait()
    world.gather(None)  # nobody leaves while another one still has work to do


def _init_store(here: RankInfo, patience: timedelta) -> Any:
    """The store that the processes share; kept by torchrun, or else by the first process."""
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        here.size,
        is_master=here.rank == 0 and not kept,
        timeout=patience,
    )
    # torchrun's store outlives the processes that it starts again; what the last ones left there is not meant for them.
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"pixmim/{again}", store)
