"""Test complete runs: results, files and messages."""

import csv
import json
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from rich.console import Console
from safetensors import safe_open

from helpers.cli import say
from helpers.evaluated import evaluate
from helpers.runs import equal, train, weights
from pixmim.build import build_model
from pixmim.config import CheckpointConfig, OnlineKnnConfig, OptimConfig, PretrainConfig, RecipeInfo
from pixmim.config_io import to_json
from pixmim.evaluation.settings import LinearSettings
from pixmim.models import features
from pixmim.recipes import get_recipe
from pixmim.run_folder import check_same_run, open_run, with_full_paths
from pixmim.training.checkpoint import CheckpointManager
from pixmim.training.distributed import Distributed
from pixmim.utils.errors import UserError

Make = Callable[..., PretrainConfig]


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_a_function_of_its_seed(tiny_run: Make, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tiny_run(seed=seed), tmp_path / name)
    assert equal(tmp_path / "a", tmp_path / "b") and not equal(tmp_path / "a", tmp_path / "c")


def test_the_loss_falls_and_the_curve_is_golden(tiny_run: Make, tmp_path: Path) -> None:
    train(tiny_run(steps=60, log_every=20, optim=OptimConfig(lr=3e-3, warmup=1)), tmp_path / "run")
    losses = [line["loss"] for line in metrics(tmp_path / "run")]
    assert losses == pytest.approx([1.008, 0.827, 0.755], abs=0.02)


def test_accumulation_changes_rounding_only(tiny_run: Make, tmp_path: Path) -> None:
    """Parts of a batch contain the same samples, crops and masks; only the order of summation differs."""
    for parts in (1, 2, 3, 8):
        train(tiny_run(accumulation_steps=parts, log_every=1, steps=3), tmp_path / str(parts))
    expected = [line["loss"] for line in metrics(tmp_path / "1")]
    for parts in ("2", "3", "8"):
        assert [line["loss"] for line in metrics(tmp_path / parts)] == pytest.approx(expected, rel=1e-4)


