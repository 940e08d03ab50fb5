"""Test that several processes train what one trains: DDP and FSDP2 over gloo, accumulation, resumed checkpoints."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from helpers import distributed_worker
from helpers.commands import Started
from helpers.models import CNNS, MAE, OTHERS
from pixmim.config import CheckpointConfig, MaskConfig, OnlineKnnConfig, OptimConfig, ParallelConfig, PretrainConfig
from pixmim.evaluation.best import read_best
from pixmim.pretraining import pretrain
from pixmim.training.distributed import find_rank
from pixmim.training.metric_logger import read_metrics
from pixmim.utils.errors import UserError
from pixmim.weights.load import load_encoder

STEPS, HALF = 8, 4
FSDP = ParallelConfig("fsdp")


def launch(ranks: int, jobs: list[dict[str, Any]], folder: Path) -> None:
    """Train the run of each job in turn, on several processes."""
    path = folder / f"jobs-{ranks}.json"
    path.write_text(json.dumps(jobs))
    Started(folder / f"{ranks}.txt", distributed_worker.main, str(path), ranks=ranks).end()


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(out / "metrics.jsonl") if "loss" in line]


def top1(out: Path) -> dict[int, float]:
    key = "knn/k20/mean/top1"
    return {line["step"]: line[key] for line in read_metrics(out / "metrics.jsonl") if key in line}


def product(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "encoder/model.safetensors")


def largest_difference(one: Path, other: Path) -> float:
    a, b = product(one), product(other)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_a_process_is_found_by_all_its_variables_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    torchrun, slurm = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")

    def found(*values: str, names: tuple[str, ...] = torchrun, address: str = "") -> tuple[int, int, int]:
        with monkeypatch.context() as patch:
            for name in (*torchrun, *slurm, "MASTER_ADDR"):
                patch.delenv(name, raising=False)
            for name, value in zip(names, values, strict=False):
                patch.setenv(name, value)
            if address:
                patch.setenv("MASTER_ADDR", address)
            world = find_rank()
            return world.rank, world.size, world.local

    alone = (0, 1, 0)
    assert found() == found("", "", "") == found("3") == found("0", "1") == alone
    assert found("5", "8", "1") == found("5", "8", "1", names=slurm, address="node0") == (5, 8, 1)
    assert found("5", "8", "1", names=slurm) == alone  # srun also numbers processes that have nothing in common
    assert found("5", "8", "1", "5", "8", names=(*slurm, "RANK", "WORLD_SIZE"), address="node0") == (5, 8, 1)
    for values in (("5", "8"), ("5", "8", ""), ("5", "many", "1")):
        with pytest.raises(UserError, match=r"RANK=5 WORLD_SIZE=\w+ LOCAL_RANK=.* torchrun, or set LOCAL_RANK"):
            found(*values)


UNEVEN = {"blocks": (OTHERS["vit"][0], 64)}
"""Models with masks that hide different numbers of patches."""


def make(**changes: Any) -> PretrainConfig:
    """Eight steps with a checkpoint after the fourth; an epoch ends after the fifth."""
    values: dict[str, Any] = {
        "data": "shapes:count=40,size=32",
        "steps": STEPS,
        "batch_size": 8,
        "size": "32",
        "precision": "fp32",
        "device": "cpu",
        "threads": 1,
        "log_every": 1,
        "checkpoint": CheckpointConfig(every=HALF, keep_last=9),
        "model": MAE,
        "optim": OptimConfig(base_lr=0.05, warmup=0.2),
    }
    return PretrainConfig(**(values | changes))


def other(name: str, **changes: Any) -> PretrainConfig:
    """Another model, for a few steps."""
    model, size = (OTHERS | UNEVEN)[name]
    mask = MaskConfig("beit-blocks", 0.4) if name in UNEVEN else MaskConfig()
    return make(model=model, size=str(size), steps=2, mask=mask, **changes)


def adapted(root: Path, **changes: Any) -> PretrainConfig:
    """A run from the encoder of the first one, with a new decoder, whose best encoder is kept."""
    optim = OptimConfig(base_lr=0.05, warmup=0.2, layer_decay=0.5, decoder_warmup=0.2)
    knn = OnlineKnnConfig("shapes:count=30,size=32", "shapes:count=20,size=32,seed=1", every=0.6)
    init = str(root / "one" / "encoder")
    return make(init=init, optim=optim, knn=knn, keep_best="knn", **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train runs on 1, 2 and 4 processes, some resumed by other numbers of them, each in the folder of its name."""
    root = tmp_path_factory.mktemp("several")

    def half_of(name: str) -> Path:
        return root / name / "checkpoints" / f"step-{HALF:09d}"

    def job(name: str, config: PretrainConfig, resume_from: str = "", poisoned: int | None = None) -> dict[str, Any]:
        return {
            "config": dataclasses.asdict(config),
            "out": str(root / name),
            "resume_from": str(half_of(resume_from)) if resume_from else "",
            "poisoned": poisoned,
        }

    pretrain(make(), root / "one", console=Console(quiet=True), report=False)
    pretrain(adapted(root), root / "adapted", console=Console(quiet=True), report=False)
    for name in OTHERS | UNEVEN:
        pretrain(other(name), root / name, console=Console(quiet=True), report=False)
    normed = make(model=CNNS["resnet"], size="64")
    pretrain(dataclasses.replace(normed, steps=1), root / "normed-1", console=Console(quiet=True), report=False)
    parts = dataclasses.replace(normed, accumulation_steps=2)
    pretrain(parts, root / "normed-parts", console=Console(quiet=True), report=False)
    four = [job("ddp-4", make()), job("fsdp-4", make(parallel=FSDP)), job("ddp-4-again", make(), resume_from="ddp-4")]
    launch(4, four, root)
    launch(
        2,
        [
            job("ddp-2", make()),
            job("fsdp-2", make(parallel=FSDP)),
            job("parts-2", make(accumulation_steps=3)),  # of 1, 1 and 2 images
            job("fsdp-parts-2", make(accumulation_steps=3, parallel=FSDP)),
            job("blocks-2", other("blocks", accumulation_steps=3)),
            job("recomputed-2", make(parallel=ParallelConfig(recompute=True))),
            job("fsdp-bf16", make(precision="bf16", parallel=FSDP)),
            job("poisoned", make(), poisoned=3),
            job("fsdp-poisoned", make(parallel=FSDP), poisoned=3),
            job("normed-poisoned", normed, poisoned=3),
            job("ddp-2-again", make(), resume_from="ddp-2"),
            job("fsdp-2-again", make(parallel=FSDP), resume_from="fsdp-2"),
            job("ddp-4-then-fsdp-2", make(parallel=FSDP), resume_from="ddp-4"),
            job("fsdp-4-then-ddp-2", make(), resume_from="fsdp-4"),
            job("adapted-fsdp", adapted(root, parallel=FSDP)),
            job("swin-ddp", other("swin")),
            job("normed-2", normed),
            job("normed-2-again", normed, resume_from="normed-2"),
            job("normed-1-of-2", dataclasses.replace(normed, steps=1)),
            *(job(f"{name}-fsdp", other(name, parallel=FSDP)) for name in OTHERS),
        ],
        root,
    )
    shutil.copytree(half_of("fsdp-4"), half_of("fsdp-4-then-one"))
    shutil.copy(root / "fsdp-4" / "config.json", root / "fsdp-4-then-one")
    pretrain(make(), root / "fsdp-4-then-one", console=Console(quiet=True), report=False)
    return root


