"""Bounds on the pixels, bytes and seconds that decoding one image may take.

Sizes are checked before memory is allocated. They fit the machine, so that each of its threads may decode the largest
image at the same time.
"""

import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

from pixmim.data.dataset import BadImage
from pixmim.utils.errors import UserError, first_line
from pixmim.utils.memory import total_memory

MAX_SECONDS = 30.0
"""An image that takes longer to decode is a BadImage."""

MAX_ASPECT = 100
"""Maximum ratio of the long side to the short one: resizing the short side enlarges the long one as much."""

MAX_PIXELS_VARIABLE = "PIXMIM_MAX_PIXELS"
"""Environment variable that overrides the maximum number of pixels of an image."""

_PIXELS_RANGE, _BYTES_RANGE = (25_000_000, 120_000_000), (2**28, 2**30)
_PIXEL_BYTES = 20  # memory per pixel of the most expensive common format, WebP with transparency
_COPIES = 4  # of a file or an array in memory, at most, while it is decoded

T = TypeVar("T")


@contextmanager
def library_errors(**advice: str) -> Iterator[None]:
    """Turn errors of another library into BadImage: on damaged files, it raises almost anything.

    Args:
        advice: What to do, by a word in the error's message.
    """
    try:
        yield
    except BadImage:
        raise
    except Exception as error:
        hint = next((f": {text}" for word, text in advice.items() if word in str(error)), "")
        raise BadImage(f"{type(error).__name__}: {first_line(error)[:200].rstrip(':')}{hint}") from None


def size_bounds(memory: int | None, threads: int, override: str = "") -> tuple[int, int]:
    """Return the maximum number of pixels of an image, and of bytes of a file or an array.

    The threads share half of the memory in bytes (None: unknown). `override` is a number of pixels set by the user.
    """
    share = (memory or 2**62) // 2 // threads
    max_pixels = min(max(share // _PIXEL_BYTES, _PIXELS_RANGE[0]), _PIXELS_RANGE[1])
    max_bytes = min(max(share // _COPIES, _BYTES_RANGE[0]), _BYTES_RANGE[1])
    if not override:
        return max_pixels, max_bytes
    if not (override.isascii() and override.isdigit() and 0 < len(override) < 16 and int(override)):
        raise UserError(
            f"{MAX_PIXELS_VARIABLE}={override} is not a number of pixels: set it to one, such as 300000000, or unset it"
        )
    return int(override), max(max_bytes, 8 * int(override))


@cache
def _machine_bounds() -> tuple[int, int]:
    # All processes of a machine share its cores, and each starts at most 16 decoding threads.
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    threads = min(os.cpu_count() or 1, 16 * (int(processes) if processes.isdigit() else 1))
    return size_bounds(total_memory(), max(1, threads), os.environ.get(MAX_PIXELS_VARIABLE, ""))


def max_pixels() -> int:
    """Return the maximum number of pixels of an image on this machine."""
    return _machine_bounds()[0]


def max_bytes() -> int:
    """Return the maximum number of bytes of an image file, or of an array of pixels, on this machine."""
    return _machine_bounds()[1]


def check_size(width: int, height: int) -> None:
    """Raise BadImage if an image has no pixels, too many pixels, or an extreme aspect ratio."""
    if min(width, height) < 1:
        raise BadImage(f"{width}x{height} pixels: the image is empty")
    if width * height > max_pixels():
        raise BadImage(
            f"{width}x{height} pixels are more than the {max_pixels():,} allowed on this machine: cut it into tiles, "
            f"or set {MAX_PIXELS_VARIABLE}"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(f"{width}x{height} pixels: the aspect ratio is above {MAX_ASPECT}")


def check_bytes(count: int) -> None:
    """Raise BadImage if a file or an array has too many bytes."""
    if count > max_bytes():
        raise BadImage(
            f"{count / 2**30:.1f} GiB are more than the {max_bytes() / 2**30:.3g} allowed on this machine: cut it into "
            f"tiles, or set {MAX_PIXELS_VARIABLE}"
        )


# The time limit


class _TimeLimitExceeded(BaseException):
    """Not an Exception, since decoders catch those."""


_deadlines: dict[int, float] = {}  # by thread
_interrupting = 0  # the thread that the watcher is about to interrupt
_start_lock = threading.Lock()
_watcher: threading.Thread | None = None


def run_with_time_limit(function: Callable[[], T]) -> T:
    """Return `function()`, or raise BadImage once it has taken MAX_SECONDS. Must not be nested.

    Python code is interrupted at its next instruction, compiled code when it returns.
    """
    thread = threading.get_ident()
    try:
        try:
            _set_deadline(thread)
            return function()
        finally:
            _clear_deadline(thread)
    except _TimeLimitExceeded:
        while True:
            try:
                _clear_deadline(thread)
                break
            except _TimeLimitExceeded:  # a second interruption while the first was handled
                continue
        raise BadImage(f"it took longer than {MAX_SECONDS:g} s to decode") from None


def _set_deadline(thread: int) -> None:
    global _watcher
    _deadlines[thread] = time.monotonic() + MAX_SECONDS
    if _watcher is None or not _watcher.is_alive():  # a fork does not copy the watcher
        with _start_lock:
            if _watcher is None or not _watcher.is_alive():
                _watcher = threading.Thread(target=_watch, name="decoding-time-limit", daemon=True)
                _watcher.start()


def _clear_deadline(thread: int) -> None:
    """Remove a thread's deadline. No interruption arrives after this returns.

    Takes no lock: an interruption between acquiring a lock and its `with` block would never release it.
    """
    _deadlines.pop(thread, None)
    while _interrupting == thread:
        time.sleep(0.001)
    _deadlines.pop(thread, None)  # the watcher may have extended it in between
    _interrupt(thread, None)  # cancels an interruption that was sent and has not arrived


def _watch() -> None:
    global _interrupting
    while True:
        time.sleep(min(1.0, MAX_SECONDS / 4))
        now = time.monotonic()
        for thread, deadline in _deadlines.copy().items():
            if now > deadline:
                _interrupting = thread
                if _deadlines.get(thread) == deadline:  # still running; from here on `_clear_deadline` waits
                    _deadlines[thread] = now + MAX_SECONDS  # repeat, in case something catches this one
                    _interrupt(thread, _TimeLimitExceeded)
                _interrupting = 0


def _interrupt(thread: int, error: type[BaseException] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread), ctypes.py_object(error) if error is not None else None
    )
