"""Test the sentence that compares a run with its start, and its interval."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pixmim.config import OnlineKnnConfig, PretrainConfig
from pixmim.config_io import to_json
from pixmim.evaluation.classification import difference_interval, wilson_interval
from pixmim.report.gain import answers, describe_gain, figures, gain_summary, verdict
from pixmim.report.page import write_report
from pixmim.report.results import ModelResults, compare

CONFIG = PretrainConfig(data="shapes:", init="my start", knn=OnlineKnnConfig("labeled/train", "labeled/test", 1.0))


def curve(*values: float, images: int = 200) -> list[dict[str, Any]]:
    lines = [
        {"step": 10 * i, "epoch": float(i), "knn/k1/mean/top1": 1.0, "knn/k20/mean/top1": value, "knn/images": images}
        for i, value in enumerate(values)
    ]
    return [line for pair in lines for line in (pair, {"step": pair["step"], "epoch": 0.0, "loss": 1.0})]


def wilson_ends(share: float, n: int) -> tuple[float, float]:
    """Return both ends by bisection of their definition: |p - share| = 1.96 sqrt(p (1 - p) / n)."""
    ends = []
    for outer in (0.0, 1.0):
        inner, end = share, outer
        for _ in range(100):
            middle = (inner + end) / 2
            inside = abs(middle - share) <= 1.96 * math.sqrt(middle * (1 - middle) / n)
            inner, end = (middle, end) if inside else (inner, middle)
        ends.append(inner)
    return ends[0], ends[1]


def test_an_interval_of_a_share_stays_between_zero_and_one() -> None:
    for n in range(1, 200):
        assert wilson_interval(0, n)[0] == 0 and wilson_interval(n, n)[1] <= 1
        assert f"{100 * wilson_interval(0, n)[0]:.1f}" == "0.0"


@pytest.mark.parametrize(("a", "n", "b", "m"), [(56, 70, 48, 80), (9, 10, 3, 10), (0, 20, 20, 20), (5, 9, 5, 9)])
def test_the_interval_of_a_difference_is_newcombes(a: int, n: int, b: int, m: int) -> None:
    (l1, u1), (l2, u2) = wilson_ends(a / n, n), wilson_ends(b / m, m)
    p, q = a / n, b / m
    expected = q - p - math.sqrt((q - l2) ** 2 + (u1 - p) ** 2), q - p + math.sqrt((u2 - q) ** 2 + (p - l1) ** 2)
    assert difference_interval(a, n, b, m) == pytest.approx(expected, abs=1e-9)


def test_the_published_example_of_the_interval() -> None:
    """Newcombe 1998, table II, method 10: 56/70 - 48/80 = 0.2000 (0.0524 to 0.3339)."""
    low, high = difference_interval(48, 80, 56, 70)
    assert (low, high) == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_the_interval_covers_the_difference_in_95_percent() -> None:
    generator, n = np.random.default_rng(0), 150
    draws = generator.binomial(n, [0.6, 0.7], (2000, 2))
    covered = [low <= 0.1 <= high for low, high in (difference_interval(int(a), n, int(b), n) for a, b in draws)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            (60.0, 50.0, 75.0),
            ["better than its start", "60.0 % (53.1 to 66.5)", "75.0 % (68.6 to 80.5)", "+15.0 points"],
        ),
        ((60.0, 70.0, 45.0), ["worse than its start", "-15.0 points", "Use the start itself: 'my start'"]),
        ((60.0, 62.0), ["not clearly different from its start", "+2.0 points", "at step 10"]),
    ],
)
def test_the_sentence_says_better_worse_or_neither(values: tuple[float, ...], words: list[str]) -> None:
    text = describe_gain(CONFIG, curve(*values))
    assert all(word in text for word in [*words, "200 images of labeled/test"]), text


def test_the_start_of_a_new_run_is_random_weights() -> None:
    text = describe_gain(replace(CONFIG, init=""), curve(60.0, 45.0))
    assert "worse than its start, random weights" in text and "Use the start" not in text


def result(encoder: str, value: float | None, name: str = "linear", **values: float) -> dict[str, Any]:
    """Return a result with the interval of 200 images."""
    low, high = wilson_ends((value or 0) / 100, 200)
    values |= {} if value is None else {"top1": value, "top1/low": 100 * low, "top1/high": 100 * high}
    return {"evaluation": name, "encoder": encoder, "settings": {"test": "labeled"}, "values": values}


def judge(*results: dict[str, Any], metrics: list[dict[str, Any]] | None = None) -> str:
    return verdict(CONFIG, metrics or [], compare([ModelResults("a", list(results))]), 0, Path("runs/a b"))


@pytest.mark.parametrize(
    ("trained", "untrained", "words"),
    [
        (60.0, 30.0, "It learned: linear probe 60.0 % (53.1 to 66.5), on labeled, and 30.0 % (24.1 to 36.7) with"),
        (60.0, 55.0, "It is not clear that it learned: linear probe 60.0 %"),
        (30.0, 60.0, "It is worse than untrained: linear probe 30.0 %"),
    ],
)
def test_the_verdict_compares_with_the_untrained_network(trained: float, untrained: float, words: str) -> None:
    assert words in judge(result("trained", trained), result("untrained", untrained))


def test_the_verdict_takes_the_best_evidence() -> None:
    weak = result("trained", None, "knn", **{"k20/mean/top1": 40.0})
    assert "k-NN (k = 20)" in judge(weak) and "--untrained" in judge(weak)
    assert "linear probe" in judge(weak, result("trained", 50.0))
    assert "than its start" in judge(result("trained", 50.0), metrics=curve(40.0, 70.0))
    (text,) = {judge(metrics=[{"step": step, "epoch": 1.0, "loss": 1 / step} for step in (1, 4)])}
    assert "1.000 to 0.250 in 4 steps" in text and "pixmim evaluate knn 'runs/a b'" in text
    assert judge() == ""


def test_the_verdict_rests_on_a_value_with_an_interval() -> None:
    def nearest(encoder: str, top1: float, balanced: float) -> dict[str, Any]:
        low, high = wilson_ends(top1 / 100, 200)
        ends = {"k20/mean/top1/low": 100 * low, "k20/mean/top1/high": 100 * high}
        return result(encoder, None, "knn", **{"k20/mean/top1": top1, **ends, "k20/mean/balanced": balanced})

    text = judge(nearest("trained", 50.5, 25.1), nearest("untrained", 50.0, 25.0))
    assert "not clear that it learned: k-NN (k = 20), mean of patch tokens 50.5 % (43.6 to 57.4)" in text
    bare = [result(encoder, None, top1=value) for encoder, value in (("trained", 90.0), ("untrained", 10.0))]
    assert "It is not clear that it learned: linear probe 90.0 %," in judge(*bare)


def test_evidence_of_several_settings_is_evidence() -> None:
    seeds = [result("trained", 60.0 + seed) | {"settings": {"test": "labeled", "seed": seed}} for seed in (0, 1)]
    losses = [{"step": step, "epoch": 1.0, "loss": 1 / step} for step in (1, 4)]
    assert judge(*seeds, metrics=losses).startswith("linear probe, seed 1: 61.0 %")


def test_the_verdict_rests_on_the_most_labels() -> None:
    def few_and_all(encoder: str, few: float, everything: float) -> dict[str, Any]:
        low, high = wilson_ends(everything / 100, 200)
        values = {"shots/5/top1": few, "shots/all/top1": everything}
        return result(encoder, None, **values, **{"shots/all/top1/low": 100 * low, "shots/all/top1/high": 100 * high})

    text = judge(few_and_all("trained", 20.0, 60.0), few_and_all("untrained", 40.0, 30.0))
    assert "It learned: all labels: linear probe 60.0 % (53.1 to 66.5)" in text and "30.0 %" in text


def test_without_a_measured_start_there_is_no_sentence() -> None:
    assert describe_gain(CONFIG, curve(50.0)) == describe_gain(CONFIG, []) == ""
    assert describe_gain(CONFIG, curve(50.0, 60.0)[2:]) == ""  # it begins after the first step
    assert describe_gain(None, curve(50.0, 60.0)) == ""
    moved = [*curve(50.0, 60.0), *curve(0.0, 0.0, 60.0, images=90)[4:]]  # resumed with other test images
    assert describe_gain(CONFIG, moved) == ""
    broken = [line | {"knn/k20/mean/top1": 1e300} for line in curve(50.0, 60.0)]
    assert describe_gain(CONFIG, broken) == describe_gain(CONFIG, curve(50.0, 60.0, images=0)) == ""


def test_the_page_begins_with_the_sentence_and_draws_the_start(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(to_json(CONFIG))
    lines = [line | {"knn/k20/cls/top1": 3.0, "knn/majority": 20.0} for line in curve(40.0, 55.0, 70.0)]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n".replace("'", '"') for line in lines))
    page = write_report([folder], tmp_path / "report.html", warn=lambda _: None).read_text()
    first = page.split("</h1>")[1].split("</p>")[0]
    assert "better than its start" in first and "+30.0 points" in first
    assert "run, k = 20, start" in page and "majority, start" not in page


def test_a_measure_without_values_keeps_nothing_and_says_so(tmp_path: Path) -> None:
    (line,) = gain_summary(replace(CONFIG, keep_best="knn"), tmp_path)
    assert "--keep-best knn" in line and gain_summary(CONFIG, tmp_path) == []


def by_labels(encoder: str, **values: float) -> dict[str, Any]:
    """Return a result whose settings name its numbers of labels."""
    found = result(encoder, None, **{f"shots/{count.strip('_')}/top1": value for count, value in values.items()})
    return found | {"settings": found["settings"] | {"shots": ",".join(values)}}


def test_only_a_models_own_initial_weights_are_its_start() -> None:
    """Two models share initial weights, and those of the third were not measured; a folder may be called untrained."""
    shared = by_labels("untrained", all=20.0)
    models = [
        ModelResults("one", [shared, by_labels("trained", all=40.0)]),
        ModelResults("untrained", [shared, by_labels("trained", all=50.0)]),
        ModelResults("other", [by_labels("trained", all=60.0)]),
    ]
    comparison = compare(models)
    assert comparison.columns == ["untrained", "one", "untrained", "other"]
    title = "linear probe with all labels"
    assert answers(comparison) == [
        f"one, {title}: 40.0 % (start 20.0 %, +20.0)",
        f"untrained, {title}: 50.0 % (start 20.0 %, +30.0)",
        f"other, {title}: 60.0 %",
    ]
    sentences = [verdict(None, [], comparison, i, Path("runs/a")) for i in range(3)]
    assert all("20.0 % with the initial weights" in sentence for sentence in sentences[:2])
    assert "50.0 %" in sentences[1] and "60.0 %" in sentences[2] and "was not measured" in sentences[2]


def test_lines_of_several_test_sets_name_them() -> None:
    one = by_labels("trained", all=40.0)
    two = one | {"settings": one["settings"] | {"test": "others"}}
    title = "linear probe with all labels"
    assert answers(compare([ModelResults("a", [one])])) == [f"{title}: 40.0 %"]
    expected = [f"{title} on labeled: 40.0 %", f"{title} on others: 40.0 %"]
    assert answers(compare([ModelResults("a", [two, one])])) == expected


def test_values_of_several_results_are_in_the_order_of_labels() -> None:
    few, more = by_labels("trained", _1=10.0, _5=20.0, all=50.0), by_labels("trained", _20=40.0, _3=15.0, all=50.0)
    for results in ([few, more], [more, few]):
        comparison = compare([ModelResults("a", results)])
        assert [row.key.split("/")[1] for row in comparison.rows] == ["1", "3", "5", "20", "all"]
        assert verdict(None, [], comparison, 0, Path("a")).startswith("all labels: linear probe: 50.0 %")
    ((_, svg),) = figures(comparison)
    places = [svg.index(f">{tick}<") for tick in ("1", "3", "5", "20", "all")]
    assert places == sorted(places)
    values = {f"block/{number}/top1": float(number) for number in (2, 10, 1)}
    rows = compare([ModelResults("a", [result("trained", None, **values)])]).rows
    assert [row.cells[0] and row.cells[0].value for row in rows] == [1, 2, 10]


def test_the_best_error_is_the_lowest() -> None:
    def measured(encoder: str, key: str, value: float) -> dict[str, Any]:
        values = {key: value, f"{key}/low": value - 2, f"{key}/high": value + 2}
        return result(encoder, None, "robustness", **values)

    for key, best in (("in_memory/probe/clean", 1), ("imagenet_a/top1", 0)):
        (row,) = compare([ModelResults("a", [measured("trained", key, 30), measured("untrained", key, 70)])]).rows
        assert [row.is_significant(cell) for cell in row.cells] == [best == 0, best == 1]


@pytest.mark.parametrize(("first", "count"), [(0, 1), (1, 0)])
def test_only_a_measured_start_is_drawn(first: int, count: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(to_json(CONFIG))
    lines = [{"step": i, "epoch": float(i), "knn/k20/mean/top1": 40.0 + i} for i in (first, 5, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = write_report([tmp_path], tmp_path / "report.html", warn=lambda _: None).read_text()
    assert html.count("k = 20, start<") == count
