"""The runner of the table in docs/methods.md: configurations that differ by PixMIM only, and its statistics."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

ROOT = Path(__file__).parents[1]


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import methods

    return methods


def test_the_forms_of_a_method_differ_by_pixmim_only(methods: Any) -> None:
    from claims import differences

    scale = methods.SCALES["cpu"]
    for method in methods.METHODS:
        plain, pixmim_form = (methods.pretrain_config(method, form, 1, scale, "objects") for form in (False, True))
        assert differences(plain, pixmim_form) <= {"crop.kind", "crop.scale", "target.kind"}
        assert (plain.crop.kind, plain.target.kind) == ("random-resized", "pixels")
        assert (pixmim_form.crop.kind, pixmim_form.target.kind) == ("simple-resized", "low-frequency")
        assert (plain.steps, plain.batch_size, plain.seed) == (900, 64, 1)


def test_a_method_is_trained_measured_and_not_repeated(
    methods: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build = methods.pretrain_config  # long runs log some of their steps only
    monkeypatch.setattr(methods, "pretrain_config", lambda *args: replace(build(*args), log_every=2))
    command = ["--tiny", "--out", str(tmp_path), "--jobs", "0", "--limit", "1"]
    assert methods.main(command) == 0
    record = json.loads((tmp_path / "mae-plain-0.json").read_text())
    start = json.loads((tmp_path / "start-mae-0.json").read_text())
    assert record["finished"]
    assert start["parameters"] == 1_223_040  # counted by hand: 6 blocks of 198,272, and the rest
    for values in (record["points"]["2"], start["points"]["0"]):
        assert set(methods.MEASURES) <= set(values)
    capsys.readouterr()
    assert methods.main([*command[:-1], "0"]) == 0
    assert "1 of 72 runs" in capsys.readouterr().out


def test_the_table_contains_paired_intervals(methods: Any, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(50, 3, (3, 3))  # plain, PixMIM, start, by seed
    for seed in methods.SEEDS:
        for name, value in zip(
            (f"mff-plain-{seed}", f"mff-pixmim-{seed}", f"start-mff-{seed}"), values[:, seed], strict=True
        ):
            point = dict.fromkeys(methods.MEASURES, value)
            point |= {"first_loss": 1.5, "last_loss": 0.5, "processor_seconds": 90.0 + seed, "memory_mb": 900}
            record = methods.Record(tmp_path / f"{name}.json", {})
            record.save(points={"900": point}, parameters=1_200_000, images=[5760], finished=True)
    page = tmp_path / "methods.md"
    page.write_text(f"Before\n{methods.BEGIN}\n{methods.END}\nAfter\n")
    methods.main(["--table", "--out", str(tmp_path), "--page", str(page)])
    text = page.read_text()
    low, high = stats.ttest_rel(values[0], values[2]).confidence_interval()
    gain = f"{(low + high) / 2:+.1f} ± {(high - low) / 2:.1f}"
    assert f"| MFF | 1.2 M | 1.50, 0.50 | {values[2].mean():.1f} | {gain} |" in text
    low, high = stats.ttest_rel(values[1], values[0]).confidence_interval()
    assert f"| MFF | {(low + high) / 2:+.1f} ± {(high - low) / 2:.1f} |" in text
    assert "| 9 | 9 | 900 |" in text  # 91 seconds for ten epochs
    assert "LSMAE" not in text
    assert text.startswith("Before") and text.endswith("After\n")


def test_the_page_repeats_the_results(methods: Any, tmp_path: Path) -> None:
    written, found = tmp_path / "methods.md", (ROOT / "docs" / "methods.md").read_text()
    written.write_text(found)
    results = ROOT / "benchmarks" / "results" / "methods"
    assert methods.main(["--out", str(results), "--table", "--page", str(written)]) == 0
    assert written.read_text() == found
