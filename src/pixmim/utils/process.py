"""The process of a command: a signal ends it within two seconds, and output that nobody reads does not end it.

Only the command line installs this, through `as_process`. Importing pixmim changes nothing.
"""

import atexit
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn

LIMIT = 2.0
"""Seconds within which a signal ends a command, whatever the command is doing."""

_MARGIN = 0.3  # of them, kept for a busy machine

_WAKE: int = getattr(signal, "SIGURG", 0)  # interrupts a thread's system call, and is ignored by default

deferring: list[Callable[[int], bool]] = []
"""Functions that return True for a signal after which the process ends by itself, in its own time."""


def as_process(command: Callable[[], int]) -> int:
    """Run a command as a process of its own. Return its exit status, or end the process with it.

    After a signal, or with threads that still run, the interpreter does not end by itself: it would wait for a thread
    that is stuck.
    """
    steady_streams()
    with Guard() as guard:
        status, several = 0, "MASTER_ADDR" in os.environ
        try:
            status = command()
        except BaseException:
            if not guard.number:
                raise
        if guard.number:
            leave(exit_status(guard.number))
        if several or set(threading.enumerate()) - {threading.main_thread(), guard.thread}:
            leave(status)
    return status


def leave(status: int) -> NoReturn:
    """End this process without taking the interpreter down piece by piece.

    Threads of a process group that meet an interpreter half gone may abort, and torchrun then takes a run that is
    complete for one that failed. So the group is not taken down either.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # None, or closed
            stream.flush()
    os._exit(status)


def heeded() -> list[int]:
    """Return the signals that end a command. Under nohup, SIGHUP does not."""
    known = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")]
    numbers = [number for number in known if number is not None]
    nohup = [n for n in numbers if n == getattr(signal, "SIGHUP", None) and signal.getsignal(n) == signal.SIG_IGN]
    return [number for number in numbers if number not in nohup]


def exit_status(number: int) -> int:
    """Return the exit status of a process that a signal has ended.

    SIGUSR1 announces a cluster's time limit, so that a script may start the command again: 130, as after Ctrl-C.
    """
    return 130 if number == getattr(signal, "SIGUSR1", 0) else 128 + number


@contextmanager
def killable() -> Iterator[None]:
    """In a `with` statement: a signal ends a command without Python's help.

    For compiled code that holds Python's lock for long, such as a parser of text: no handler and no thread runs then.
    Does nothing outside a command, in other threads than the main one, and while the process ends in its own time.
    """
    if not _guarded or deferring or threading.current_thread() is not threading.main_thread():
        yield
        return
    ending = [number for number in heeded() if exit_status(number) == 128 + number]  # what the system gives as well
    before = {number: signal.signal(number, signal.SIG_DFL) for number in ending}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_guarded: list["Guard"] = []


class Guard:
    """In a `with` statement: a signal raises KeyboardInterrupt. If that does not end the process in time, it is ended.

    A thread learns of signals from the C handler, so it also works while the main thread is stuck: in a system call,
    in a lock, in the join of another thread, or in a loop that catches everything. A signal that one of `deferring`
    takes is left to it.

    number  the signal that ended the command, or 0
    """

    def __init__(self) -> None:
        self.number = 0
        self.thread = threading.Thread(target=self._watch, name="pixmim-signals", daemon=True)
        self._before: dict[int, Any] = {}
        self._over = threading.Event()

    def __enter__(self) -> "Guard":
        if threading.current_thread() is not threading.main_thread() or not _WAKE:  # elsewhere there are no handlers
            return self
        self._hook = sys.unraisablehook
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in heeded():
            self._before[number] = signal.signal(number, self._end)
        self._before[_WAKE] = signal.signal(_WAKE, lambda number, frame: None)
        self.thread.start()
        _guarded.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self._before:
            return
        _guarded.remove(self)
        self._over.set()
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._hook
        os.close(self._write)
        self.thread.join()

    def _end(self, number: int, frame: FrameType | None) -> None:
        if self.number:  # one press of Ctrl-C may arrive twice, and nothing ends the process sooner than it does now
            return
        self.number = number
        sys.unraisablehook = lambda unraisable: None  # KeyboardInterrupt in a callback is no news
        raise KeyboardInterrupt

    def _watch(self) -> None:
        while heard := os.read(self._read, 1):
            number = heard[0]
            if number == _WAKE or number not in self._before:
                continue
            # Of two signals at once, another thread may take both. The main thread then sleeps on, and runs no handler.
            signal.pthread_kill(threading.main_thread().ident or 0, _WAKE)
            if not any([defers(number) for defers in list(deferring)]):
                if not self._over.wait(LIMIT - _MARGIN):
                    os._exit(exit_status(number))
                break
        os.close(self._read)


def steady_streams() -> None:
    """Make stdout and stderr streams that never fail.

    What cannot be written (a closed pipe, a vanished terminal, a full disk) is dropped, and so is all that follows.
    What cannot be encoded is escaped.
    """
    for descriptor in (0, 1, 2):  # a closed one would be given to the next file that is opened
        try:
            os.fstat(descriptor)
        except OSError:
            _discard(descriptor)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)
        if old is not None and not isinstance(old, io.TextIOWrapper):
            continue
        if old is not None:
            with suppress(OSError):
                old.flush()
        raw = _Steady(descriptor, "wb", closefd=False)
        new = io.TextIOWrapper(
            raw if old and old.write_through else io.BufferedWriter(raw),
            encoding=old.encoding if old else "utf-8",
            errors="backslashreplace",
            line_buffering=bool(old and old.line_buffering),
            write_through=bool(old and old.write_through),
        )
        setattr(sys, name, new)


class _Steady(io.FileIO):
    """A standard stream whose writes never fail."""

    def write(self, data: Any) -> int:
        try:
            while (count := super().write(data)) is None:  # a full pipe that does not block
                select.select([], [self], [])
            return count
        except OSError:
            _discard(self.fileno())
            return len(data)


def _discard(descriptor: int) -> None:
    """Let a descriptor lead nowhere, for this process and those that it starts."""
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
    os.set_inheritable(descriptor, True)
