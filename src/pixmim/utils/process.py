"""Signals, exit and standard streams of a command line process.

A signal ends a command within two seconds, and output that cannot be written does not end it. Only the command line
installs this, through `as_process`: importing pixmim changes nothing.
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
from types import FrameType
from typing import Any, NoReturn

LIMIT = 2.0
"""Seconds within which a signal ends a command, whatever it is executing."""

_MARGIN = 0.3  # seconds of LIMIT reserved for a busy machine

deferring: list[Callable[[int], bool]] = []
"""Functions that return True for a signal after which the process ends by itself, however long that takes."""


def as_process(command: Callable[[], int]) -> int:
    """Run a command as the main function of this process. Return its exit status, or exit with it.

    The process exits here after a signal, or if other threads are running: the interpreter would wait for threads that
    are stuck.
    """
    steady_streams()
    with Guard() as guard:
        status, is_distributed = 0, "MASTER_ADDR" in os.environ
        try:
            status = command()
        except BaseException:
            if not guard.number:
                raise
        if guard.number:
            exit_now(exit_status(guard.number))
        if is_distributed or set(threading.enumerate()) - {threading.main_thread(), guard.thread}:
            exit_now(status)
    return status


def exit_now(status: int) -> NoReturn:
    """Exit after the `atexit` functions, without finalizing the interpreter or the process group.

    Threads of a process group may abort during finalization, and torchrun would then report a failure of a complete
    run.
    """
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError, ValueError):  # closed
            stream.flush()
    os._exit(status)


def termination_signals() -> list[int]:
    """Return the signals that end a command: all but SIGHUP under nohup."""
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    numbers = [number for number in (getattr(signal, name, None) for name in names) if number is not None]
    return [n for n in numbers if n != getattr(signal, "SIGHUP", 0) or signal.getsignal(n) != signal.SIG_IGN]


def exit_status(number: int) -> int:
    """Return the exit status after a signal.

    SIGUSR1 announces the time limit of a cluster job. Its status is that of Ctrl-C, 130, so that a job script can
    recognize that the command should be run again.
    """
    return 130 if number == getattr(signal, "SIGUSR1", 0) else 128 + number


@contextmanager
def killable() -> Iterator[None]:
    """Restore the system's default signal handling during a block.

    Use it for compiled code that holds the GIL for long, such as a JSON parser: neither Python's handlers nor threads
    run then. Does nothing outside a command, in other threads than the main one, or while signals are deferred.
    """
    if not _guards or deferring or threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [number for number in termination_signals() if exit_status(number) == 128 + number]  # not SIGUSR1
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


_guards: list["Guard"] = []


class Guard:
    """Context manager in which a signal raises KeyboardInterrupt, and ends the process if that takes too long.

    A thread is notified of signals by Python's C handler, so this works while the main thread is blocked: in a system
    call, on a lock, joining another thread, or in a loop that catches everything. Signals for which a function in
    `deferring` returns True are left to it.

    Attributes:
        number: The signal that ended the command, or 0.
        thread: The thread that is notified.
    """

    def __init__(self) -> None:
        self.number = 0
        self.thread = threading.Thread(target=self._watch, name="pixmim-signals", daemon=True)
        self._handlers: dict[int, Any] = {}
        self._exited = threading.Event()

    def __enter__(self) -> "Guard":
        if threading.current_thread() is not threading.main_thread() or os.name == "nt":
            return self  # Python allows no handlers there
        self._hook = sys.unraisablehook
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        for number in termination_signals():
            self._handlers[number] = signal.signal(number, self._interrupt)
        self.thread.start()
        _guards.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        if not self._handlers:
            return
        _guards.remove(self)
        self._exited.set()
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._hook
        os.close(self._write)
        self.thread.join()

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.number:  # Ctrl-C may arrive twice, and a second signal cannot end the process any sooner
            return
        self.number = number
        sys.unraisablehook = lambda unraisable: None  # do not print KeyboardInterrupt raised in a callback
        raise KeyboardInterrupt

    def _watch(self) -> None:
        while received := os.read(self._read, 1):
            number = received[0]
            if number in self._handlers and not any([defers(number) for defers in list(deferring)]):
                if not self._exited.wait(LIMIT - _MARGIN):
                    os._exit(exit_status(number))
                break
        os.close(self._read)


def steady_streams() -> None:
    """Replace stdout and stderr by streams that never raise.

    After a failed write (closed pipe, closed terminal, full disk) all output is dropped. Characters that the encoding
    lacks are escaped.
    """
    for descriptor in (0, 1, 2):  # a closed descriptor would be reused by the next file that is opened
        try:
            os.fstat(descriptor)
        except OSError:
            _redirect_to_null(descriptor)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        old = getattr(sys, name)
        encoding, by_line = "utf-8", False
        if isinstance(old, io.TextIOWrapper):
            with suppress(OSError):
                old.flush()
            encoding, by_line = old.encoding, old.line_buffering or old.write_through
        if old is None or isinstance(old, io.TextIOWrapper):
            raw = io.BufferedWriter(_SteadyStream(descriptor, "wb", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, encoding, "backslashreplace", line_buffering=by_line))


class _SteadyStream(io.FileIO):
    """A raw stream whose writes never raise."""

    def write(self, data: Any) -> int:
        try:
            while (count := super().write(data)) is None:  # a full non-blocking pipe
                select.select([], [self], [])
            return count
        except OSError:
            _redirect_to_null(self.fileno())
            return len(data)


def _redirect_to_null(descriptor: int) -> None:
    """Redirect a descriptor to the null device, for this process and its children."""
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
    os.set_inheritable(descriptor, True)
