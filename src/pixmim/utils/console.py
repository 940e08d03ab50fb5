"""Text that came from files, made safe for the place where it is shown: a terminal, a spreadsheet, a figure."""

import re

from rich.console import Console
from rich.text import Text

_ACTIVE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters (escape sequences begin with one), line separators, marks that reorder text, lone surrogates."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")

_LEVELS = {"error:": "red", "warning:": "yellow"}


def printable(name: str) -> str:
    r"""Return a name with all that a terminal would act on as escapes: "a\x1b[2Jb" for an ESC between a and b.

    Bytes that are not UTF-8 are shown as they are, "M\xfcller.jpg".
    """
    return _ACTIVE.sub(lambda match: _escape(ord(match[0])), name)


def csv_cell(text: str) -> str:
    """Return text as a spreadsheet may open it: a leading quote keeps it from being read as a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def utf8(name: str) -> str:
    r"""Return a name as valid Unicode: bytes that are not UTF-8 become escapes, "M\xfcller.jpg"."""
    return re.sub("[\ud800-\udfff]", lambda match: _escape(ord(match[0])), name)


def printable_lines(text: str) -> str:
    """Return text of several lines with each of them as `printable` does."""
    return "\n".join(printable(line) for line in text.split("\n"))


def cell(text: str) -> Text:
    """Return a name for a table, a bar or a status: rich reads no markup and no emoji codes in it."""
    return Text(printable(text))


def label(name: str, most: int = 48) -> str:
    """Return a name to be drawn into an image: printable and of at most `most` characters, cut in the middle."""
    shown = printable(name)
    return shown if len(shown) <= most else f"{shown[: most // 2]}…{shown[-(most - most // 2 - 1) :]}"


def plot_label(name: str) -> str:
    """Return a name to be drawn by matplotlib, which would take what is between two dollar signs for mathematics."""
    return label(name).replace("$", r"\$")


def print_plain(console: Console, text: str) -> None:
    """Print plain text: paths do not wrap, names have no colors or markup, control characters are escaped.

    A leading "error:" or "warning:" is colored.
    """
    shown = Text(printable_lines(text))
    for level, style in _LEVELS.items():
        if text.startswith(level):
            shown.stylize(style, 0, len(level))
    console.print(shown, highlight=False, soft_wrap=True)


def _escape(code: int) -> str:
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8 (surrogateescape)
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
