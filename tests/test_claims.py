"""The runner of docs/claims.md: arms that differ in the named values only, resumption, and statistics."""

import argparse
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from rich.console import Console
from scipy import stats

import pixmim
from pixmim.build import build_crop, build_mask_sampler, build_model
from pixmim.data import create_loader
from pixmim.data.bad_images import BadImageLog
from pixmim.data.sampler import BatchShard

ROOT = Path(__file__).parents[1]


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import claims

    return claims


@pytest.fixture
def page(claims: Any) -> Any:
    import claims_page

    return claims_page


def test_arms_differ_in_the_named_values_only(claims: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for scale in claims.SCALES.values():
        claims.check_arms(scale, "objects")
    assert len(claims.plan()) == len({run.name for run in claims.plan()})
    both = [claims.pretrain_config(claims.Run("shapes", arm, 1), claims.SCALES["tiny"], "") for arm in ("mae", "both")]
    assert claims.differences(*both) == {"crop.kind", "target.kind"}
    build = claims.pretrain_config
    monkeypatch.setattr(
        claims, "pretrain_config", lambda run, *rest: replace(build(run, *rest), steps=3 if run.arm == "both" else 4)
    )
    with pytest.raises(ValueError, match="steps"):
        claims.check_arms(claims.SCALES["tiny"], "")


def test_radii_are_those_of_224_px_scaled(claims: Any) -> None:
    scale = claims.SCALES["cpu"]
    for radius in claims.RADII:
        config = claims.pretrain_config(claims.Run("shapes", f"radius-{radius}", 0), scale, "")
        assert config.target.radius / scale.size == pytest.approx(radius / 224)


def test_arms_of_a_seed_share_weights_order_flips_and_masks(claims: Any) -> None:
    seen = []
    for arm in ("mae", "both"):
        config = claims.pretrain_config(claims.Run("shapes", arm, 2), claims.SCALES["tiny"], "")
        model, data = build_model(config), pixmim.open_dataset(config.data)
        with create_loader(
            data,
            build_crop(config),
            BatchShard(config.batch_size, 0, 0, 1, 1),
            "none",
            device=torch.device("cpu"),
            skipped=BadImageLog(None, len(data), 0),
            flip=config.crop.flip,
            seed=config.seed,
            masks=build_mask_sampler(config, model.patch).at,
            threads=1,
        ) as loader:
            batches = []
            for _ in range(4):
                one = next(loader)  # the loader reuses the memory of images, flips and indices
                batches.append(
                    [torch.as_tensor(x).clone() for x in (one.indices, one.flip, one.mask.hidden, one.images)]
                )
        seen.append((list(model.state_dict().values()), batches))
    (weights, first), (other_weights, second) = seen
    assert all(torch.equal(a, b) for a, b in zip(weights, other_weights, strict=True))
    for (*shared, images), (*other_shared, other_images) in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(shared, other_shared, strict=True))
        assert not torch.equal(images, other_images)


