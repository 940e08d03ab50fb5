"""Ends a run in which one process keeps the others waiting, and says which one and where it stands."""

import os
import sys
import threading
import time
from types import TracebackType
from typing import NoReturn

from pixmim.training.distributed import World

_ORDER = ("waiting for data", "computing", "saving")
"""What a process does in a step, in this order; of anything else (measuring) nobody can say how long it takes."""


class Watchdog:
    """In a `with` statement, around a loop that says `at` each step where it is. A World of one is not watched.

    patience  seconds without a step, after which somebody is to blame: that is printed, and the process ends at once,
              since the loop's own thread may never wake up again
    """

    def __init__(self, world: World, patience: float) -> None:
        self._world, self._patience = world, patience
        self._place, self._since = (0, "measuring"), time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="pixmim-watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._world.size > 1:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def at(self, step: int, doing: str) -> None:
        """This process begins to do something for the update after `step`."""
        self._place, self._since = (step, doing), time.monotonic()

    def _watch(self) -> None:
        ticks = 0
        while not self._closed.wait(self._patience / 4):
            ticks += 1
            (step, doing), waited = self._place, time.monotonic() - self._since
            try:
                self._world.store.set(f"at/{self._world.rank}", f"{step}|{doing}|{ticks}")
                if waited > self._patience:
                    verdict = self._verdict(ticks, waited)
                    if verdict:
                        self._quit(verdict)
            except RuntimeError:  # the store is gone, and with it another process: the loop will say so
                return

    def _verdict(self, ticks: int, waited: float) -> str:
        """Who is behind all others, or does not even answer; empty if somebody does what may take any time."""
        store, keys = self._world.store, [f"at/{rank}" for rank in range(self._world.size)]
        notes = [store.get(key).decode().split("|") if store.check([key]) else ["0", _ORDER[0], "0"] for key in keys]
        silent = [rank for rank, (_, _, heard) in enumerate(notes) if int(heard) < ticks - 2]
        if any(doing not in _ORDER for rank, (_, doing, _) in enumerate(notes) if rank not in silent):
            return ""
        places = [(int(step), _ORDER.index(doing) if doing in _ORDER else 0) for step, doing, _ in notes]
        behind = silent or [rank for rank, place in enumerate(places) if place == min(places)]
        step, doing, _ = notes[behind[0]]
        if len(behind) == self._world.size:
            return f"no process has finished update {int(step) + 1:,} for {waited:.0f} s ({doing})"
        who = "process " + ", ".join(map(str, behind))
        state = "does not answer" if silent else f"is still {doing}"
        return f"{who} {state} at update {int(step) + 1:,}, and the others have waited for {waited:.0f} s"

    def _quit(self, verdict: str) -> NoReturn:
        if self._world.first_to_say("a process hangs"):
            print(
                f"error: {verdict}. The run ends here; the same command goes on from the newest checkpoint "
                "(--scale.timeout sets how long processes wait)",
                file=sys.stderr,
                flush=True,
            )
        os._exit(1)  # and not `leave`: the loop's thread may hang in a print, and hold what that would flush
