"""Helpers of tests: cli."""

import pytest

from pixmim import cli


def say(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    try:
        status = cli.main([str(arg) for arg in args])
    except SystemExit as stop:  # tyro ends the process on a wrong flag
        status = int(stop.code or 0)
    seen = capsys.readouterr()
    return status, " ".join((seen.out + seen.err).split())
