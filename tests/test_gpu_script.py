"""Test with tiny sizes, on the CPU, that benchmarks/gpu.py runs every part and writes what it measures."""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helpers.commands import Started

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks/gpu.py"
PARTS = ["ceilings", "tests", "step", "pretrain", "knn", "claims"]


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script()


def dry_run(out: str) -> None:
    """Run the script, with parts after the first forked from this process, which has imported torch."""
    script = load_script()
    start = script.run_within

    def fork(command: list[str], limit: float, environment: dict[str, str], log: Any) -> str:
        if PARTS[0] in command:
            return str(start(command, limit, environment, log))
        if child := os.fork():
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            return f"failed: status {status}" if status else ""
        try:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            os.environ.update(environment)
            sys.path[:0] = [str(SCRIPT.parent), *environment["PYTHONPATH"].split(os.pathsep)]
            sys.argv = command[1:]
            os._exit(script.main())
        finally:
            os._exit(1)

    script.run_within = fork
    sys.argv = [str(SCRIPT), "--dry", "--out", out]
    sys.exit(script.main())


def test_a_dry_run_measures_every_part(tmp_path: Path) -> None:
    output = tmp_path / "output.txt"
    text = Started(output, dry_run, str(tmp_path), variables={"CUDA_VISIBLE_DEVICES": ""}).end()
    results = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in PARTS}
    ends = {name: result["end"] for name, result in results.items()}
    if not (ROOT / "benchmarks/claims.py").exists():
        assert ends.pop("claims").startswith("left out")
        del results["claims"]
    assert set(ends.values()) == {"complete"}, f"{ends}\n{(tmp_path / 'log.txt').read_text()[-3000:]}"
    rows = [row for result in results.values() for table in result["tables"].values() for row in table]
    assert not [row for row in rows if "error" in row]
    assert all(result["tables"] for result in results.values())
    assert results["tests"]["tables"]["tests"][0]["passed"] and not results["tests"]["tables"]["tests"][0]["failed"]
    assert "images/s" in text and "PixMIM's target" in text


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
