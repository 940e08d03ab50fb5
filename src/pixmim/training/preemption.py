"""Stop a run after its step on Ctrl-C, or on a signal by which a cluster reclaims the machine."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from pixmim.utils.process import deferring, termination_signals

_URGENT = (signal.SIGINT, signal.SIGTERM)
"""Signals of which the second one stops at once. The others only announce that time is short."""

_REPEAT_SECONDS = 1.0
"""A repeated signal counts only after this time: Ctrl-C arrives from the terminal and from the parent process."""


class Interrupted(KeyboardInterrupt):
    """Raised within `PreemptionHandler.waiting`."""


class _StopsAtOnce:
    """Return True for the second urgent signal."""

    def __init__(self) -> None:
        self._first: float | None = None

    def __call__(self, number: int) -> bool:
        now = time.monotonic()
        if number in _URGENT and self._first is None:
            self._first = now
        return number in _URGENT and now - (self._first or now) > _REPEAT_SECONDS


class PreemptionHandler:
    """Set `requested` on a signal, within a `with` statement. A second SIGINT or SIGTERM has its previous effect.

    With `verbose`, print on the first signal that the run stops after its step.
    """

    requested = False

    def __init__(self, verbose: bool = True) -> None:
        self._verbose = verbose
        self._unprinted = threading.Lock()  # acquired once, by the thread that prints

    def __enter__(self) -> "PreemptionHandler":
        self._before: dict[int, Any] = {}
        self._waiting = False
        self._stops = _StopsAtOnce()
        self._guard_stops = _StopsAtOnce()  # for the same signals in the thread of `process.Guard`
        if threading.current_thread() is threading.main_thread():  # Python allows handlers in no other thread
            deferring.append(self._defers)
            for number in termination_signals():
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    @contextmanager
    def waiting(self, alone: bool = True) -> Iterator[None]:
        """Raise Interrupted within this `with` statement on a signal, unless another rank would wait for this one."""
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

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._stops(number):
            self._restore()
            signal.raise_signal(number)
            return
        self.requested = True
        self._print()
        if self._waiting:
            self._waiting = False
            raise Interrupted

    def _print(self) -> None:
        if self._verbose and self._unprinted.acquire(blocking=False):
            with suppress(OSError):  # no stream: the training loop may be writing to it at this moment
                os.write(2, b"\nfinishing this step, then saving; once more to stop now\n")

    def _defers(self, number: int) -> bool:
        self._print()  # from this thread, since the main thread runs no handler until torch returns
        return not self._guard_stops(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        with suppress(ValueError):
            deferring.remove(self._defers)
