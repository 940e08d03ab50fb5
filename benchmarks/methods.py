"""Train every method, plain and with PixMIM, at a small size, and measure what it learned against its own start.

python benchmarks/methods.py --objects FOLDER --out runs/methods            all runs that are not finished; resumes
python benchmarks/methods.py --objects FOLDER --out runs/methods --limit 1  only the next one
python benchmarks/methods.py --out runs/methods --table                     the table of docs/methods.md

FOLDER holds caltech101-{train,test}.tar: labeled WebDataset shards, aspect kept.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from runs import (
    Record,
    add_arguments,
    is_finished,
    measure,
    peak_memory,
    plus_minus,
    replace_generated,
    reset_peak_memory,
    table,
    work_off,
)
from scipy import stats

import pixmim
from pixmim.build import build_model
from pixmim.evaluation.frozen_encoder import encoder_from_module, load_frozen_encoder
from pixmim.evaluation.results import versions
from pixmim.evaluation.settings import AttentiveSettings, KnnSettings, LinearSettings
from pixmim.recipes import with_pixmim


@dataclass(frozen=True)
class Scale:
    """Sizes of all runs."""

    data: tuple[str, str, str]  # to train on, with labels for k-NN and probes, to test on
    size: int
    batch: int
    steps: int
    warmup: float  # epochs
    probes: tuple[int, int]  # epochs of the linear and of the attentive probe


_TRAIN = "{objects}/caltech101-train.tar"
_SHAPES = "shapes:count=48,seed=11,size=64"
SCALES = {
    "cpu": Scale(
        (_TRAIN, f"split:train,share=0.5:{_TRAIN}", "{objects}/caltech101-test.tar"), 64, 64, 900, 2, (30, 15)
    ),
    "tiny": Scale((_SHAPES, _SHAPES, "shapes:count=12,seed=12,size=64"), 64, 4, 2, 0.1, (1, 1)),
}

SEEDS = (0, 1, 2)

VIT = {"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}
DECODER = {"decoder_dim": 64, "decoder_depth": 2, "decoder_heads": 4}
MAE: dict[str, Any] = {"model": {"backbone": "vit_tiny_patch16_224", "options": VIT, **DECODER}}
BLOCKS = {"mask.block_size": 16}  # two patches of 8; at 224 px the methods' blocks are of two or four patches of 16
CNN = {"size": "96"}  # nine blocks of 32 px, the stride of these networks


def _simmim(backbone: str, **options: Any) -> dict[str, Any]:
    return BLOCKS | {"model": {"backbone": backbone, "options": options}}


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "MAE": ("mae-vit-base-300", MAE),
    "MAE, 32 and 48 px first": ("mae-vit-base-300", MAE | {"first_sizes": "32,48"}),
    "LSMAE": ("lsmae-base-448", MAE | BLOCKS),
    "MFF": ("mff-vit-base-300", MAE | {"crop.kind": "random-resized", "crop.interpolation": "bicubic"}),
    "ColorMAE, green noise": ("colormae-vit-base-300", MAE),
    "CrossMAE": ("crossmae-vit-base", MAE),
    "Pixio": ("pixio-vit-huge", MAE | BLOCKS | {"crop.flip": 0.5}),
    "ConvMAE-tiny": ("convmae-base", {"model": {"backbone": "convmae_tiny", **DECODER}}),
    "SimMIM, ViT": ("simmim-vit-base", _simmim("beit_base_patch16_224", **VIT) | {"optim.schedule": "cosine"}),
    "SimMIM, Swin": ("simmim-swin-base", _simmim("swin_tiny_patch4_window7_224", embed_dim=48, window_size=4)),
    "SimMIM, ConvNeXt": ("simmim-convnext-base", CNN | {"model.backbone": "convnext_atto"}),
    "SimMIM, ResNet": ("simmim-resnet50", CNN | {"model.backbone": "resnet10t"}),
}
"""Recipe, and what differs from it: a small model, and blocks of its patches. Length, rate and crop are common."""

MEASURES = {"knn/mean/top1": "k-NN", "linear/top1": "linear probe", "attentive/top1": "attentive probe"}


BEGIN, END = "<!-- table: written by `make methods-page` -->", "<!-- end of the table -->"


def slug(method: str) -> str:
    return method.lower().replace(",", "").replace(" ", "-")


def plan() -> dict[str, tuple[str, bool, int]]:
    """Return method, whether it is with PixMIM, and seed of each run, by name and in order."""
    runs = [(method, pixmim_form, seed) for seed in SEEDS for method in METHODS for pixmim_form in (False, True)]
    return {
        f"{slug(method)}-{'pixmim' if form else 'plain'}-{seed}": (method, form, seed) for method, form, seed in runs
    }


def pretrain_config(method: str, pixmim_form: bool, seed: int, scale: Scale, objects: str, device: str = "auto") -> Any:
    """Return the configuration of a run: the method's recipe at the common size, length, rate and crop."""
    recipe, changes = METHODS[method]
    config = pixmim.get_recipe(
        recipe,
        data=scale.data[0].format(objects=objects),
        steps=scale.steps,
        batch_size=scale.batch,
        seed=seed,
        device=device,
        cache_images="ram",
        **{"size": str(scale.size), "crop.scale": (0.2, 1.0), "optim.warmup": scale.warmup}
        | {"optim.base_lr": 2e-3, "optim.clip": 5.0}
        | changes,
    )
    if not pixmim_form:
        return config
    changed = with_pixmim(config)
    return replace(changed, crop=replace(changed.crop, interpolation=config.crop.interpolation))


