"""Errors whose cause is the user's input, and the text of their messages."""

import difflib
import reprlib
from collections.abc import Iterable


class UserError(Exception):
    """An error that the user can correct. The message states what is wrong, where, and what to do.

    The command line prints it as one line without a traceback.
    """


class AlreadyReportedError(UserError):
    """A UserError that another rank raises as well, and that is therefore not printed again."""


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the closest known word, or "" if none is similar."""
    if not isinstance(word, str) or len(word) > 100:  # the comparison takes quadratic time
        return ""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error message, or the error's class name if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 3, 100, 100


def shown(value: object) -> str:
    """Return the repr of an untrusted value, at most 80 characters long. Nesting of any depth is safe."""
    text = _REPR.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
