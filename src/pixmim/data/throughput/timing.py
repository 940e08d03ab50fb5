"""How much gets done in a second: medians of short turns."""

import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from threading import Lock
from time import perf_counter
from typing import TypeVar

from pixmim.data.bad_images import Skipped
from pixmim.data.batches import Portion
from pixmim.data.dataset import Source
from pixmim.data.decode.limits import max_bytes
from pixmim.data.loader import Loader
from pixmim.transforms.crops import Crop
from pixmim.utils.files import open_regular, read_file
from pixmim.utils.threads import workers

TURNS = 3

_BATCH = 32

Extent = tuple[str, int, int]
"""Where bytes lie: file, first byte, number of bytes (0: all that follow)."""

T = TypeVar("T")


def rate(work: Callable[[T], object], things: Callable[[], Iterable[T]], threads: int, seconds: float) -> float:
    """Things a second that `threads` threads work through; a turn ends with its things, or after `seconds`."""

    def turn() -> float:
        left, lock = iter(things()), Lock()
        began = perf_counter()

        def some() -> int:
            done = 0
            while not done or perf_counter() - began < seconds:
                try:
                    with lock:
                        thing = next(left)
                except StopIteration:
                    break
                work(thing)
                done += 1
            return done

        with workers(threads, "pixmim-bench") as pool:
            done = sum(each.result() for each in [pool.submit(some) for _ in range(threads)])
        return done / (perf_counter() - began)

    return statistics.median(turn() for _ in range(TURNS))


def loader_rate(source: Source, crop: Crop, threads: int, seconds: float, drop: Sequence[Extent] = ()) -> float:
    """Images a second that come out of a Loader, once it is busy.

    drop  what the system is asked to drop from its memory before each turn, which then lasts one epoch at most
    """
    batch = max(1, min(_BATCH, len(source) // 8))
    most = max(2, len(source) // batch) if drop else 10**9

    def turn() -> float:
        for extent in drop:
            forget(extent)
        skipped, done = Skipped(None, len(source), 1.0), 0
        with Loader(source, crop, Portion(batch), skipped=skipped, threads=threads) as batches:
            next(batches)  # from here on, as many batches are in the making as at the end
            began = perf_counter()
            while done < most - 1 and (not done or perf_counter() - began < seconds):
                next(batches)
                done += 1
            return done * batch / (perf_counter() - began)

    return statistics.median(turn() for _ in range(TURNS))


def read(extent: Extent) -> int:
    """Read the bytes; gives their number, or 0 where they cannot be read."""
    path, start, count = extent
    try:
        if not count:
            return len(read_file(path, max_bytes()))
        with open(open_regular(path), "rb", buffering=0) as file:
            file.seek(start)
            return len(file.read(min(count, max_bytes())))
    except OSError:
        return 0


def forget(extent: Extent) -> None:
    """Ask the system to drop the bytes from its memory, so that they are read from the disk next time.

    Needs no rights; does nothing to bytes that were written just now, where a file system lies in memory, and where
    the system (macOS, Windows) has no such call.
    """
    path, start, count = extent
    if not hasattr(os, "posix_fadvise"):
        return
    try:
        descriptor = open_regular(path)
    except OSError:
        return
    try:
        os.posix_fadvise(descriptor, start, count, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
