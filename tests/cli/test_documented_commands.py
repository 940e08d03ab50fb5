"""The commands on documentation pages are valid."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from pixmim import cli
from pixmim.evaluation.settings import (
    DetectionSettings,
    FinetuneOverrides,
    FinetuneSettings,
    LinearSettings,
    RobustnessSettings,
    SegmentationSettings,
    ShapeBiasSettings,
)

ROOT = Path(__file__).parents[2]
IMAGENET = ("imagenet/train", "imagenet/val")
ADE = "ADEChallengeData2016"


def shown(text: str, command: str = "evaluate") -> list[str]:
    """Return the complete commands of a kind on a page, without those that have placeholders or [optional parts]."""
    found = re.findall(rf"(?m)^(?: {{4}})?(?:\$ )?(pixmim {command} (?:.*\\\n)*.*)", text)
    return [re.sub(r"\\\n *", "", line) for line in found if not re.search(r"\[|\.\.\.|NAME|\$", line)]


PAGES = {path.name: shown(path.read_text()) for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect the arguments of evaluations instead of running them."""
    recorded: list[Any] = []

    def record(models: dict[str, Path], evaluations: list[Any], *_: Any, **__: Any) -> list[Any]:
        recorded.append((list(models), evaluations))
        return []

    monkeypatch.setattr("pixmim.api.evaluate_many", record)
    monkeypatch.setattr("pixmim.api.write_report", lambda *_, **__: None)
    module = sys.modules["pixmim.cli.evaluate"]  # the package has a function of that name
    monkeypatch.setattr(module, "_show", lambda *_: None)
    monkeypatch.setattr("pixmim.api.with_full_paths", lambda settings: settings)
    return recorded


@pytest.mark.parametrize("line", sorted({line for lines in PAGES.values() for line in lines if "--" in line}))
def test_documented_evaluations_are_valid(line: str, calls: list[Any]) -> None:
    assert cli.main(shlex.split(line, comments=True)[1:]) == 0 and len(calls) == 1


def test_the_papers_tables_start_with_the_published_settings(calls: list[Any]) -> None:
    """All but a width are defaults, which the tests of each protocol compare with the papers."""
    page = (ROOT / "docs" / "evaluate.md").read_text()
    section = page.split("## The paper's tables, each in one line\n")[1].split("\n## ")[0]
    for line in shown(section):
        assert cli.main(shlex.split(line)[1:]) == 0
    runs = ["runs/pixmim", "runs/mae"]
    tuned = [f"{run}/classifier" for run in runs]
    robust = RobustnessSettings("imagenet-c", "imagenet-a", "imagenet-r", "sketch")
    scratch = [
        FinetuneSettings(*IMAGENET, from_scratch=True, size="192", changes=FinetuneOverrides(crop=crop))
        for crop in ("random-resized", "simple-resized")
    ]
    assert calls == [
        (runs, [("linear", LinearSettings(*IMAGENET, protocol="mae"))]),
        (runs, [("finetune", FinetuneSettings(*IMAGENET))]),
        (runs, [("segmentation", SegmentationSettings(ADE, ADE, width=768))]),
        (runs, [("detection", DetectionSettings(data="coco"))]),
        (tuned, [("robustness", robust)]),
        (tuned, [("shape-bias", ShapeBiasSettings("cue-conflict"))]),
        (["runs/pixmim-300", *runs[:1], "runs/pixmim-1600"], [("linear", LinearSettings(*IMAGENET, protocol="mae"))]),
        *[(runs[:1], [("finetune", settings)]) for settings in scratch],
    ]


def test_documented_coverage_commands_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    class ReachedError(Exception):
        pass

    def fail(data: str, size: tuple[int, int], mask_ratio: float, **_: Any) -> None:
        raise ReachedError(data, size, mask_ratio)

    monkeypatch.setattr("pixmim.evaluation.object_coverage.measure_coverage", fail)
    lines = shown((ROOT / "docs" / "evaluate.md").read_text(), "coverage")
    reached = []
    for line in lines:
        with pytest.raises(ReachedError) as error:
            cli.main(shlex.split(line)[1:])
        reached.append(error.value.args)
    assert ("imagenet/boxes", (224, 224), 0.75) in reached
