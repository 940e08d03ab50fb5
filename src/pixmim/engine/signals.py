"""Ctrl-C and SIGTERM ask the loop to end after its step; a second Ctrl-C ends at once."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """In a `with` statement: turns the first SIGINT or SIGTERM into `asked`, and gives the second its usual effect."""

    asked = False

    def __enter__(self) -> "Interrupts":
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
