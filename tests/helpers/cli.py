"""Run commands in this process."""

from collections.abc import Callable
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

    for module in ("report", "run_folder", "api"):
        patch(f"pixmim.{module}.write_report", write_report)
