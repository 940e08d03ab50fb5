"""A line on the terminal for work that takes longer than a moment."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

_MOMENT = 1.0  # seconds that need no explanation
_AGAIN = 0.1  # seconds between two looks of the line


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
            status.update(escape(f"{what}: {done:,} {things}"))
            status.start()
            due = now + _AGAIN

    try:
        yield add
    finally:
        status.stop()
