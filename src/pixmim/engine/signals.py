"""Ctrl-C, and the signals by which a cluster takes a machine back, ask the loop to end after its step."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]


class Interrupts:
    """In a `with` statement: turns SIGINT, SIGTERM and SIGUSR1 into `asked`; a second Ctrl-C has its usual effect.

    One press of Ctrl-C reaches a process from the terminal and from what started it, so a second one counts as such
    only a second later.
    """

    asked = False

    def __enter__(self) -> "Interrupts":
        self._before: dict[int, Any] = {}
        self._at = 0.0
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if not self.asked:
            self.asked, self._at = True, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._at > 1:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
