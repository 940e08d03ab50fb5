"""Ctrl-C, and the signals by which a cluster takes a machine back, ask the loop to end after its step."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from pixmim.utils.process import deferring, termination_signals

_URGENT = (signal.SIGINT, signal.SIGTERM)
"""Signals of which the second one stops at once. The others only announce that time is short."""

_SAME = 1.0
"""Seconds within which a signal counts once: Ctrl-C reaches a process from the terminal and from what started it."""


class Interrupted(KeyboardInterrupt):
    """Raised out of what the loop waits for."""


class _Count:
    """Return True for a signal that stops at once."""

    def __init__(self) -> None:
        self._first: float | None = None

    def __call__(self, number: int) -> bool:
        if number not in _URGENT:
            return False
        now = time.monotonic()
        if self._first is None:
            self._first = now
        return now - self._first > _SAME


class PreemptionHandler:
    """In a `with` statement: set `requested` on a signal; the second SIGINT or SIGTERM has its effect from before.

    speaks  say at the first signal what happens now
    """

    requested = False

    def __init__(self, speaks: bool = True) -> None:
        self._speaks = speaks
        self._unsaid = threading.Lock()  # taken once, by whoever answers first

    def __enter__(self) -> "PreemptionHandler":
        self._before: dict[int, Any] = {}
        self._waiting = False
        self._stops = _Count()
        self._guard = _Count()  # counts the same signals, in the thread of `process.Guard`
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            deferring.append(self._defers)
            for number in termination_signals():
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()

    @contextmanager
    def waiting(self, alone: bool = True) -> Iterator[None]:
        """Raise Interrupted out of this `with` statement as soon as a signal asks to end.

        alone  False: do nothing, since other processes would wait for this one
        """
        if not alone:
            yield
            return
        self._waiting = True
        try:
            if self.requested:
                raise Interrupted
            yield
        finally:
            self._waiting = False

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._stops(number):
            self._restore()
            signal.raise_signal(number)
            return
        self.requested = True
        self._answer()
        if self._waiting:
            self._waiting = False
            raise Interrupted

    def _answer(self) -> None:
        """Say at the first signal what happens now."""
        if self._speaks and self._unsaid.acquire(blocking=False):
            with suppress(OSError):  # not through a stream: the loop may be writing to it at this moment
                os.write(2, b"\nfinishing this step, then saving; once more to stop now\n")

    def _defers(self, number: int) -> bool:
        self._answer()  # here, since the main thread runs no handler before torch gives it back its hands
        return not self._guard(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        with suppress(ValueError):
            deferring.remove(self._defers)
