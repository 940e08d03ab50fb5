"""Pre-training, from a Run to an encoder: puts data, method, optimizer and log together, and lets the loop run."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from pixmim.config import Run
from pixmim.data import open_batches, open_data
from pixmim.data.feed.batches import Batch, Portion
from pixmim.data.feed.keep import choose_place
from pixmim.data.skipped import Skipped, gather_accounts
from pixmim.data.source import Source
from pixmim.data.threads import how_many
from pixmim.disk import write_whole
from pixmim.dist import ALONE, World
from pixmim.engine.advice import closing, describe
from pixmim.engine.checkpoint import AUTOSAVE, Checkpoints, milestone
from pixmim.engine.loop import loop
from pixmim.engine.optim import Updater, adamw
from pixmim.engine.parallel import compiling, spread, way, whole_state
from pixmim.engine.runlog import RunLog, read_metrics
from pixmim.engine.schedule import Schedule
from pixmim.engine.signals import Interrupted, Interrupts
from pixmim.errors import UserError
from pixmim.method import Method
from pixmim.models.base import MaskedModel
from pixmim.models.layers import not_decayed
from pixmim.parts import build_crop, build_model, image_form
from pixmim.pretrained import begin_from
from pixmim.runfile import to_json
from pixmim.terminal import say
from pixmim.transforms import finish
from pixmim.trust import inside, remember_run
from pixmim.weights.own import save_tensors

_FILES = ("config.json", "metrics.jsonl", "skipped.csv", "checkpoints", "encoder.safetensors")

Watch = Callable[[nn.Module], dict[str, float]]
"""Measures the encoder while it is trained: named values for the log."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: updates done, and whether those are all of them."""

    step: int
    finished: bool


