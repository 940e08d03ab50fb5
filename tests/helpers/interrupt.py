"""Simulated interruptions of training."""

from contextlib import nullcontext
from typing import Any

from pixmim.training.preemption import PreemptionHandler


class Stopped(PreemptionHandler):
    """A preemption request after `after` steps."""

    after = 0

    def __enter__(self) -> "Stopped":
        self.checks = 0
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def requested(self) -> bool:  # type: ignore[override]
        self.checks += 1
        return self.checks > Stopped.after  # checked once per step

    def waiting(self, alone: bool = True) -> Any:
        return nullcontext()
