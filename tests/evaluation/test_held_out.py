"""Held-out images: loss and effective rank against slow formulas, without an effect on training."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import distributed_worker
from helpers.commands import Started
from helpers.runs import equal, train
from pixmim import cli, pretraining
from pixmim.build import build_crop, build_loss, build_mask_sampler, build_model, image_spec
from pixmim.config import CheckpointConfig, CropConfig, MaskConfig, OnlineKnnConfig, ParallelConfig, PretrainConfig
from pixmim.data import open_dataset
from pixmim.data.split import hold_out
from pixmim.evaluation.held_out import measure_every, rankme
from pixmim.models import features
from pixmim.report import write_report
from pixmim.training.checkpoint import CheckpointManager
from pixmim.training.metric_logger import read_metrics
from pixmim.utils.errors import UserError

Make = Callable[..., PretrainConfig]


def measured(out: Path) -> dict[int, tuple[float, float]]:
    """Return held-out loss and effective rank by step."""
    lines = read_metrics(out / "metrics.jsonl")
    return {line["step"]: (line["held_out_loss"], line["rankme"]) for line in lines if "rankme" in line}


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (300, 64)])
def test_rankme_is_that_of_numpy(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(0).normal(size=shape) * np.geomspace(1, 1e-4, shape[1])
    s = np.linalg.svd(x, compute_uv=False)
    p = s / np.abs(s).sum() + 1e-7
    assert rankme(torch.from_numpy(x)) == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-12)


def test_rankme_counts_directions() -> None:
    assert rankme(torch.eye(8)) == pytest.approx(8, abs=1e-4)
    assert rankme(torch.ones(8, 5)) == pytest.approx(1, abs=1e-3)
    assert rankme(torch.zeros(8, 5)) == pytest.approx(1, abs=1e-3)
    assert rankme(torch.eye(8).repeat(3, 1)) == pytest.approx(8, abs=1e-4)


@pytest.mark.parametrize("mask", [MaskConfig(), MaskConfig("beit-blocks", 0.4)])
def test_the_values_are_those_of_a_slow_loop(mask: MaskConfig, tiny_run: Make, tmp_path: Path) -> None:
    """Image by image in float64: the center crop, the masks of step -2, the mean over all hidden patches."""
    model = {"name": "simmim", "backbone": "vit_tiny_patch16_224"} if mask.kind != "random" else {}
    config = tiny_run(steps=3, hold_out=0.3, mask=mask, crop=CropConfig("center"))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **model))
    train(config, tmp_path / "run")
    _, held = hold_out(open_dataset(config.data, image_spec(config)), 0.3, config.seed)
    net, criterion = build_model(config), build_loss(config).double()
    CheckpointManager(tmp_path / "run" / "checkpoints").load_model(net)
    net.double().eval()
    masks, crop = build_mask_sampler(config, net.patch), build_crop(config)
    mean, std = (torch.tensor(values).double().view(-1, 1, 1) for values in config.normalization)
    total, hidden, vectors = 0.0, 0, []
    for row in range(len(held)):
        image = ((crop.crop(held.image(row)).double() / 255 - mean) / std)[None]
        mask_of_row = masks(-2, [row])
        with torch.no_grad():
            result = criterion(net(image, mask_of_row), image, mask_of_row)
            vectors.append(features(net.encoder, image).mean[0].numpy())
        total += float(result.per_patch[mask_of_row.hidden].sum())
        hidden += int(mask_of_row.hidden.sum())
    s = np.linalg.svd(np.stack(vectors), compute_uv=False)
    p = s / s.sum() + 1e-7
    assert len(held) == 12
    assert measured(tmp_path / "run")[3] == pytest.approx((total / hidden, math.exp(-(p * np.log(p)).sum())), rel=1e-4)


def test_measuring_changes_nothing_and_trains_without_the_images(
    tiny_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_run(steps=10, hold_out=0.2, hold_out_every=0.5)
    text = train(config, tmp_path / "often")
    assert "32 images; 10 steps" in text and "8 images are held out" in text and ", held out " in text
    assert list(measured(tmp_path / "often")) == [0, 2, 4, 6, 8, 10]  # an epoch has four steps
    monkeypatch.setattr(pretraining, "online_held_out", lambda *_: lambda model: {})
    train(config, tmp_path / "never")
    assert measured(tmp_path / "never") == {} and equal(tmp_path / "often", tmp_path / "never")
    train(tiny_run(steps=10), tmp_path / "all")
    assert not equal(tmp_path / "often", tmp_path / "all")


def test_a_resumed_run_measures_bitwise_the_same(tiny_run: Make, tmp_path: Path) -> None:
    knn = OnlineKnnConfig("shapes:count=30,size=32", "shapes:count=20,size=32,seed=1", every=1.5)
    config = tiny_run(
        steps=12, hold_out=0.2, hold_out_every=1.0, knn=knn, checkpoint=CheckpointConfig(every=6, keep_last=9)
    )
    train(config, tmp_path / "full")
    half = "checkpoints/step-000000006"
    shutil.copytree(tmp_path / "full" / half, tmp_path / "resumed" / half)
    shutil.copy(tmp_path / "full" / "config.json", tmp_path / "resumed")
    train(config, tmp_path / "resumed")
    full, resumed = measured(tmp_path / "full"), measured(tmp_path / "resumed")
    assert list(full) == [0, 4, 8, 12] and resumed == {step: full[step] for step in (8, 12)}
    knn_steps = [line["step"] for line in read_metrics(tmp_path / "full/metrics.jsonl") if "knn/majority" in line]
    assert knn_steps == [0, 6, 12]
    with pytest.raises(UserError, match="another --hold-out"):
        train(dataclasses.replace(config, hold_out=0.3), tmp_path / "full")


def test_several_ranks_measure_what_one_measures(tiny_run: Make, tmp_path: Path) -> None:
    """The first measurement is of equal weights, so it is bitwise equal: ranks share the same batches."""
    config = tiny_run(steps=4, hold_out=0.5, hold_out_every=1.0, threads=1, batch_size=4)
    jobs: list[dict[str, Any]] = [
        {
            "config": dataclasses.asdict(dataclasses.replace(config, parallel=ParallelConfig(strategy))),
            "out": str(tmp_path / strategy),
            "resume_from": "",
            "poisoned": None,
        }
        for strategy in ("ddp", "fsdp")
    ]
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    Started(tmp_path / "out.txt", distributed_worker.main, str(tmp_path / "jobs.json"), ranks=2).end()
    train(config, tmp_path / "one")
    one = measured(tmp_path / "one")
    for strategy in ("ddp", "fsdp"):
        several = measured(tmp_path / strategy)
        assert several.keys() == one.keys() and several[0] == one[0]
        assert several[4] == pytest.approx(one[4], rel=1e-4)


def test_unreadable_images_are_counted(tiny_run: Make, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(12):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 40, 3), np.uint8)).save(folder / f"{i:02}.png")
    _, held = hold_out(open_dataset(str(folder)), 0.4, 0)
    Path(held.path_of(1)).write_bytes(b"")
    text = train(tiny_run(data=str(folder), hold_out=0.4, steps=2), tmp_path / "run")
    assert "1 of the 5 held-out images cannot be read" in text and list(measured(tmp_path / "run")) == [0, 1, 2]
    for i in range(len(held)):
        Path(held.path_of(i)).write_bytes(b"")
    with pytest.raises(UserError, match="--max-bad-fraction"):
        train(tiny_run(data=str(folder), hold_out=0.4), tmp_path / "none")
    with pytest.raises(UserError, match="5 images that --hold-out keeps can be read"):
        train(tiny_run(data=str(folder), hold_out=0.4, max_bad_fraction=1.0), tmp_path / "allowed")


def test_the_interval_is_a_fiftieth_of_the_run_and_an_epoch_at_least(tiny_run: Make) -> None:
    assert measure_every(tiny_run(), steps=1000, epoch=0.1) == 20  # 100 epochs
    assert measure_every(tiny_run(), steps=200, epoch=0.1) == 10
    assert measure_every(tiny_run(hold_out_every=5.0), steps=200, epoch=0.1) == 50


def test_the_report_draws_the_curves(tiny_run: Make, tmp_path: Path) -> None:
    train(tiny_run(hold_out=0.2, log_every=2), tmp_path / "run")
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    assert "run, held out" in page and "over-fitting" in page and "RankMe" in page
    train(tiny_run(log_every=2), tmp_path / "plain")
    assert "over-fitting" not in write_report([tmp_path / "plain"], tmp_path / "plain.html").read_text()


def test_a_share_of_more_than_half_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pretrain", "demo", "--hold-out", "0.6"]) == 1
    assert "--hold-out" in capsys.readouterr().err
