"""A time limit for decoding: whatever else a file can do to a decoder, it does not hold a thread for ever."""

import ctypes
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from pixmim.data.dataset import BadImage

SECONDS = 30.0
"""A file that takes longer to decode is a BadImage."""

T = TypeVar("T")


class _TooLong(BaseException):
    """Not an Exception, which decoders catch."""


_ends: dict[int, float] = {}  # when the time of each thread that is decoding is over
_interrupting = 0  # the thread that the watcher is about to interrupt
_starting = threading.Lock()
_watcher: threading.Thread | None = None


def limited(work: Callable[[], T]) -> T:
    """Return `work()`, or raise BadImage once it has taken SECONDS.

    A thread in Python code is interrupted at its next instruction, a thread in compiled code when that returns. Never
    nested in itself.
    """
    me = threading.get_ident()
    try:
        try:
            _begin(me)
            return work()
        finally:
            _end(me)
    except _TooLong:
        while True:
            try:
                _end(me)
                break
            except _TooLong:  # a second one, while the first was handled
                continue
        raise BadImage(f"it took longer than {SECONDS:g} s to decode") from None


def _begin(thread: int) -> None:
    global _watcher
    _ends[thread] = time.monotonic() + SECONDS
    if _watcher is None or not _watcher.is_alive():  # after a fork it is gone
        with _starting:
            if _watcher is None or not _watcher.is_alive():
                _watcher = threading.Thread(target=_watch, name="decoding-time-limit", daemon=True)
                _watcher.start()


def _end(thread: int) -> None:
    """Stop the clock. Once this returns, no interruption comes any more.

    Takes no lock, since an interruption could come between taking it and the statement that gives it back.
    """
    _ends.pop(thread, None)
    while _interrupting == thread:
        time.sleep(0.001)
    _ends.pop(thread, None)  # the watcher may have put it off just then
    _interrupt(thread, None)  # calls off what has been sent and has not arrived


def _watch() -> None:
    global _interrupting
    while True:
        time.sleep(min(1.0, SECONDS / 4))
        now = time.monotonic()
        for thread, end in _ends.copy().items():
            if now > end:
                _interrupting = thread
                if _ends.get(thread) == end:  # it has not ended in between; `_end` waits from here on
                    _ends[thread] = now + SECONDS  # again, should something have caught the first one
                    _interrupt(thread, _TooLong)
                _interrupting = 0


def _interrupt(thread: int, error: type[BaseException] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), ctypes.py_object(error) if error is not None else None
    )
