"""Test with tiny sizes, on the CPU, that benchmarks/gpu.py runs every part and writes what it measures."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from helpers import commands
from helpers.commands import Started

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks/gpu.py"
PARTS = ["ceilings", "tests", "step", "pretrain", "knn", "claims"]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_every_part_measures_something_in_a_dry_run(script: ModuleType, tmp_path: Path) -> None:
    parts = [name for name in PARTS if name != "ceilings"]  # in the next test
    if not (ROOT / "benchmarks/claims.py").exists():
        parts.remove("claims")
    for name in parts:
        Started(
            tmp_path / "log.txt", commands.script, str(SCRIPT), "--dry", "--part", name, "--out", str(tmp_path)
        ).end()
    results = {name: script.read_result(tmp_path, name) for name in parts}
    ends = {name: result["end"] for name, result in results.items()}
    assert set(ends.values()) == {"complete"}, f"{ends}\n{(tmp_path / 'log.txt').read_text()[-3000:]}"
    rows = [row for result in results.values() for table in result["tables"].values() for row in table]
    assert not [row for row in rows if "error" in row]
    assert all(result["tables"] for result in results.values())
    assert results["tests"]["tables"]["tests"][0]["passed"] and not results["tests"]["tables"]["tests"][0]["failed"]
    text = script.text_of(tmp_path)
    assert "images/s" in text and "PixMIM's target" in text


def test_the_command_runs_its_parts_and_prints_what_they_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--dry", "--only", "ceilings", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0 and "ceilings: complete" in done.stdout, done.stderr
    assert "TFLOP/s" in done.stdout and json.loads((tmp_path / "ceilings.json").read_text())["end"] == "complete"


def test_a_part_and_its_children_are_killed_at_the_limit(script: ModuleType, tmp_path: Path) -> None:
    command = ["sh", "-c", f"sleep 60 & echo $! > '{tmp_path}/child'; wait"]
    with open(tmp_path / "log", "w") as log:
        assert script.run_within(command, 1, dict(os.environ), log) == "stopped at its limit of 1 s"
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")
    deadline = time.monotonic() + 10
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "the child is alive"
        time.sleep(0.01)


def test_what_a_part_measured_before_its_error_is_kept(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(part: object) -> None:
        part.add("rates", rate=12.5)  # type: ignore[attr-defined]
        with part.trying("rates", what="slow") as row:  # type: ignore[attr-defined]
            raise ValueError("no memory\nat all")
        assert row["error"] == "no memory"
        raise RuntimeError("lost the device")

    monkeypatch.setitem(script.PARTS, "knn", script.Limited(broken, 1))
    with pytest.raises(RuntimeError):
        script.run_part(script.Part("knn", True, tmp_path))
    assert script.read_result(tmp_path, "knn") == {
        "end": "failed: lost the device",
        "tables": {"rates": [{"rate": 12.5}, {"what": "slow", "error": "no memory"}]},
    }


def test_the_section_of_the_page_is_written_from_the_files(script: ModuleType, tmp_path: Path) -> None:
    page = (ROOT / "docs/performance.md").read_text()
    before = script.with_section(page, tmp_path)
    assert script.NOT_YET in before
    script.Part(
        "step", False, tmp_path, tables={"steps": [{"model": "ViT-B", "images/s": 6012.3}]}, end="complete"
    ).write()
    after = script.with_section(before, tmp_path)
    assert "    steps\n      model  images/s\n      ViT-B     6,012\n" in after and script.NOT_YET not in after
    (tmp_path / "step.json").unlink()
    assert script.with_section(after, tmp_path) == before
    head, tail = (text.split("## On a GPU")[0] for text in (page, after))
    assert head == tail and after.count("\n## ") == page.count("\n## ")
