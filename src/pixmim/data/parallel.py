"""The same work on many files by threads, with a bar once it takes long enough to be asked about."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from time import monotonic
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

_PATIENCE = 2.0  # seconds without a bar


def parallel(what: str, function: Callable[[int], T], count: int, threads: int = 16) -> list[T]:
    """`function` of 0 to count - 1, in order. The first error ends it; what is begun is finished, the rest left.

    what  names the work on a bar, which a terminal shows after two seconds
    """
    if not count:
        return []
    console = Console(stderr=True)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    task, patience, shown = bar.add_task(what, total=count), monotonic() + _PATIENCE, False
    found: list[T] = []
    with ThreadPoolExecutor(min(threads, count), "pixmim-files") as pool:
        jobs = [pool.submit(function, i) for i in range(count)]
        try:
            for job in jobs:
                if not shown and wait([job], max(0.0, patience - monotonic())).not_done:
                    bar.start()
                    shown = True
                found.append(job.result())
                bar.update(task, completed=len(found))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            if shown:
                bar.stop()
    return found
