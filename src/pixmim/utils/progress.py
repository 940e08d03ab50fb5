"""Show progress on a terminal for work that takes longer than a moment: a bar if its length is known, or a count."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pixmim.utils.console import cell, print_plain, printable
from pixmim.utils.threads import thread_pool

T = TypeVar("T")

_MOMENT = 1.0  # seconds until a count is shown
_AGAIN = 0.1  # seconds between its updates
_SECONDS_TO_LINE = 5.0  # seconds between the lines of `progress`
_SECONDS_TO_BAR = 2.0  # seconds until `parallel_map` shows a bar


@contextmanager
def progress(what: str, total: int, console: Console | None) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal, and a line every few seconds in a notebook or a file.

    Yields a function to call with the number of items done.
    """
    console = console or Console(quiet=True, force_terminal=False)
    due = time.monotonic() + _SECONDS_TO_LINE
    with _bar(console) as bar:
        task = bar.add_task(printable(what), total=total)

        def advance(done: int) -> None:
            nonlocal due
            bar.update(task, completed=done)
            if not console.is_terminal and time.monotonic() >= due:
                print_plain(console, f"{what}: {done:,} of {total:,}")
                due = time.monotonic() + _SECONDS_TO_LINE

        yield advance


@contextmanager
def status_counter(what: str, things: str) -> Iterator[Callable[[int], None]]:
    """Show a count on the terminal if the work takes longer than a second: "`what`: 12,345 `things`".

    Yields a function to call with the number of further items done. Most calls cost a look at the clock.
    """
    console = Console(stderr=True)
    status = console.status("")
    due = time.monotonic() + _MOMENT
    done = 0

    def add(more: int) -> None:
        nonlocal done, due
        done += more
        now = time.monotonic()
        if now >= due and console.is_terminal:
            status.update(cell(f"{what}: {done:,} {things}"))
            status.start()
            due = now + _AGAIN

    try:
        yield add
    finally:
        status.stop()


def parallel_map(what: str, function: Callable[[int], T], count: int, threads: int = 16) -> list[T]:
    """Call `function` with 0 to `count - 1` in threads, with a bar named `what` on a terminal after two seconds.

    Returns:
        The results in order. The first error is raised once the calls in progress end; the others are not made.
    """
    if not count:
        return []
    bar = _bar(Console(stderr=True))
    task, due, shown = bar.add_task(printable(what), total=count), time.monotonic() + _SECONDS_TO_BAR, False
    results: list[T] = []
    with thread_pool(min(threads, count), "pixmim-files") as pool:
        jobs = [pool.submit(function, i) for i in range(count)]
        try:
            for job in jobs:
                if not shown and wait([job], max(0.0, due - time.monotonic())).not_done:
                    bar.start()
                    shown = True
                results.append(job.result())
                bar.update(task, completed=len(results))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            if shown:
                bar.stop()
    return results


def _bar(console: Console) -> Progress:
    """Create a bar that disappears at the end; it is disabled where the console is not a terminal."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
