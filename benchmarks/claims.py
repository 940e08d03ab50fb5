"""Test the paper's claims at a small scale: train each arm, and measure it on its way and at its end.

python benchmarks/claims.py --objects FOLDER --out claims             all runs that are not finished; resumes
python benchmarks/claims.py --objects FOLDER --out claims --limit 1   only the next one
python benchmarks/claims.py --out claims --table                      docs/claims.md and its figure, from what is there

FOLDER holds caltech101-{train,test}.tar and imagewoof-{train,val}.tar: labeled WebDataset shards, aspect kept. Each run
is a process of its own and writes one JSON file to `--out`. A run that is killed resumes; a finished one is skipped.
"""

import argparse
import hashlib
import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from runs import Record, add_arguments, measure, work_off

import pixmim
from pixmim.build import build_crop, build_model
from pixmim.config_io import flatten
from pixmim.evaluation.annotations import read_objects
from pixmim.evaluation.frozen_encoder import encoder_from_module, load_frozen_encoder
from pixmim.evaluation.object_coverage import sampled_coverage
from pixmim.evaluation.results import versions
from pixmim.evaluation.settings import (
    AttentiveSettings,
    FinetuneOverrides,
    KnnSettings,
    LinearSettings,
    RobustnessSettings,
    ShapeBiasSettings,
)


@dataclass(frozen=True)
class Scale:
    """Sizes of all runs, chosen before any result."""

    size: int
    patch: int
    width: int
    depth: int
    heads: int
    batch: int
    steps: int
    curve: tuple[int, ...]  # steps at which an encoder is measured by k-NN and the linear probe only
    points: tuple[int, ...]  # steps at which it is measured by everything, as at the start; the last is the end
    shapes: tuple[int, int, int]  # drawn images to train on, to test on, and of each kind for shape bias
    probes: tuple[int, int]  # epochs of the linear and of the attentive probe
    supervised_epochs: float
    tiny: bool = False  # every data set is drawn


SCALES = {
    "cpu": Scale(48, 8, 128, 6, 4, 128, 900, (225,), (450, 900), (5000, 2000, 1000), (30, 15), 20),
    "gpu": Scale(128, 16, 384, 12, 6, 256, 4500, (1125,), (2250, 4500), (50000, 5000, 2000), (30, 15), 100),
    "tiny": Scale(16, 4, 16, 1, 2, 8, 4, (2,), (4,), (24, 12, 12), (1, 1), 1, tiny=True),
}

SEEDS = (0, 1, 2)
"""Seeds of weights, order, crops and masks. Arms are compared at equal seeds."""

RADII = (5, 10, 15, 20, 30)
"""Cut-offs at 224 px, scaled to the size of the runs. 40 is the arm "target", no filter the arm "mae"."""

ARMS: dict[str, dict[str, Any]] = {
    "mae": {},
    "target": {"target.kind": "low-frequency"},
    "crop": {"crop.kind": "simple-resized"},
    "both": {"target.kind": "low-frequency", "crop.kind": "simple-resized"},
    **{f"radius-{r}": {"target.kind": "low-frequency", "target.radius": r} for r in RADII},
}
"""What differs from MAE, and nothing else: `check_arms`."""

SUPERVISED: dict[str, dict[str, Any]] = {"rrc": {}, "src": {"crop": "simple-resized"}}
"""What differs from supervised training with DeiT III's recipe and MAE's crop."""

DATA = {
    "caltech101": ("{objects}/caltech101-train.tar", "{objects}/caltech101-test.tar", "0.8"),
    "imagewoof": ("{objects}/imagewoof-train.tar", "{objects}/imagewoof-val.tar", "0.5"),
    "shapes": ("shapes:count={train},seed=11,size={size}", "shapes:count={test},seed=12,size={size}", "0.75"),
}
"""Train and test images, and which share of the test images is not corrupted."""

SETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "caltech101": ("caltech101", ("mae", "target", "crop", "both")),
    "imagewoof": ("imagewoof", ("mae", "target", "crop", "both")),
    "shapes": ("shapes", ("mae", "target", "crop", "both")),
    "radius": ("caltech101", tuple(f"radius-{r}" for r in RADII)),
    "supervised": ("caltech101", tuple(SUPERVISED)),
    "coverage": ("shapes", ("coverage",)),
}
"""Data and arms, in the order in which they are run: seed by seed."""

LABELED = 0.5
"""Share of the train images that probes and k-NN take labels of."""

SEVERITY = 3
"""Severity of the fifteen corruptions."""

DRAWS = 20
"""Crops of each object, for its coverage."""


@dataclass(frozen=True)
class Run:
    """One training."""

    data: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.data}-{self.arm}-{self.seed}"


def plan(only: Collection[str] = tuple(SETS)) -> list[Run]:
    """Return the runs of some sets, in order."""
    return [Run(SETS[name][0], arm, seed) for name in SETS if name in only for seed in SEEDS for arm in SETS[name][1]]


