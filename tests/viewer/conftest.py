"""A small trained run, and its page."""

from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.runs import train
from pixmim.config import CheckpointConfig, PretrainConfig, TargetConfig
from pixmim.viewer.page import Page

DATA = "shapes:count=30,size=32"


@pytest.fixture(scope="session")
def two_runs(tiny_run: Callable[..., PretrainConfig], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return the folders of a run of PixMIM with three checkpoints, and of one of MAE. Do not change them."""
    root = tmp_path_factory.mktemp("runs")
    train(tiny_run(log_every=1, checkpoint=CheckpointConfig(every=2, keep_last=5)), root / "pixmim")
    train(tiny_run(log_every=1, target=TargetConfig(kind="pixels")), root / "mae")
    return [root / "pixmim", root / "mae"]


@pytest.fixture
def page(two_runs: list[Path]) -> Page:
    return Page(two_runs, DATA, "cpu")