def pretrain(run: Run, out: Path, console: Console, watch: Watch | None = None, world: World = ALONE) -> Outcome:
    """Train until the run is finished or interrupted, from the newest checkpoint in `out` if there is one.

    Every process of `world` calls this; the first one speaks and writes: config.json, metrics.jsonl, skipped.csv,
    checkpoints/ (all of them) and, at the end, encoder.safetensors. On a CPU, a run that was interrupted and resumed on
    as many processes ends with bitwise the weights of one that was not. Raises UserError.
    """
    for name in _FILES:
        inside(out, name)  # what is written must not go elsewhere by a link
    if not (out / "config.json").exists():
        check_new_run(out)
    data, crop = open_data(run.data, image_form(run), run.local_copy), build_crop(run)
    _agree(run, world, data)
    method = Method.of(run)
    model, device, precision = method.model, method.device, method.precision
    here = world.here()
    place, kept = choose_place(data, crop, run.keep, device, processes=here)
    schedule, epoch = Schedule.of(run, len(data)), run.batch_size / len(data)
    portion = Portion(run.batch_size // run.accumulate, 0, world.rank, world.size)

    def stays(step: int) -> bool:
        return milestone(step, run.saving.epochs / epoch)

    checkpoints = Checkpoints(
        out / "checkpoints",
        last=run.saving.last,
        stays=stays,
        world=world,
        say=partial(say, console),
    )
    origin = begin_from(model, run) if run.init and not checkpoints.steps() else []
    network = spread(model, run.scale, world, device, precision)
    optimizer = adamw(model, run.lr, run.optim.betas, run.optim.weight_decay, not_decayed(model.encoder))
    updater = Updater(optimizer, run.optim.clip, scaling=precision == "fp16", device=device)
    if world.first:
        out.mkdir(parents=True, exist_ok=True)  # not before all that a mistake in the settings could stop
        write_whole(out / "config.json", to_json(run))
    remember_run(to_json(run))

    about = [f"images: {line}" for line in (data.about, kept) if line]
    for line in [*describe(run, len(data), schedule, device, precision, world), *about, *origin]:
        say(console, line)
    start = checkpoints.load(model, updater, images=len(data))
    if start:
        done = "is complete" if start >= schedule.steps else "goes on"
        say(console, f"the run {done}: {start:,} updates are done")
    mean, std = (torch.tensor(values, device=device) for values in run.statistics)
    skipped = Skipped(out / (f"skipped-{world.rank}.csv" if world.rank else "skipped.csv"), len(data), run.max_bad)
    watch_every = max(1, round(run.knn.every / epoch))

    def loss_of(batch: Batch, number: int) -> Tensor:
        """Of a part of a batch: its crops are finished on the device, and the method does the rest."""
        images = finish(batch.images.to(device, non_blocking=True), batch.flip.to(device, non_blocking=True), mean, std)
        step, part = divmod(number, run.accumulate)
        return method.loss(network, images, step, portion.positions(part))

    measured = True

    def measure(step: int) -> None:
        """Where the run asks for it: at the start, every so often, and at the end."""
        nonlocal measured
        if watch is not None and (step in (0, schedule.steps) or step % watch_every == 0):
            try:
                with interrupts.waiting(world.size == 1):
                    values = watch(_whole(model, run, device, world).encoder)
            except Interrupted:
                measured = False  # the resumed run measures it
                return
            log.write({"step": step, "epoch": round(step * epoch, 6), **values})
            log.pause()

    def planned(step: int) -> bool:
        return stays(step) or (run.saving.every > 0 and step % run.saving.every == 0)

    with (
        open_batches(
            data,
            crop,
            replace(portion, start=start * run.batch_size),
            place,
            device,
            skipped=skipped,
            flip=run.crop.flip,
            seed=run.seed,
            threads=how_many(run.threads, processes=here),
        ) as batches,
        Interrupts(speaks=world.first) as interrupts,
        RunLog(
            out / "metrics.jsonl" if world.first else None,
            steps=schedule.steps,
            start=start,
            every=run.log_every or max(1, min(50, schedule.steps // 200)),
            epoch=epoch,
            images=run.batch_size,
            console=console,
            total=world.total,
        ) as log,
        checkpoints,
        compiling(run.scale),
    ):
        noted = [line["step"] for line in read_metrics(out / "metrics.jsonl") if "loss" not in line]
        if world.share(start not in noted):
            measure(start)
        step = loop(
            start,
            schedule.steps,
            batches,
            loss_of,
            network,
            updater,
            schedule.lr,
            lambda step, wait: checkpoints.save(step, model, updater, images=len(data), wait=wait),
            log=log,
            interrupts=interrupts,
            planned=planned,
            autosave=math.inf if run.saving.every else AUTOSAVE,
            accumulate=run.accumulate,
            after=measure,
            world=world,
            timeout=run.scale.timeout,
        )

    if step < schedule.steps or not measured:
        return Outcome(step, finished=False)
    product = _whole(model, run, device, world).encoder.state_dict()
    world.gather(None)  # until then, others may still write to their accounts of skipped images
    if world.first:
        save_tensors(product, out / "encoder.safetensors", run, step)
        lost, bad = int(updater.state["skipped"].item()), gather_accounts(out)
        for line in closing(run, out, step, lost=lost, bad=bad, images=len(data), waited=log.data_wait):
            say(console, line)
    return Outcome(step, finished=True)


def check_new_run(out: Path) -> None:
    """Raise UserError if a folder without a run holds anything that a new run there would write over."""
    for name in (*_FILES, "report.html", "reconstructions"):
        if os.path.lexists(out / name):
            raise UserError(f"{out / name} is there already, and belongs to no run: choose another --out")


def _agree(run: Run, world: World, data: Source) -> None:
    """Raise UserError unless each process gets an equal share of every batch, out of the same images."""
    run.check_shares(world.size, "processes")
    counts = world.gather(len(data))
    other = next((rank for rank, count in enumerate(counts) if count != counts[0]), 0)
    if other:
        raise UserError(
            f"process {other} sees {counts[other]:,} images and process 0 {counts[0]:,}: all need the same data"
        )


def _whole(model: MaskedModel, run: Run, device: torch.device, world: World) -> MaskedModel:
    """The model, or where it lies in shards a copy of all of it; every process must ask."""
    if way(run.scale, world) != "fsdp":
        return model
    with torch.random.fork_rng(devices=[]):
        copy = build_model(run).to(device)
    copy.load_state_dict(whole_state(model))
    return copy
