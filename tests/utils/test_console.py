"""Untrusted names on terminals and in spreadsheets, and progress outside a terminal."""

import io
import os

import pytest
from rich.console import Console

from pixmim.utils import console as module
from pixmim.utils.console import csv_cell, label, print_plain, printable, progress


@pytest.mark.parametrize(
    ("name", "escaped"),
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
def test_control_characters_are_escaped(name: str, escaped: str) -> None:
    assert printable(name) == escaped
    console = Console(file=io.StringIO(), force_terminal=True, width=20)
    line = name.replace("\n", "")
    print_plain(console, f"first\n{line}")
    assert console.file.getvalue() == f"first\n{printable(line)}\n"  # type: ignore[attr-defined]


def test_long_labels_are_elided_in_the_middle() -> None:
    assert label("a" * 48) == "a" * 48
    assert label("a" * 30 + "b" * 30) == "a" * 24 + "…" + "b" * 23


def test_no_csv_cell_is_a_formula() -> None:
    assert csv_cell("cats") == "cats" and csv_cell("") == ""
    for text in ("=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1"):
        assert csv_cell(text) == f"'{text}"


def test_outside_a_terminal_progress_is_a_line_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 6.0, 6.0, 7.0])
    monkeypatch.setattr(module, "time", type("Clock", (), {"monotonic": staticmethod(lambda: next(clock))}))
    console = Console(file=io.StringIO(), width=100)
    with progress("features", 2_000, console) as advance:
        for done in (1, 1_500, 2_000):
            advance(done)
    assert console.file.getvalue() == "features: 1,500 of 2,000\n"  # type: ignore[attr-defined]
