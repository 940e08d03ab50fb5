"""Print untrusted text safely, and show progress.

Names come from files. Escape sequences would act on a terminal, formulas on a spreadsheet and markup on rich.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

_ACTIVE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters (escape sequences start with one), line separators, bidirectional marks, lone surrogates."""

_FORMULA_PREFIXES = ("=", "+", "-", "@", "\t", "\r", "\n")

_LEVELS = {"error:": "red", "warning:": "yellow"}

_COUNTER_INTERVAL = 0.1  # seconds between refreshes of a counter
_LINE_INTERVAL = 5.0  # seconds between progress lines outside a terminal


def printable(name: str) -> str:
    r"""Escape all characters that a terminal would act on: "a\x1b[2Jb" for an ESC between a and b.

    Bytes that are not UTF-8 are escaped too: "M\xfcller.jpg".
    """
    return _ACTIVE.sub(lambda match: _escape(ord(match[0])), name)


def printable_lines(text: str) -> str:
    """Escape each line as `printable` does, and keep line breaks."""
    return "\n".join(printable(line) for line in text.split("\n"))


def csv_cell(text: str) -> str:
    """Prefix text that a spreadsheet would evaluate as a formula with a quote."""
    return f"'{text}" if text.startswith(_FORMULA_PREFIXES) else text


def utf8(name: str) -> str:
    r"""Return a name as valid Unicode: bytes that are not UTF-8 become escapes, "M\xfcller.jpg"."""
    return re.sub("[\ud800-\udfff]", lambda match: _escape(ord(match[0])), name)


def cell(text: str) -> Text:
    """Return a name for a table, bar or status, without rich markup or emoji codes."""
    return Text(printable(text))


def label(name: str, max_length: int = 48) -> str:
    """Return a printable name to draw into an image, with its middle elided beyond `max_length` characters."""
    text = printable(name)
    half = max_length // 2
    return text if len(text) <= max_length else f"{text[:half]}…{text[-(max_length - half - 1) :]}"


def plot_label(name: str) -> str:
    """Return a label for matplotlib, which would parse text between two dollar signs as mathematics."""
    return label(name).replace("$", r"\$")


def print_plain(console: Console | None, text: str) -> None:
    """Print plain text without wrapping, highlighting or markup, and with control characters escaped.

    A leading "error:" or "warning:" is colored. Without a console, nothing is printed.
    """
    if console is None:
        return
    escaped = Text(printable_lines(text))
    for level, style in _LEVELS.items():
        if text.startswith(level):
            escaped.stylize(style, 0, len(level))
    console.print(escaped, highlight=False, soft_wrap=True)


def progress_bar(console: Console) -> Progress:
    """Create a bar that disappears at the end, and is disabled unless the console is a terminal."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


@contextmanager
def progress(description: str, total: int, console: Console | None) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal, or a line every few seconds in a notebook or file.

    Yields:
        A function to call with the number of items done.
    """
    console = console or Console(quiet=True, force_terminal=False)
    next_line = time.monotonic() + _LINE_INTERVAL
    with progress_bar(console) as bar:
        task = bar.add_task(printable(description), total=total)

        def advance(done: int) -> None:
            nonlocal next_line
            bar.update(task, completed=done)
            if not console.is_terminal and time.monotonic() >= next_line:
                print_plain(console, f"{description}: {done:,} of {total:,}")
                next_line = time.monotonic() + _LINE_INTERVAL

        yield advance


@contextmanager
def status_counter(description: str, unit: str) -> Iterator[Callable[[int], None]]:
    """Show a running count on a terminal, "`description`: 12,345 `unit`".

    Yields:
        A function to call with the number of additional items done. Most calls only read the clock.
    """
    done, next_update = 0, time.monotonic() + _COUNTER_INTERVAL
    with Console(stderr=True).status(cell(description)) as status:

        def add(count: int) -> None:
            nonlocal done, next_update
            done += count
            if time.monotonic() >= next_update:
                status.update(cell(f"{description}: {done:,} {unit}"))
                next_update = time.monotonic() + _COUNTER_INTERVAL

        yield add


def _escape(code: int) -> str:
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8 (surrogateescape)
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
