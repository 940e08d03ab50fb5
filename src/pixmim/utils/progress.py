"""What a terminal shows of work that takes longer than a moment: a bar where its end is known, else a line."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pixmim.utils.console import cell, printable

_MOMENT = 1.0  # seconds that need no explanation
_AGAIN = 0.1  # seconds between two looks of the line


def bar(console: Console) -> Progress:
    """A bar that leaves nothing behind; none if the console is no terminal. It is to be started."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


@contextmanager
def progress(what: str, total: int, console: Console | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere; it is told how many are done."""
    with bar(console or Console(quiet=True, force_terminal=False)) as shown:
        task = shown.add_task(printable(what), total=total)
        yield lambda done: shown.update(task, completed=done)


@contextmanager
def patience(what: str, things: str) -> Iterator[Callable[[int], None]]:
    """Gives a function that is told of every few more things that are done; most calls cost a look at the clock.

    After a second, "`what`: 12,345 `things`" stands on the terminal until the work ends; elsewhere nothing does.
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
