"""Text from files, made safe for terminals and spreadsheets."""

import io
import os

import pytest
from rich.console import Console

from pixmim.utils.console import csv_cell, print_plain, printable


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain [mae] $x$ \u4f60\u597d.jpg", "plain [mae] $x$ \u4f60\u597d.jpg"),
        ("a\x1b[2Jb", "a\\x1b[2Jb"),
        ("a\x9b2Jb", "a\\x9b2Jb"),
        ("two\nlines\r", "two\\x0alines\\x0d"),
        ("gpj.\u202eexe", "gpj.\\u202eexe"),
        (os.fsdecode(b"M\xfcller.jpg"), "M\\xfcller.jpg"),
        ("half \ud800", "half \\ud800"),
    ],
)
def test_a_name_is_shown_and_nothing_in_it_acts(name: str, shown: str) -> None:
    assert printable(name) == shown
    console = Console(file=io.StringIO(), force_terminal=True, width=20)
    print_plain(console, f"first\n{name.replace(chr(10), '')}")
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert printed == f"first\n{printable(name.replace(chr(10), ''))}\n"


def test_no_cell_of_a_spreadsheet_is_a_formula() -> None:
    assert csv_cell("cats") == "cats" and csv_cell("") == ""
    for text in ("=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1"):
        assert csv_cell(text) == f"'{text}"
