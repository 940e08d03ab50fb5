"""What pixmim raises when the mistake is in its input, so that the command line can print one line and no traceback."""

import difflib
import reprlib
from collections.abc import Iterable


class UserError(Exception):
    """Something only the user can put right. The message says what is wrong, where, and what to do."""


class AlreadyReportedError(UserError):
    """A UserError that another rank of the run raises as well: not printed again."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the known word closest to `word`, or an empty string when none is close."""
    if len(word) > 100:  # comparing takes time in proportion to its square
        return ""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def first_line(error: BaseException) -> str:
    """What another library's error says in its first line, or its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxother = 3, 100, 100


def shown(value: object) -> str:
    """Return an untrusted value for a message, cut after 80 characters. It may be nested without end."""
    text = _BRIEF.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
