"""Text that came from files, made safe for the place where it is shown: a terminal, a spreadsheet."""

import re

from rich.console import Console

_ACTIVE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters (escape sequences begin with one), line separators, marks that reorder text, lone surrogates."""

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def printable(name: str) -> str:
    r"""Return a name with all that a terminal would act on as escapes: "a\x1b[2Jb" for an ESC between a and b.

    Bytes that are not UTF-8 are shown as they are, "M\xfcller.jpg".
    """
    return _ACTIVE.sub(lambda match: _escape(ord(match[0])), name)


def csv_cell(text: str) -> str:
    """Return text as a spreadsheet may open it: a leading quote keeps it from being read as a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def say(console: Console, text: str) -> None:
    """Print plain text: paths do not wrap, names have no colours or markup, control characters are escaped."""
    lines = (printable(line) for line in text.split("\n"))
    console.print("\n".join(lines), highlight=False, soft_wrap=True, markup=False)


def _escape(code: int) -> str:
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8 (surrogateescape)
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