def execute(name: str, scale: Scale, objects: str, out: Path, device: str) -> None:
    """Train a run to its end, or on from its newest checkpoint, and measure it. Its start is measured once for both."""
    method, pixmim_form, seed = plan()[name]
    config = pretrain_config(method, pixmim_form, seed, scale, objects, device)
    data, work = [one.format(objects=objects) for one in scale.data], out / "work" / name
    _, labeled, test = data
    linear, attentive = scale.probes
    parts: list[tuple[str, Any]] = [
        ("knn", KnnSettings(labeled, test, k=(20,))),
        ("linear", LinearSettings(labeled, test, epochs=linear)),
        ("attentive", AttentiveSettings(labeled, test, epochs=attentive, queries=16)),
    ]
    record = Record(out / f"{name}.json", {"config": asdict(config), "sources": data}, objects)
    began = time.process_time()
    reset_peak_memory()
    result = pixmim.pretrain(config, work, report=False, console=Console(quiet=True))
    seconds = record.values.get("processor_seconds", 0.0) + time.process_time() - began
    memory = max(record.values.get("memory_mb", 0.0), peak_memory())
    record.save(processor_seconds=seconds, memory_mb=memory)  # an interrupted run goes on from these
    if not result.finished:
        raise KeyboardInterrupt
    losses = [line["loss"] for line in result.metrics if "loss" in line]
    start = Record(out / f"start-{slug(method)}-{seed}.json", {"model": asdict(config.model), "sources": data}, objects)
    if not start.values["finished"]:
        encoder = encoder_from_module(config, build_model(config).encoder, device, "auto")
        parameters = sum(weight.numel() for weight in encoder.module.parameters())
        start.save(points={"0": measure(encoder, parts)}, parameters=parameters, finished=True)
    values = measure(load_frozen_encoder(str(work), device=device), parts)
    values |= {"processor_seconds": round(seconds, 1), "memory_mb": round(memory)}
    values |= {"first_loss": losses[0], "last_loss": losses[-1]}
    images = [len(pixmim.open_dataset(one)) for one in data]
    record.save(points={str(scale.steps): values}, versions=versions(), images=images, finished=True)
    shutil.rmtree(work)


def interval(values: Sequence[float]) -> str:
    """Return a mean over seeds and half of its 95 % interval (Student's t) as text."""
    mean, n = float(np.mean(values)), len(values)
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5)
    return plus_minus(mean, half)


def tables(out: Path, scale: Scale) -> list[str]:
    """Return what each method learned, what PixMIM changed, and what a run cost, of methods with two or more seeds."""

    def points(name: str) -> dict[str, float]:
        record = json.loads((out / f"{name}.json").read_text())
        return record | next(iter(record["points"].values()))

    learned, changed = [], []
    for method in METHODS:
        name = slug(method)
        runs = [(f"{name}-plain-{seed}", f"{name}-pixmim-{seed}", f"start-{name}-{seed}") for seed in SEEDS]
        complete = [list(map(points, of)) for of in runs if all(is_finished(one, out) for one in of)]
        if len(complete) < 2:
            continue
        plain, pixmim_form, start = zip(*complete, strict=True)
        first = plain[0]
        title = method if len(complete) == len(SEEDS) else f"{method} ({len(complete)} seeds)"
        row = [title, f"{start[0]['parameters'] / 1e6:.1f} M"]
        row += [
            f"{np.mean([one['first_loss'] for one in plain]):.2f}, {np.mean([one['last_loss'] for one in plain]):.2f}"
        ]
        for key in MEASURES:
            before = np.mean([one[key] for one in start])
            gains = [[a[key] - b[key] for a, b in zip(form, start, strict=True)] for form in (plain, pixmim_form)]
            row += [f"{before:.1f}", *map(interval, gains)]
        epochs = scale.steps * scale.batch / first["images"][0]
        learned.append(row)
        effects = [interval([a[key] - b[key] for a, b in zip(pixmim_form, plain, strict=True)]) for key in MEASURES]
        cost = [
            f"{np.median([one['processor_seconds'] for one in form]) / epochs:.0f}" for form in (plain, pixmim_form)
        ]
        changed.append([title, *effects, *cost, f"{np.median([one['memory_mb'] for one in plain]):.0f}"])
    names = plan()
    done = f"**{sum(is_finished(name, out) for name in names)} of {len(names)} runs are finished.**"
    if not learned:
        return [f"{done} A method has a row when two of its seeds are complete."]
    titles = [word for title in MEASURES.values() for word in (f"{title}: start", "plain", "with PixMIM")]
    return [
        done,
        "",
        *table(["method", "encoder", "loss: first, last", *titles], learned),
        "",
        "What PixMIM changed, and the cost:",
        "",
        *table(["method", *MEASURES.values(), "s an epoch, plain", "with PixMIM", "memory, MB"], changed),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, SCALES)
    parser.add_argument("--page", type=Path, default=Path(__file__).parents[1] / "docs" / "methods.md")
    options = parser.parse_args(arguments)
    scale, out = SCALES[options.scale], options.out
    if options.table:
        replace_generated(options.page, BEGIN, END, "\n".join(["", *tables(out, scale), ""]))
        return 0
    run = partial(execute, scale=scale, objects=options.objects, out=out, device=options.device)
    return work_off(list(plan()), run, options, __file__)


if __name__ == "__main__":
    sys.exit(main())
