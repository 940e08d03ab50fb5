"""Pre-training, from a Run to an encoder: puts data, method, optimizer and log together, and lets the loop run."""

import math
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from pixmim.build import build_crop, build_model, image_form
from pixmim.config import PretrainConfig
from pixmim.data import create_loader, open_dataset
from pixmim.data.bad_images import Skipped, gather_accounts
from pixmim.data.caching import choose_place
from pixmim.data.dataset import Source
from pixmim.data.loader import Batch
from pixmim.data.sampler import BatchShard
from pixmim.method import Method
from pixmim.models.base import MaskedModel
from pixmim.models.layer_decay import not_decayed
from pixmim.runfile import to_json
from pixmim.training.checkpoint import Checkpoints
from pixmim.training.distributed import ALONE, World
from pixmim.training.find_batch_size import halve, images_at_once, is_out_of_memory
from pixmim.training.metric_logger import read_metrics
from pixmim.training.optim import Updater, adamw
from pixmim.training.parallelize import accumulating, spread, step_context, way, whole_state
from pixmim.training.preemption import Interrupted
from pixmim.training.schedule import Schedule
from pixmim.training.summary import closing, describe
from pixmim.training.trainer import Trainer
from pixmim.transforms.crops import finish
from pixmim.utils.console import say
from pixmim.utils.errors import UserError, first_line
from pixmim.utils.files import write_whole
from pixmim.utils.threads import how_many
from pixmim.utils.trust import inside, remember_run
from pixmim.weights.detect import read_run
from pixmim.weights.load import assemble_encoder, begin_from, open_model
from pixmim.weights.save import ENCODER, WEIGHTS, save_encoder

_FILES = ("config.json", "metrics.jsonl", "skipped.csv", "checkpoints", ENCODER, f"{ENCODER}/config.json", WEIGHTS)

Watch = Callable[[nn.Module], dict[str, float]]
"""Measures the encoder while it is trained: named values for the log."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: updates done, and whether those are all of them."""

    step: int
    finished: bool


def pretrain(
    run: PretrainConfig, out: Path, console: Console, watch: Watch | None = None, world: World = ALONE
) -> Outcome:
    """Train until the run is finished or interrupted, from the newest checkpoint in `out` if there is one.

    Every process of `world` calls this; the first one speaks and writes: config.json, metrics.jsonl, skipped.csv,
    checkpoints/ (all of them) and, at the end, encoder/. On a CPU, a run that was interrupted and resumed on
    as many processes ends with bitwise the weights of one that was not. Raises UserError.
    """
    for name in _FILES:
        inside(out, name)  # what is written must not go elsewhere by a link
    if not (out / "config.json").exists():
        check_new_run(out)
    data, crop = open_dataset(run.data, image_form(run), run.local_copy), build_crop(run)
    _agree(run, world, data)
    method = Method.of(run)
    model, device, precision = method.model, method.device, method.precision
    here = world.here()
    place, kept = choose_place(data, crop, run.keep, device, processes=here)
    schedule, epoch = Schedule.of(run, len(data)), run.batch_size / len(data)

    begun = max(Checkpoints(out / "checkpoints").steps(), default=0)
    if not begun and (out / WEIGHTS).exists():
        raise UserError(
            f"{out} holds a finished encoder, and no checkpoint to go on from: `--init {shlex.quote(str(out))}` begins "
            "a new run with it, in another --out"
        )
    if begun > schedule.steps:
        raise UserError(
            f"{out} is at step {begun:,} already, and the length asked for ends at step {schedule.steps:,}: give more "
            "--epochs (or --steps), or --finish, which ends it where it is"
        )
    lines = _longer(out, schedule, begun, len(data))
    origin = begin_from(model, run) if run.init and not begun else []
    network = spread(model, run.scale, world, device, precision)
    optimizer = adamw(model, run.lr, run.optim.betas, run.optim.weight_decay, not_decayed(model.encoder))
    updater = Updater(optimizer, run.optim.clip, scaling=precision == "fp16", device=device)
    with step_context(run.scale):
        parts = _parts(run, method, network, updater, world, beside=data if place == "device" else None)
    shard = BatchShard(run.batch_size, 0, world.rank, world.size, parts)
    if world.first:
        out.mkdir(parents=True, exist_ok=True)  # not before all that a mistake in the settings could stop
        write_whole(out / "config.json", to_json(run))
    remember_run(to_json(run))

    about = [f"images: {line}" for line in (data.about, kept) if line]
    for line in [*describe(run, len(data), schedule, device, precision, world, parts), *about, *origin, *lines]:
        say(console, line)
    trainer = Trainer(
        model,
        updater,
        schedule.lr,
        schedule.steps,
        out,
        images=len(data),
        batch_size=run.batch_size,
        accumulate=parts,
        network=network,
        world=world,
        saving=run.saving,
        log_every=run.log_every,
        console=console,
    )
    start = trainer.resume()
    if start:
        done = "is complete" if start >= schedule.steps else "goes on"
        say(console, f"the run {done}: {start:,} updates are done")
    mean, std = (torch.tensor(values, device=device) for values in run.statistics)
    skipped = Skipped(out / (f"skipped-{world.rank}.csv" if world.rank else "skipped.csv"), len(data), run.max_bad)
    watch_every = max(1, round(run.knn.every / epoch))

    def loss_of(batch: Batch, number: int) -> Tensor:
        """Return what a part of a batch adds to the loss of its step."""
        images = finish(batch.images.to(device, non_blocking=True), batch.flip.to(device, non_blocking=True), mean, std)
        assert batch.mask is not None
        # Gradients are averaged over the ranks, and summed over the parts.
        return method.loss(network, images, batch.mask) * (batch.weight * world.size)

    measured = True

    def measure(step: int) -> None:
        """Where the run asks for it: at the start, every so often, and at the end."""
        nonlocal measured
        if watch is not None and (step in (0, schedule.steps) or step % watch_every == 0):
            try:
                with trainer.interrupts.waiting(world.size == 1):
                    values = watch(_whole(model, run, device, world).encoder)
            except Interrupted:
                measured = False  # the resumed run measures it
                return
            trainer.log.write({"step": step, "epoch": round(step * epoch, 6), **values})
            trainer.log.pause()

    with (
        create_loader(
            data,
            crop,
            replace(shard, start=start * run.batch_size),
            place,
            device=device,
            skipped=skipped,
            flip=run.crop.flip,
            seed=run.seed,
            masks=method.masks.at,
            threads=how_many(run.threads, processes=here),
        ) as batches,
        trainer,
        step_context(run.scale),
        _short_of_memory(shard),
    ):
        noted = [line["step"] for line in read_metrics(out / "metrics.jsonl") if "loss" not in line]
        if world.share(start not in noted):
            measure(start)
        step = trainer.fit(batches, loss_of, measure)

    if step < schedule.steps or not measured:
        return Outcome(step, finished=False)
    product = _whole(model, run, device, world).encoder
    world.gather(None)  # until then, others may still write to their accounts of skipped images
    if world.first:
        save_encoder(product, out / ENCODER, run, step, schedule.steps)
        lost, bad = int(updater.state["skipped"].item()), gather_accounts(out)
        for line in closing(run, out, step, lost=lost, bad=bad, images=len(data), waited=trainer.log.data_wait):
            say(console, line)
    return Outcome(step, finished=True)


