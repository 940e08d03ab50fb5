"""Progress where there is no terminal."""

import io

import pytest
from rich.console import Console

from pixmim.utils import progress as module
from pixmim.utils.progress import progress


def test_a_notebook_sees_a_line_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 6.0, 6.0, 7.0])
    monkeypatch.setattr(module, "time", type("Clock", (), {"monotonic": staticmethod(lambda: next(clock))}))
    console = Console(file=io.StringIO(), width=100)
    with progress("features", 2_000, console) as advance:
        for done in (1, 1_500, 2_000):
            advance(done)
    assert console.file.getvalue() == "features: 1,500 of 2,000\n"  # type: ignore[attr-defined]