def test_a_cpu_splits_batches_and_resumes_bitwise(
    tiny_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, split, resumed = (tmp_path / name for name in ("full", "split", "resumed"))
    run = tiny_run(log_every=1, checkpoint=CheckpointConfig(every=3, keep_last=9))
    assert "parts" not in train(run, full)
    monkeypatch.setattr("pixmim.training.find_batch_size.images_at_once", lambda pixels, width: 3)
    assert "cpu, each batch in 3 parts of up to 3, in fp32" in train(run, split)
    losses = [[line["loss"] for line in metrics(out)] for out in (full, split)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    shutil.copytree(split / "checkpoints" / "step-000000003", resumed / "checkpoints" / "step-000000003")
    shutil.copy(split / "config.json", resumed)
    train(run, resumed)
    assert equal(split, resumed) and not equal(split, full)


def test_any_size_any_precision_grey(tiny_run: Make, tmp_path: Path) -> None:
    text = train(tiny_run(size="16x48", channels=1, precision="bf16", steps=2), tmp_path / "run")
    assert "at 16x48" in text and "bf16" in text
    assert weights(tmp_path / "run")["patch_embed.proj.weight"].shape == (32, 1, 8, 8)


def test_timm_loads_the_product_strictly(tiny_run: Make, tmp_path: Path) -> None:
    run = tiny_run()
    train(run, tmp_path / "run")
    path = tmp_path / "run" / "encoder" / "model.safetensors"
    encoder = timm.create_model(f"local-dir:{path.parent}", pretrained=True)
    trained = build_model(run)
    CheckpointManager(tmp_path / "run" / "checkpoints").load_model(trained)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(encoder.eval()(images), features(trained.encoder.eval(), images).vector[:, -1])
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["backbone"] == run.model.backbone and metadata["step"] == "6" and "0.485" in metadata["mean"]


def test_a_recipes_backbone_loads_without_options(tmp_path: Path, tiny_run: Make) -> None:
    """The README's line: timm.create_model("local-dir:runs/photos/encoder", pretrained=True)."""
    run = replace(
        get_recipe("pixmim-vit-small"), data="shapes:count=4,size=224", steps=1, batch_size=2, device="cpu", threads=1
    )
    train(run, tmp_path / "run")
    encoder = timm.create_model(f"local-dir:{tmp_path}/run/encoder", pretrained=True)
    assert encoder(torch.zeros(1, 3, 224, 224)).shape == (1, 384)


def test_bad_files_cost_a_line_each(tiny_run: Make, tmp_path: Path, pictures: Path) -> None:
    (pictures / "dogs" / "empty.jpg").write_bytes(b"")
    (pictures / "dogs" / "page.png").write_text("<html>")
    content = (pictures / "dogs" / "0.jpg").read_bytes()
    (pictures / "dogs" / "cut.jpg").write_bytes(content[: len(content) // 2])
    text = train(tiny_run(data=str(pictures)), tmp_path / "run")
    assert "3 of 13 images could not be read" in text
    rows = list(csv.reader((tmp_path / "run" / "skipped.csv").open()))
    assert {Path(row[0]).name: bool(row[1]) for row in rows[1:]} == {
        "empty.jpg": True,
        "page.png": True,
        "cut.jpg": True,
    }


def test_metrics_have_steps_and_rates(tiny_run: Make, tmp_path: Path) -> None:
    train(tiny_run(log_every=2), tmp_path / "run")
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines[-1]["epoch"] == pytest.approx(6 * 8 / 40)
    assert all(
        line["images_per_s"] > 0 and 0 <= line["data_wait_fraction"] <= 1 and line["skipped_steps"] == 0
        for line in lines
    )


def test_periodic_knn_draws_a_curve(tiny_run: Make, tmp_path: Path) -> None:
    run = tiny_run(
        steps=10, knn=OnlineKnnConfig("shapes:count=30,size=32", "shapes:count=20,size=32,seed=1", every=1.0)
    )
    train(run, tmp_path / "run")
    steps = [line["step"] for line in metrics(tmp_path / "run") if "knn/k20/mean/top1" in line]
    assert steps == [0, 5, 10]
    quiet = replace(run, knn=OnlineKnnConfig())
    train(quiet, tmp_path / "quiet")
    assert equal(tmp_path / "run", tmp_path / "quiet")  # measuring changes nothing


def test_a_run_that_diverges_stops_with_advice(tiny_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pixmim import pretraining as module

    def spoil(*args: object) -> torch.Tensor:
        return original(*args) * float("nan")  # type: ignore[arg-type]

    original = module.flip_and_normalize
    monkeypatch.setattr(module, "flip_and_normalize", spoil)
    with pytest.raises(UserError, match=r"not finite in the last 2. steps.*--optim.clip"):
        train(tiny_run(steps=100, log_every=5), tmp_path / "run")


def test_warnings_for_runs_far_from_their_recipe(tiny_run: Make, tmp_path: Path) -> None:
    text = train(
        tiny_run(batch_size=64, steps=2, recipe_info=RecipeInfo(steps=1000), optim=OptimConfig(lr=1.0)),
        tmp_path / "run",
    )
    assert "2 steps are less than a tenth of the 1,000" in text
    assert "--optim.lr 1 is unusual for a batch" in text
    assert "each of the 40 images more than once" in text


def test_a_rate_that_would_rise_is_warned_about(tiny_run: Make, tmp_path: Path) -> None:
    simmim = get_recipe("simmim-swin-base").optim  # whose lowest rate is of 2,048 images
    text = train(tiny_run(batch_size=64, steps=2, optim=simmim), tmp_path / "run")
    assert "--optim.min-lr 4e-05 is above the learning rate 2.5e-05 of a batch of 64" in text
    assert "warmup-start-lr" not in text


class _SecondRank(Distributed):
    """Rank 1 of 2, where `pixmim stats` has measured nothing."""

    def gather(self, value: Any, group: Any = None) -> list[Any]:
        return [((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)) if value == (None, None) else value, value]


def test_all_ranks_have_the_statistics_of_the_first(tiny_run: Make, tmp_path: Path) -> None:
    config, _ = open_run(tiny_run(), str(tmp_path), _SecondRank(1, 2), ExitStack(), Console(quiet=True), resume=False)
    assert (config.mean, config.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_a_run_is_not_written_among_its_own_images(
    tiny_run: Make, pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its reconstructions would be images of the next run."""
    monkeypatch.chdir(pictures)
    data = f"shapes:count=9+{pictures},exclude=*.png*2"
    for out in (pictures, pictures / "new/run", None):  # None: runs/NAME-TIME in the working directory
        with pytest.raises(UserError, match=rf"is inside --data {pictures}, .*--out"):
            train(tiny_run(data=data), out)  # type: ignore[arg-type]
    status, text = say(capsys, "slurm", "demo", "--data", ".", "--gpus", "1")
    assert status == 1 and "is inside --data ." in text
    assert not list(pictures.rglob("*.json")) and not list(pictures.rglob("slurm.sh"))
    train(tiny_run(data=str(pictures), steps=1), pictures.parent / f"{pictures.name}-run")


def test_initial_weights_are_the_same_file_from_any_folder(
    tiny_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    run = tmp_path / "run"
    for init, full in (("a.pth", f"{tmp_path}/a.pth"), ("~/a.pth", "/home/me/a.pth"), ("timm:a", "timm:a"), ("", "")):
        assert with_full_paths(tiny_run(init=init), run).init == full
    run.mkdir()
    (run / "config.json").write_text(to_json(tiny_run(init="a.pth", out="run")))
    assert check_same_run(with_full_paths(tiny_run(init="a.pth"), run), run).init == f"{tmp_path}/a.pth"
    monkeypatch.chdir(run)
    with pytest.raises(UserError, match="another --init"):
        check_same_run(with_full_paths(tiny_run(init="../b.pth"), run), run)


def test_another_number_of_images_cannot_be_resumed(tiny_run: Make, tmp_path: Path) -> None:
    train(tiny_run(), tmp_path / "run")
    moved = tiny_run(data="shapes:count=41,size=32")
    with pytest.raises(UserError, match="another --data"):
        train(moved, tmp_path / "run")
    with pytest.raises(UserError, match="started with 40 images, found 41"):
        train(moved, tmp_path / "run", resume=True)


@pytest.mark.skipif(not os.environ.get("PIXMIM_LONG"), reason="the demo on two seeds takes minutes: make test-long")
@pytest.mark.parametrize("seed", [0, 1])
def test_the_demo_gains_ten_points(seed: int, tmp_path: Path) -> None:
    train(replace(get_recipe("demo"), seed=seed), tmp_path / "run")
    labeled = ("shapes:count=4000,seed=101,size=48", "shapes:count=2000,seed=102,size=48")
    before, after = (
        next(
            evaluate(
                str(tmp_path / "run"),
                [("linear", LinearSettings(*labeled))],
                tmp_path,
                untrained=untrained,
                device="cpu",
            )
        ).values["top1"]
        for untrained in (True, False)
    )
    assert after > before + 10