def end_now(out: Path) -> Outcome:
    """End a run where its newest checkpoint is: write its encoder. The same run can go on later. Raises UserError."""
    for name in _FILES:
        inside(out, name)
    weights = open_model(str(out), whole=True)
    save_encoder(assemble_encoder(weights), out / ENCODER, weights.run, weights.step, weights.steps)
    return Outcome(weights.step, finished=True)


def _longer(out: Path, schedule: Schedule, done: int, images: int) -> list[str]:
    """Say what becomes of the learning rate where a run goes on that was begun with another length."""
    before = read_run(out) if done else None
    planned = schedule.steps if before is None else Schedule.of(before, images).steps
    if planned == schedule.steps:
        return []
    return [
        f"the run goes on to step {schedule.steps:,} instead of {planned:,}: from step {done:,} on, the learning rate "
        f"is that of a run of {schedule.steps:,} steps, {schedule.lr(min(done, schedule.steps - 1)):.3g} at first"
    ]


def _parts(
    run: PretrainConfig, method: Method, network: nn.Module, updater: Updater, world: World, beside: Source | None
) -> int:
    """Return the number of parts in which this rank computes its share of a batch. Collective.

    beside: The data set that will be kept on the device as well.
    """
    share, device = run.batch_size // world.size, method.device
    if run.accumulate:
        return run.accumulate
    if device.type == "cpu":
        width = int(method.model.encoder.num_features)  # type: ignore[arg-type]
        at_once = images_at_once(math.prod(run.hw), width) // world.here()
        return -(-share // max(1, at_once))
    if way(run.scale, world) == "fsdp":  # an all-gather that one rank cannot finish would leave the others waiting
        return 1
    spare = 2 * sum(p.nbytes for p in method.model.parameters() if p.requires_grad)  # the optimizer's moments
    if beside is not None and beside.sizes is not None:
        spare += int(beside.sizes.prod(axis=1).sum()) * run.channels * beside.form.dtype.itemsize

    def attempt(images: int) -> None:
        try:
            taken = torch.empty(spare, dtype=torch.uint8, device=device)
            noise = torch.randn(images, run.channels, *run.hw, device=device)
            with accumulating(network, last=False):
                updater.backward(method.loss(network, noise, method.masks(0, range(images))))
            del taken
        finally:
            updater.optimizer.zero_grad(set_to_none=True)

    return -(-share // halve(attempt, share, lambda fits: all(world.gather(fits))))


@contextmanager
def _short_of_memory(shard: BatchShard) -> Iterator[None]:
    """Raise UserError with the way out when memory runs out."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        advice = (
            f"--accumulate {2 * shard.parts} halves them" if shard.local_batch_size > 1 else "choose a smaller model"
        )
        raise UserError(
            f"memory ran out, with {shard.local_batch_size:,} images computed at once ({first_line(error)}): "
            f"{advice}, a smaller --size takes less as well"
        ) from None


def check_new_run(out: Path) -> None:
    """Raise UserError if a folder without a run holds anything that a new run there would write over."""
    for name in (*_FILES, "report.html", "reconstructions"):
        if os.path.lexists(out / name):
            raise UserError(f"{out / name} is there already, and belongs to no run: choose another --out")


def _agree(run: PretrainConfig, world: World, data: Source) -> None:
    """Raise UserError unless each process gets an equal share of every batch, out of the same images."""
    run.check_shares(world.size, "processes")
    counts = world.gather(len(data))
    other = next((rank for rank, count in enumerate(counts) if count != counts[0]), 0)
    if other:
        raise UserError(
            f"process {other} sees {counts[other]:,} images and process 0 {counts[0]:,}: all need the same data"
        )


def _whole(model: MaskedModel, run: PretrainConfig, device: torch.device, world: World) -> MaskedModel:
    """The model, or where it lies in shards a copy of all of it; every process must ask."""
    if way(run.scale, world) != "fsdp":
        return model
    copy = build_model(run).to(device)
    copy.load_state_dict(whole_state(model))
    return copy
