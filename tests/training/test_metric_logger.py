"""Test the reported throughput."""

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from pixmim.training import metric_logger
from pixmim.training.metric_logger import MetricLogger, bound_by, read_metrics


def test_the_limit_of_the_throughput_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bound_by(0.02) == "compute-bound: waits for data 2%"
    assert bound_by(0.4) == "data-bound: waits for data 40%"

    clock = iter([100.0, 110.0, 120.0, 150.0, 160.0])  # the start, two lines, the end of a measurement, a line
    monkeypatch.setattr(metric_logger.time, "perf_counter", lambda: next(clock))
    console = Console(file=io.StringIO(), width=200)
    path = tmp_path / "metrics.jsonl"
    with MetricLogger(path, steps=6, start=0, every=2, epoch=0.5, images=8, console=console) as log:
        for step, waited in ((2, 1.0), (4, 7.0)):
            log.update(step, waited, loss=torch.tensor(1.0))
            log.log(step)
        assert log.data_wait == pytest.approx(0.35)
        log.update(5, 9.0, loss=torch.tensor(torch.nan))
        log.pause()  # 30 seconds, of which training waited 2
        log.update(6, 12.0, loss=torch.tensor(torch.nan))
        log.log(6)
        assert log.data_wait == pytest.approx((1 + 6 + 3) / 30)
    lines = read_metrics(path)
    assert [line["data_wait_fraction"] for line in lines] == pytest.approx([0.1, 0.6, 0.3])
    assert [line["images_per_s"] for line in lines] == pytest.approx([0.8, 0.8, 0.8])
    assert lines[0]["loss"] == 1 and "loss" not in lines[2] and "NaN" not in path.read_text()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "compute-bound: waits for data 10%" in text and "data-bound: waits for data 60%" in text