def sources(data: str, scale: Scale, objects: str) -> dict[str, str]:
    """Return the images to train on, those with labels for probes, to test on, to corrupt, and for shape bias."""
    train, test, clean = DATA["shapes" if scale.tiny else data]
    counts = {"train": scale.shapes[0], "test": scale.shapes[1], "size": scale.size, "objects": objects}
    drawn = f"count={scale.shapes[2]},size={scale.size}"
    return {
        "train": train.format(**counts),
        "labeled": f"split:train,share={LABELED}:{train.format(**counts)}",
        "test": test.format(**counts),
        "corrupt": f"split:test,share={clean}:{test.format(**counts)}",
        "match": f"shapes:{drawn},seed=13,texture=match",
        "conflict": f"shapes:{drawn},seed=14,texture=conflict",
    }


def pretrain_config(run: Run, scale: Scale, objects: str, device: str = "auto") -> pixmim.PretrainConfig:
    """Return the configuration of a pre-training run: MAE's values, but for those of the arm."""
    arm = dict(ARMS[run.arm])
    if "target.radius" in arm:
        arm["target.radius"] *= scale.size / 224
    options = {"patch_size": scale.patch, "embed_dim": scale.width, "depth": scale.depth, "num_heads": scale.heads}
    mae = {"crop.kind": "random-resized", "target.kind": "pixels"}
    return pixmim.get_recipe(
        "pixmim-vit-tiny",
        data=sources(run.data, scale, objects)["train"],
        size=str(scale.size),
        steps=scale.steps,
        batch_size=scale.batch,
        seed=run.seed,
        device=device,
        cache_images="ram",
        model={"options": options, "decoder_dim": scale.width // 2},
        optim={"warmup": 3.0},
        checkpoint={"every": max(1, scale.steps // 9), "keep_last": 1},
        **mae | arm,
    )


def finetune_changes(run: Run, scale: Scale) -> FinetuneOverrides:
    """Return what differs from DeiT III's recipe: the length, a batch and a rate for it, and the arm's crop."""
    common: dict[str, Any] = {
        "epochs": scale.supervised_epochs,
        "batch_size": scale.batch,
        "base_lr": 6e-3,
        "drop_path": 0.0,
    }
    return FinetuneOverrides(**common | {"crop": "random-resized"} | SUPERVISED[run.arm])


def differences(first: Any, second: Any) -> set[str]:
    """Return the dotted names of the values that differ between two configurations."""
    a, b = (dict(flatten(asdict(config))) for config in (first, second))
    return {name for name in a | b if a.get(name) != b.get(name)}


def check_arms(scale: Scale, objects: str) -> None:
    """Raise ValueError unless arms differ in exactly the named values, and seeds in the seed."""
    for run in plan():
        if run.arm == "coverage":
            continue
        if run.arm in SUPERVISED:
            found = differences(*(finetune_changes(replace(run, arm=arm), scale) for arm in ("rrc", run.arm)))
            named = set(SUPERVISED[run.arm])
        else:
            first = replace(run, arm="mae", seed=SEEDS[0])
            found = differences(*(pretrain_config(one, scale, objects) for one in (first, run)))
            named = set(ARMS[run.arm]) | ({"seed"} if run.seed != SEEDS[0] else set())
        if found != named:
            raise ValueError(f"{run.name} differs in {sorted(found)} instead of {sorted(named)}")


def evaluations(data: Mapping[str, str], scale: Scale, everything: bool) -> list[tuple[str, Any]]:
    """Return the evaluations of an encoder with their settings: at some steps k-NN and the linear probe only."""
    linear, attentive = scale.probes
    train, test, corrupt = data["labeled"], data["test"], data["corrupt"]
    parts: list[tuple[str, Any]] = [
        ("knn", KnnSettings(train, test, k=(20,))),
        ("linear", LinearSettings(train, test, epochs=linear)),
    ]
    if everything:
        robustness = RobustnessSettings(
            train=train, test=corrupt, severities=(SEVERITY,), epochs=linear, classifier="probe"
        )
        parts += [
            ("attentive", AttentiveSettings(train, test, epochs=attentive, queries=16)),
            ("robustness", robustness),
            ("shape-bias", ShapeBiasSettings(data["conflict"], data["match"], epochs=linear)),
        ]
    return parts


def pretrain_and_measure(run: Run, scale: Scale, objects: str, out: Path, device: str) -> None:
    """Train to each point in turn and measure the encoder there. The start is measured once for all arms of a seed."""
    config, work = pretrain_config(run, scale, objects, device), out / "work" / run.name
    data = sources(run.data, scale, objects)
    record = Record(
        out / f"{run.name}.json", {"config": asdict(config), "scale": asdict(scale), "sources": data}, objects
    )
    encoder = encoder_from_module(config, build_model(config).encoder, device, "auto")
    digest = hashlib.sha256(b"".join(v.cpu().numpy().tobytes() for v in encoder.module.state_dict().values()))
    images = {name: len(pixmim.open_dataset(spec)) for name, spec in data.items()}
    record.save(start=digest.hexdigest(), versions=versions(), images=images)
    start = Record(out / f"start-{run.data}-{run.seed}.json", {"start": digest.hexdigest(), "sources": data}, objects)
    if not start.values["finished"]:
        start.save(points={"0": measure(encoder, evaluations(data, scale, True))}, finished=True)
    for point in sorted(scale.curve + scale.points):
        if str(point) in record.values["points"]:
            continue
        began = time.perf_counter()
        if newest_step(work) < point:
            pause = partial(stop_at, point, scale.steps)
            pixmim.pretrain(config, work, report=False, console=Console(quiet=True), on_step_end=pause)
        if newest_step(work) < point:
            raise KeyboardInterrupt
        trained = time.perf_counter()
        encoder = load_frozen_encoder(str(work), device=device)
        values = measure(encoder, evaluations(data, scale, point in scale.points))
        times = {"train_seconds": round(trained - began, 1), "test_seconds": round(time.perf_counter() - trained, 1)}
        lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
        loss = [line["loss"] for line in lines if "loss" in line and line["step"] <= point]
        record.save(points=record.values["points"] | {str(point): values | times | {"loss": loss[-1]}})
    record.save(finished=True)
    shutil.rmtree(work)


def stop_at(point: int, last: int, step: int) -> None:
    """Interrupt a run after a step, as Ctrl-C does: it saves a checkpoint, and the next call resumes from it."""
    if step == point < last:
        signal.raise_signal(signal.SIGINT)


def newest_step(folder: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoints/step-*")), default=0)


def train_supervised(run: Run, scale: Scale, objects: str, out: Path, device: str) -> None:
    """Train from random weights with labels, by DeiT III's recipe."""
    config = pretrain_config(replace(run, arm="mae"), scale, objects, device)
    changes, data, work = finetune_changes(run, scale), sources(run.data, scale, objects), out / "work" / run.name
    settings = {"config": asdict(config), "changes": asdict(changes), "scale": asdict(scale), "sources": data}
    record = Record(out / f"{run.name}.json", settings, objects)
    encoder: Any = build_model(config).encoder
    encoder.pixmim_config = config
    began = time.perf_counter()
    values = pixmim.evaluate(
        encoder,
        "finetune",
        out=work,
        device=device,
        console=Console(quiet=True),
        train=data["train"],
        test=data["test"],
        recipe="deit3-vit-base",
        from_scratch=True,
        seed=run.seed,
        changes=changes,
    )
    kept = {f"finetune/{k}": v for k, v in values.items() if "recall" not in k}
    point = kept | {"train_seconds": round(time.perf_counter() - began, 1)}
    record.save(points={str(scale.steps): point}, versions=versions(), finished=True)
    shutil.rmtree(work)


def measure_crops(run: Run, scale: Scale, objects: str, out: Path, device: str) -> None:
    """Measure how much of a drawn object the crops of the arms keep, by crops sampled as in training."""
    crops = {
        name: build_crop(pretrain_config(replace(run, arm=arm), scale, objects))
        for name, arm in (("rrc", "mae"), ("src", "crop"))
    }
    data = sources(run.data, scale, objects)
    record = Record(
        out / f"{run.name}.json", {"crops": {k: repr(v) for k, v in crops.items()}, "sources": data}, objects
    )
    drawn, _ = read_objects(data["test"])
    values = {
        name: 100
        * sum(sampled_coverage(one, crop, DRAWS, run.seed, i).mean() for i, one in enumerate(drawn))
        / len(drawn)
        for name, crop in crops.items()
    }
    record.save(points={"0": values}, versions=versions(), finished=True)


def execute(run: Run, scale: Scale, objects: str, out: Path, device: str) -> None:
    """Execute or resume one run."""
    others: dict[str, Callable[..., None]] = dict.fromkeys(SUPERVISED, train_supervised)
    function = (others | {"coverage": measure_crops}).get(run.arm, pretrain_and_measure)
    function(run, scale, objects, out, device)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, SCALES)
    parser.add_argument("--only", nargs="+", choices=SETS, default=list(SETS), help="sets to run")
    parser.add_argument("--page", type=Path, default=Path(__file__).parents[1] / "docs" / "claims.md")
    options = parser.parse_args(arguments)
    scale, out = SCALES[options.scale], options.out
    if options.table:
        import claims_page

        print(claims_page.write(out, scale, options.page))
        return 0
    objects = options.objects
    check_arms(scale, objects)
    runs = {run.name: run for run in plan()}
    names = [run.name for run in plan(tuple(options.only))]
    return work_off(names, lambda name: execute(runs[name], scale, objects, out, options.device), options, __file__)


if __name__ == "__main__":
    sys.exit(main())