def test_a_killed_run_ends_as_an_uninterrupted_one_and_is_not_repeated(
    claims: Any, page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--tiny", "--out", str(tmp_path / "out"), "--jobs", "0", "--only", "shapes", "--limit", "1"]
    measured, measure = list[Any](), claims.measure

    def killed(*settings: Any, **more: Any) -> dict[str, float]:
        measured.append(settings)
        if len(measured) == 3:  # after the start and the first point
            raise KeyboardInterrupt
        return measure(*settings, **more)

    monkeypatch.setattr(claims, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        claims.main(command)
    assert claims.main(command) == 0
    assert len(measured) == 4  # neither the start nor the first point again
    record = json.loads((tmp_path / "out" / "shapes-mae-0.json").read_text())
    assert record["finished"]
    assert list(record["points"]) == ["2", "4"]
    config = claims.pretrain_config(claims.Run("shapes", "mae", 0), claims.SCALES["tiny"], "")
    alone = pixmim.pretrain(config, tmp_path / "alone", report=False, console=Console(quiet=True))
    assert record["points"]["4"]["loss"] == alone.metrics[-1]["loss"]
    results = page.Results.read(tmp_path / "out", claims.SCALES["tiny"])
    assert all(results.value("shapes", "mae", 0, name, step) is not None for name in page.MEASURES for step in (0, 4))
    assert not (tmp_path / "out" / "work" / "shapes-mae-0").exists()
    capsys.readouterr()
    assert claims.main([*command[:-2], "--limit", "0"]) == 0
    assert "1 of 12 runs" in capsys.readouterr().out


def test_processes_share_a_folder(claims: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(run=None, objects="", out=tmp_path, scale="tiny", device="auto", jobs=0, limit=None)
    executed, elsewhere = list[str](), FileLock(tmp_path / "third.lock")

    def execute(name: str) -> None:
        executed.append(name)
        for done in (name, "second"):  # another process finishes the second run meanwhile, and works on the third
            claims.Record(tmp_path / f"{done}.json", {}).save(finished=True)

    with elsewhere:
        assert claims.work_off(["first", "second", "third"], execute, options, "") == 0
    assert executed == ["first"]
    out = capsys.readouterr().out
    assert "second: another process finished it" in out
    assert "third: another process works on it" in out
    assert "third: left" in out


def test_supervised_runs_and_coverage_at_the_smallest_size(claims: Any, tmp_path: Path) -> None:
    for set_name, run in (("supervised", "caltech101-rrc-0"), ("coverage", "shapes-coverage-0")):
        assert claims.main(["--tiny", "--out", str(tmp_path), "--jobs", "0", "--only", set_name, "--limit", "1"]) == 0
        assert json.loads((tmp_path / f"{run}.json").read_text())["finished"]


def test_results_of_other_settings_are_refused(claims: Any, tmp_path: Path) -> None:
    claims.Record(tmp_path / "a.json", {"steps": 4}).save()
    claims.Record(tmp_path / "a.json", {"steps": 4})
    with pytest.raises(SystemExit, match="--out"):
        claims.Record(tmp_path / "a.json", {"steps": 5})


def test_an_effect_that_rounds_to_zero_has_no_sign(page: Any) -> None:
    assert page.shown((-0.04, 1.5, 3)) == "+0.0 ± 1.5"
    assert page.shown((-0.06, 1.5, 3)) == "-0.1 ± 1.5"


@pytest.mark.parametrize("seeds", [2, 3, 7])
def test_an_interval_of_two_arms_is_that_of_the_paired_t_test(page: Any, seeds: int) -> None:
    values = np.random.default_rng(seeds).normal(50, 3, (2, seeds))
    mean, half = page.contrast_interval(values, (-1, 1))
    low, high = stats.ttest_rel(values[1], values[0]).confidence_interval()
    assert (mean - half, mean + half) == pytest.approx((low, high))


def test_an_interval_of_four_arms_is_that_of_least_squares(page: Any) -> None:
    values = np.random.default_rng(1).normal(50, 3, (4, 3))
    weights = np.array([-0.5, 0.5, -0.5, 0.5])
    columns = np.zeros((12, 6))  # four arms, and the second and third seed against the first
    for row, (arm, seed) in enumerate(np.ndindex(4, 3)):
        columns[row, arm] = 1
        if seed:
            columns[row, 3 + seed] = 1
    inverse = np.linalg.inv(columns.T @ columns)
    fitted = inverse @ columns.T @ values.ravel()
    variance = ((values.ravel() - columns @ fitted) ** 2).sum() / 6
    contrast = np.array([*weights, 0, 0])
    half = stats.t.ppf(0.975, 6) * np.sqrt(variance * contrast @ inverse @ contrast)
    assert page.contrast_interval(values, weights) == pytest.approx((contrast @ fitted, half))


@pytest.mark.parametrize(("arms", "weights"), [(2, (-1, 1)), (4, (-0.5, 0.5, -0.5, 0.5))])
def test_the_smallest_difference_is_found_in_four_of_five_repetitions(page: Any, arms: int, weights: Any) -> None:
    smallest = page.smallest_difference(1.5, arms, 3, weights)
    generator, found, shift = np.random.default_rng(0), 0, np.array(weights) / np.square(weights).sum() * smallest
    for _ in range(2000):
        mean, half = page.contrast_interval(generator.normal(0, 1.5, (arms, 3)) + shift[:, None], weights)
        found += abs(mean) > half
    assert found / 2000 == pytest.approx(0.8, abs=0.03)


def _fabricated(
    claims: Any, folder: Path, gain: float, seeds: tuple[int, ...] = (0, 1, 2), start: str = "same"
) -> None:
    """Write the results of four arms on shapes, where both of the paper's values together add `gain` points."""
    noise = np.random.default_rng(0).normal(0, 0.1, (4, 3))
    for seed in seeds:
        claims.Record(folder / f"start-shapes-{seed}.json", {"start": "same"}).save(
            points={"0": {"linear/top1": 20.0}}, finished=True
        )
        for i, arm in enumerate(("mae", "target", "crop", "both")):
            values = {"linear/top1": 50 + seed + noise[i, seed] + gain * (i == 3)}
            record = claims.Record(folder / f"shapes-{arm}-{seed}.json", {"sources": {}, "scale": {}})
            record.save(points={"2": values, "4": values}, finished=True)
            record.save(start=start, images={"test": 2000, "corrupt": 500, "conflict": 2000}, versions={"torch": "2"})


@pytest.mark.parametrize(("gain", "expected"), [(3, "agrees"), (-3, "disagrees"), (0, "undecided")])
def test_the_page_contains_what_was_found(claims: Any, page: Any, tmp_path: Path, gain: float, expected: str) -> None:
    _fabricated(claims, tmp_path, gain)
    rows = page.claims(page.Results.read(tmp_path, claims.SCALES["tiny"]))
    assert f"shapes: {expected}" in rows[0][-1]
    assert "Imagewoof: no result yet" in rows[0][-1]


def test_the_page_counts_what_is_there(claims: Any, page: Any, tmp_path: Path) -> None:
    document = tmp_path / "docs" / "claims.md"
    document.parent.mkdir()
    document.write_text(f"# Before\n\n{page.BEGIN}\nold\n{page.END}\n\nAfter\n")
    page.write(tmp_path / "none", claims.SCALES["tiny"], document)
    assert re.search(r"0 of \d+ runs", document.read_text())
    assert "svg" not in document.read_text()
    _fabricated(claims, tmp_path / "some", 3)
    page.write(tmp_path / "some", claims.SCALES["tiny"], document)
    text = document.read_text()
    assert "shapes: 12 of 12" in text
    assert "old" not in text
    assert text.startswith("# Before") and text.endswith("After\n")
    assert "<svg" in (document.parent / "images" / "claims.svg").read_text()


def test_one_complete_seed_is_no_result(claims: Any, page: Any, tmp_path: Path) -> None:
    _fabricated(claims, tmp_path, 3, seeds=(1,))
    assert page.claims(page.Results.read(tmp_path, claims.SCALES["tiny"]))[0][-1] == "no result yet"


def test_arms_that_started_from_other_weights_are_refused(claims: Any, page: Any, tmp_path: Path) -> None:
    _fabricated(claims, tmp_path, 3, start="other")
    with pytest.raises(ValueError, match="start"):
        page.Results.read(tmp_path, claims.SCALES["tiny"])


def test_the_page_contains_the_smallest_differences_of_the_design(claims: Any, page: Any) -> None:
    text = (ROOT / "docs" / "claims.md").read_text()
    rows = page.design(claims.SCALES["cpu"], {"caltech101": 2893, "imagewoof": 1000, "shapes": 2000})
    cells = [re.findall(r"[\d.]+(?= \|)", row) for row in rows[3:]]
    for numbers in cells:
        assert re.search(r"\| " + r" \| ".join(map(re.escape, numbers)) + r" \|", text), numbers


def test_readme_and_summary_repeat_the_results(claims: Any, page: Any, tmp_path: Path) -> None:
    """Write the page from the results in the repository, and look for the numbers of README and summary in it."""
    written, found = tmp_path / "claims.md", (ROOT / "docs" / "claims.md").read_text()
    written.write_text(found)
    page.write(ROOT / "benchmarks" / "results" / "claims", claims.SCALES["cpu"], written)
    assert written.read_text() == found
    readme = re.search(r"(?s)tested again\*\*.*?\n\n", (ROOT / "README.md").read_text())
    assert readme is not None
    summary, results = found.split("## Design")[0], found.split(page.BEGIN)[1]
    for text, count in ((readme[0], 7), (summary, 19)):
        numbers = re.findall(r"[-+]\d\.\d ± \d\.\d|\d+\.\d %|\+\d\.\d", text)
        assert len(numbers) == count
        assert [number for number in numbers if number not in results] == []