@pytest.mark.parametrize("name", ["ddp-2", "fsdp-2", "parts-2", "fsdp-parts-2", "recomputed-2", "ddp-4", "fsdp-4"])
def test_any_number_of_processes_trains_what_one_trains(name: str, trained: Path) -> None:
    assert losses(trained / name) == pytest.approx(losses(trained / "one"), rel=2e-5)
    assert largest_difference(trained / name, trained / "one") < 1e-4


def test_several_processes_adapt_an_encoder_and_keep_the_best(trained: Path) -> None:
    assert losses(trained / "adapted-fsdp") == pytest.approx(losses(trained / "adapted"), rel=2e-5)
    assert largest_difference(trained / "adapted-fsdp", trained / "adapted") < 1e-4
    best, values = read_best(trained / "adapted-fsdp"), top1(trained / "adapted-fsdp")
    assert best is not None and best.value == max(values.values()) == values[best.step]
    load_encoder(trained / "adapted-fsdp" / "encoder-best")


def test_masks_of_several_sizes_have_their_weight_in_the_batch(trained: Path) -> None:
    assert losses(trained / "blocks-2") == pytest.approx(losses(trained / "blocks"), rel=2e-5)
    assert largest_difference(trained / "blocks-2", trained / "blocks") < 1e-4


