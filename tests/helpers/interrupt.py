"""An exception that stands for an interruption."""

from contextlib import nullcontext
from typing import Any

from pixmim.training.preemption import PreemptionHandler


class Stopped(PreemptionHandler):
    """Ctrl-C after some updates."""

    after = 0

    def __enter__(self) -> "Stopped":
        self.asked_for = 0
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @property
    def requested(self) -> bool:  # type: ignore[override]
        self.asked_for += 1
        return self.asked_for > Stopped.after  # asked once an update

    def waiting(self, alone: bool = True) -> Any:
        return nullcontext()
