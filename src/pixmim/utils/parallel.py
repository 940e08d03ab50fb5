"""The same work on many files by threads, with a bar once it takes long enough to be asked about."""

from collections.abc import Callable
from concurrent.futures import wait
from time import monotonic
from typing import TypeVar

from rich.console import Console

from pixmim.utils.console import printable
from pixmim.utils.progress import bar
from pixmim.utils.threads import workers

T = TypeVar("T")

_PATIENCE = 2.0  # seconds without a bar


def parallel(what: str, function: Callable[[int], T], count: int, threads: int = 16) -> list[T]:
    """`function` of 0 to count - 1, in order. The first error ends it; what is begun is finished, the rest left.

    what  names the work on a bar, which a terminal shows after two seconds
    """
    if not count:
        return []
    progress = bar(Console(stderr=True))
    task, patience, shown = progress.add_task(printable(what), total=count), monotonic() + _PATIENCE, False
    found: list[T] = []
    with workers(min(threads, count), "pixmim-files") as pool:
        jobs = [pool.submit(function, i) for i in range(count)]
        try:
            for job in jobs:
                if not shown and wait([job], max(0.0, patience - monotonic())).not_done:
                    progress.start()
                    shown = True
                found.append(job.result())
                progress.update(task, completed=len(found))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            if shown:
                progress.stop()
    return found
