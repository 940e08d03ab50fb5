"""Run commands in this process."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from pixmim import cli


def say(capsys: pytest.CaptureFixture[str], *args: object, report: bool = True) -> tuple[int, str]:
    """Run `pixmim` with these arguments; return its exit status and its output on one line."""
    with pytest.MonkeyPatch.context() as patch:
        if not report:
            skip_report(patch.setattr)
        try:
            status = cli.main([str(arg) for arg in args])
        except SystemExit as stop:  # tyro exits on a wrong flag
            status = int(stop.code or 0)
    output = capsys.readouterr()
    return status, " ".join((output.out + output.err).split())


def skip_report(patch: Callable[[str, object], None]) -> None:
    """Make commands skip the page at their end. `patch` sets an attribute by its dotted name."""

    def write_report(folders: list[Path], page: Path, *_: object, **__: object) -> Path:
        return page

    modules = [import_module(f"pixmim.{name}") for name in ("report", "run_folder", "api")]
    for module in modules:  # all were imported before: one that was imported now would keep the substitute
        patch(f"{module.__name__}.write_report", write_report)
