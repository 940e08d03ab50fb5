"""Test runs that continue from weights: the frozen encoder, layer-wise rates, the measured start, the best encoder."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

import pixmim
from helpers.runs import equal, train
from pixmim.build import build_model
from pixmim.cli.pretrain import read_flags
from pixmim.config import ArchitectureConfig, OnlineKnnConfig, PretrainConfig
from pixmim.evaluation.best import MEASURES, Best, BestEncoder, read_best
from pixmim.recipes import get_recipe
from pixmim.training.checkpoint import CheckpointManager
from pixmim.training.metric_logger import read_metrics
from pixmim.utils.errors import UserError

Make = Callable[..., PretrainConfig]
LABELED = OnlineKnnConfig("shapes:count=30,size=32", "shapes:count=20,size=32,seed=1", every=0.4)  # every second step
FAST = {"batch_size": 8, "threads": 2, "device": "cpu", "precision": "fp32", "log_every": 1}


@pytest.fixture(scope="module")
def start(tiny_run: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an encoder without its decoder: the product of a run."""
    out = tmp_path_factory.mktemp("start") / "run"
    train(tiny_run(), out)
    return out / "encoder"


def adapted(start: Path, **changes: Any) -> PretrainConfig:
    """Twelve steps of five an epoch, two of which train only the decoder."""
    values = {
        **FAST,
        "steps": 12,
        "optim.decoder_warmup": 0.4,
        "optim.base_lr": 0.02,
        "data": "shapes:count=40,size=32",
    }
    return get_recipe("adapt", init=str(start), **(values | changes))