@pytest.mark.parametrize("name", [*(f"{name}-fsdp" for name in OTHERS), "swin-ddp"])
def test_every_model_can_be_parallelized(name: str, trained: Path) -> None:
    assert losses(trained / name) == pytest.approx(losses(trained / name.split("-")[0]), rel=2e-4)


def test_fsdp_in_bf16_is_accurate(trained: Path) -> None:
    one, fsdp = (losses(trained / name) for name in ("one", "fsdp-bf16"))
    assert fsdp == pytest.approx(one, rel=5e-3)


def test_batch_norms_use_the_images_of_a_process_and_average_their_statistics(trained: Path) -> None:
    """Two processes are two parts of a batch; the first step's mean in the first norm is that of the full batch."""
    assert losses(trained / "normed-2") == pytest.approx(losses(trained / "normed-parts"), rel=1e-3)
    first = "conv1.1.running_mean"
    torch.testing.assert_close(product(trained / "normed-1-of-2")[first], product(trained / "normed-1")[first])


@pytest.mark.parametrize("name", ["ddp-2", "fsdp-2", "normed-2", "ddp-4"])
def test_the_same_number_of_processes_resumes_bitwise(name: str, trained: Path) -> None:
    assert largest_difference(trained / name, trained / f"{name}-again") == 0
    assert losses(trained / f"{name}-again") == losses(trained / name)[HALF:]


@pytest.mark.parametrize("name", ["fsdp-4-then-one", "fsdp-4-then-ddp-2", "ddp-4-then-fsdp-2"])
def test_another_number_of_processes_resumes_a_run(name: str, trained: Path) -> None:
    assert losses(trained / name) == pytest.approx(losses(trained / "one")[HALF:], rel=2e-5)
    assert largest_difference(trained / name, trained / "one") < 1e-4


@pytest.mark.parametrize("name", ["poisoned", "fsdp-poisoned", "normed-poisoned"])
def test_a_bad_gradient_on_one_process_is_skipped_on_all(name: str, trained: Path) -> None:
    lines = list(read_metrics(trained / name / "metrics.jsonl"))
    assert [line["skipped_steps"] for line in lines] == [0, 0, 0, 1, 1, 1, 1, 1]
    other = trained / ("normed-2" if name == "normed-poisoned" else "one")
    assert losses(trained / name)[:3] == pytest.approx(losses(other)[:3], rel=2e-5)
    assert all(torch.isfinite(value).all() for value in product(trained / name).values())
    assert largest_difference(trained / name, other) > 1e-3  # a step is missing


def test_checkpoints_of_several_processes_are_written_by_several(trained: Path) -> None:
    for name, files in (("one", 1), ("ddp-2", 2), ("fsdp-4", 4)):
        assert len(list((trained / name / "checkpoints" / f"step-{HALF:09d}").glob("*.safetensors"))) == files
