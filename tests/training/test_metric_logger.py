"""Test the reported throughput."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from pixmim.training import metric_logger
from pixmim.training.metric_logger import MetricLogger, bound_by, read_metrics


def test_the_limit_of_the_throughput_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bound_by(0.02) == "compute-bound: waits for data 2%"
    assert bound_by(0.4) == "data-bound: waits for data 40%"

    clock = iter([100.0, 110.0, 120.0])  # the start, and two lines
    monkeypatch.setattr(metric_logger.time, "perf_counter", lambda: next(clock))
    console = Console(file=io.StringIO(), width=200)
    path = tmp_path / "metrics.jsonl"
    with MetricLogger(path, steps=4, start=0, every=2, epoch=0.5, images=8, console=console) as log:
        log.log(2, waited=1.0)
        log.log(4, waited=7.0)
        assert log.data_wait == pytest.approx(0.35)
    assert [line["data_wait_fraction"] for line in read_metrics(path)] == pytest.approx([0.1, 0.6])
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "compute-bound: waits for data 10%" in text and "data-bound: waits for data 60%" in text