@pytest.fixture(scope="module")
def run(start: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[PretrainConfig, Path, str]:
    """Return the configuration, folder and output of a run with all checkpoints, measured every second step."""
    out = tmp_path_factory.mktemp("adapted") / "run"
    config = adapted(start, checkpoint={"every": 1, "keep_last": 99}, keep_best="knn", knn=vars(LABELED))
    return config, out, train(config, out)


def state_at(step: int, config: PretrainConfig, out: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """Return the model's tensors in the checkpoint of a step."""
    folder = scratch / str(step)
    shutil.copytree(out / "checkpoints" / f"step-{step:09d}", folder / f"step-{step:09d}")
    model = build_model(config)
    assert CheckpointManager(folder).load_model(model)[0] == step
    return dict(model.state_dict())


def test_the_encoder_is_frozen_while_its_new_decoder_warms_up_and_then_trained(
    run: tuple[PretrainConfig, Path, str], start: Path, tmp_path: Path
) -> None:
    config, out, text = run
    assert "after 2 steps that train only the decoder" in text
    source = load_file(start / "model.safetensors")
    before = build_model(config).state_dict()["decoder.predict.weight"]
    for step, frozen in ((1, True), (2, True), (4, False)):
        state = state_at(step, config, out, tmp_path)
        same = {name: torch.equal(state[f"encoder.{name}"], value) for name, value in source.items()}
        assert all(same.values()) if frozen else [n for n in same if same[n]] == ["pos_embed"], step
        assert not torch.equal(state["decoder.predict.weight"], before)
        before = state["decoder.predict.weight"]


@pytest.mark.parametrize("step", [1, 6])
def test_a_run_resumes_bitwise_in_the_warm_up_and_after_it_with_its_best_encoder(
    step: int, run: tuple[PretrainConfig, Path, str], tmp_path: Path
) -> None:
    """Resumed from an earlier step than its best encoder, a run ends with the same files as without interruption."""
    config, out, _ = run
    resumed, checkpoint = tmp_path / "resumed", f"checkpoints/step-{step:09d}"
    shutil.copytree(out / checkpoint, resumed / checkpoint)
    shutil.copytree(out / "encoder-best", resumed / "encoder-best")
    for name in ("config.json", "metrics.jsonl"):
        shutil.copy(out / name, resumed)
    train(config, resumed)
    assert equal(out, resumed)
    one, two = (folder / "encoder-best" / "model.safetensors" for folder in (out, resumed))
    assert one.read_bytes() == two.read_bytes()
    key = "knn/k20/mean/top1"
    one_curve, two_curve = ([m.get(key) for m in read_metrics(f / "metrics.jsonl")] for f in (out, resumed))
    assert one_curve == two_curve


def test_the_start_is_measured_like_evaluate_and_the_best_encoder_is_kept(
    run: tuple[PretrainConfig, Path, str], start: Path
) -> None:
    config, out, text = run
    lines = {line["step"]: line for line in read_metrics(out / "metrics.jsonl") if "knn/images" in line}
    assert list(lines) == [0, 2, 4, 6, 8, 10, 12] and lines[0]["knn/images"] == 20
    quiet = Console(quiet=True)
    labels: dict[str, Any] = {"train": LABELED.train, "test": LABELED.test, "console": quiet}
    labels |= {"device": "cpu", "precision": "fp32"}
    scores = pixmim.evaluate(str(start), "knn", **labels)
    names = ("k1/mean/top1", "k20/mean/top1", "k20/cls/top1", "k20/mean/balanced", "majority")
    assert [lines[0][f"knn/{name}"] for name in names] == [scores[name] for name in names]

    best = pixmim.PretrainResult(config, out, 12, True).best
    assert best is not None
    top1 = {step: line["knn/k20/mean/top1"] for step, line in lines.items()}
    assert best == Best("knn", max(top1.values()), min(step for step in top1 if top1[step] == max(top1.values())))
    assert pixmim.evaluate(str(out / "encoder-best"), "knn", **labels)["k20/mean/top1"] == best.value
    assert f"at step {best.step:,}" in text and "its start: k-NN top-1 (k20) on 20 images" in text


def test_measuring_and_keeping_change_nothing(
    run: tuple[PretrainConfig, Path, str], start: Path, tmp_path: Path
) -> None:
    train(adapted(start), tmp_path / "plain")
    assert equal(tmp_path / "plain", run[1])


def test_without_an_interval_the_start_and_the_end_are_measured(start: Path, tmp_path: Path) -> None:
    config = adapted(start, knn={"train": LABELED.train, "test": LABELED.test})
    train(config, tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "knn/images" in line] == [0, 12]
    assert not (tmp_path / "run" / "encoder-best").exists()
    with pytest.raises(UserError, match=r"--knn\.train and --knn\.test"):
        train(adapted(start, knn={"train": LABELED.train}), tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_best": "kn"}, "--keep-best kn is not a measure; did you mean 'knn'.* Known: knn, knn-balanced"),
        ({"keep_best": "knn"}, "--keep-best knn needs labeled data: pass --knn.train and --knn.test"),
    ],
)
def test_a_measure_that_the_run_does_not_take_is_refused(
    changes: dict[str, Any], message: str, start: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train(adapted(start, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_of_equal_measurements_the_first_is_kept_and_less_can_be_better(
    tiny_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = MEASURES["knn"]._replace(key="error/([0-9]+)", higher=False)
    monkeypatch.setitem(MEASURES, "error", error)
    config = tiny_run(keep_best="error")
    best = BestEncoder(config, tmp_path, 6, Console(quiet=True))
    encoder = torch.nn.Linear(2, 2)
    encoder.num_features = 2  # type: ignore[assignment]
    for step, value in enumerate([5.0, 4.0, 4.0, float("nan"), 7.0]):
        best.offer(step, {"error/9": 0.0, "error/10": value, "error/10/low": 0.0}, encoder)
    best.offer(9, {}, encoder)
    assert read_best(tmp_path) == ("error", 4.0, 1)
    with safe_open(tmp_path / "encoder-best" / "model.safetensors", "pt") as file:
        assert str(tmp_path) not in json.dumps(file.metadata())
    other = replace(config, knn=OnlineKnnConfig("shapes:count=3", "shapes:count=4"))  # other data do not compare
    BestEncoder(other, tmp_path, 6, Console(quiet=True)).offer(3, {"error/10": 6.0}, encoder)
    assert read_best(tmp_path) == ("error", 6.0, 3)


def test_a_full_disk_costs_a_warning(tiny_run: Make, tmp_path: Path) -> None:
    (tmp_path / "encoder-best").write_text("in the way")
    with (tmp_path / "log").open("w") as log:
        best = BestEncoder(tiny_run(keep_best="knn", knn=LABELED), tmp_path, 6, Console(file=log))
        best.offer(1, {"knn/k1/mean/top1": 5.0}, build_model(tiny_run()).encoder)
    assert "--keep-best cannot write" in (tmp_path / "log").read_text() and read_best(tmp_path) is None


def test_the_command_and_python_give_the_same_settings(start: Path, tmp_path: Path) -> None:
    words = [
        "adapt",
        "--init",
        str(start),
        "--data",
        "shapes:count=9",
        "--keep-best",
        "knn",
        "--optim.layer-decay",
        "0.5",
    ]
    from_python = get_recipe("adapt", init=start, data="shapes:count=9", keep_best="knn", **{"optim.layer_decay": 0.5})
    assert read_flags(words).config == from_python
    assert from_python.model == ArchitectureConfig(
        "mae", "vit_tiny_patch16_224", 128, 2, 4, options=from_python.model.options
    )
    with pytest.raises(UserError, match="--init FILE, RUN, timm:NAME or hf:NAME"):
        pixmim.pretrain(get_recipe("adapt", data="shapes:count=9"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_encoder_of_the_lowest_held_out_loss_is_kept(tiny_run: Make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--keep-best rankme needs .*--hold-out"):
        train(tiny_run(keep_best="rankme"), tmp_path / "run")
    train(tiny_run(keep_best="held-out-loss", hold_out=0.2, hold_out_every=0.4, epochs=2, steps=None), tmp_path / "run")
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    losses = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    assert len(losses) > 3 and read_best(tmp_path / "run") == (
        "held-out-loss",
        min(losses.values()),
        min(losses, key=losses.__getitem__),
    )
