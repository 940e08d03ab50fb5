"""Pre-training, from a Run to an encoder. The loop below is the paper's algorithm."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from pixmim.config import Run
from pixmim.data import open_batches, open_data
from pixmim.data.feed.batches import Batch, Portion
from pixmim.data.feed.keep import choose_place
from pixmim.data.skipped import Skipped
from pixmim.engine.advice import describe
from pixmim.engine.checkpoint import AUTOSAVE, Checkpoints
from pixmim.engine.device import autocast, choose_attention, choose_device, choose_precision
from pixmim.engine.optim import STREAK, Updater, adamw
from pixmim.engine.runlog import DATA_BOUND, RunLog
from pixmim.engine.schedule import Schedule
from pixmim.engine.signals import Interrupts
from pixmim.errors import UserError
from pixmim.grid import grid_of
from pixmim.parts import build_crop, build_masker, build_model, build_objective, draw_masks, image_form
from pixmim.pretrained import begin_from
from pixmim.runfile import to_json
from pixmim.transforms import finish
from pixmim.weights.own import save_tensors

Watch = Callable[[nn.Module], dict[str, float]]
"""Measures the encoder while it is trained: named values for the log."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended: updates done, and whether those are all of them."""

    step: int
    finished: bool


def pretrain(run: Run, out: Path, console: Console, watch: Watch | None = None) -> Outcome:
    """Train until the run is finished or interrupted, from the newest checkpoint in `out` if there is one.

    Writes config.json, metrics.jsonl, skipped.csv, checkpoints/ and, at the end, encoder.safetensors. On a CPU, a run
    that was interrupted and resumed ends with bitwise the weights of one that was not. Raises UserError.
    """
    device = choose_device(run.device)
    precision = choose_precision(run.precision, device)
    data, crop = open_data(run.data, image_form(run), run.local_copy), build_crop(run)
    place, kept = choose_place(data, crop, run.keep, device)
    schedule = Schedule.of(run, len(data))

    checkpoints = Checkpoints(out / "checkpoints")
    model = build_model(run)
    origin = begin_from(model, run) if run.init and not checkpoints.steps() else []
    model = model.to(device)
    objective = build_objective(run).to(device)
    masker, grid = build_masker(run, model.patch), grid_of(run.hw, model.patch)
    choose_attention(model, device, precision)
    optimizer = adamw(model, run.lr, run.optim.betas, run.optim.weight_decay)
    updater = Updater(optimizer, run.optim.clip, scaling=precision == "fp16", device=device)
    out.mkdir(parents=True, exist_ok=True)  # not before all that a mistake in the settings could stop
    (out / "config.json").write_text(to_json(run))
    start = checkpoints.load(model, optimizer, updater, images=len(data))

    part = run.batch_size // run.accumulate
    mean, std = (torch.tensor(values, device=device) for values in run.statistics)
    every = run.log_every or max(1, min(50, schedule.steps // 200))
    watch_every = max(1, round(run.knn.every * len(data) / run.batch_size))
    skipped = Skipped(out / "skipped.csv", len(data), run.max_bad)
    saved_at = time.monotonic()

    def loss_of(batch: Batch, step: int, rows: range) -> Tensor:
        """The method itself: finish the crops, hide patches, predict them, hold them against the target."""
        images = finish(batch.images.to(device, non_blocking=True), batch.flip.to(device, non_blocking=True), mean, std)
        mask = draw_masks(run, masker, grid, step, rows).to(device)
        with autocast(device, precision):
            prediction = model(images, mask)
        return objective(prediction, images, mask).loss

    def save(step: int) -> None:
        checkpoints.save(step, model, optimizer, updater, images=len(data))

    def measure(step: int) -> None:
        if watch is not None:
            log.write({"step": step, "epoch": round(step * run.batch_size / len(data), 6), **watch(model.encoder)})
            log.pause()

    about = [f"images: {line}" for line in (data.about, kept) if line]
    for line in [*describe(run, len(data), schedule, device, precision), *about, *origin]:
        console.print(line, highlight=False, soft_wrap=True)
    if start:
        done = "is complete" if start >= schedule.steps else "goes on"
        console.print(f"the run {done}: {start:,} updates are done", highlight=False)
    with (
        Interrupts() as interrupts,
        open_batches(
            data,
            crop,
            Portion(part, start * run.batch_size),
            place,
            device,
            skipped=skipped,
            flip=run.crop.flip,
            seed=run.seed,
            threads=run.threads,
        ) as batches,
        RunLog(
            out / "metrics.jsonl",
            steps=schedule.steps,
            start=start,
            every=every,
            epoch=run.batch_size / len(data),
            images=run.batch_size,
            console=console,
        ) as log,
    ):
        step = start
        if step == 0:
            measure(step)
        while step < schedule.steps and not interrupts.asked:
            total = torch.zeros((), device=device)
            for first in range(0, run.batch_size, part):
                loss = loss_of(next(batches), step, range(first, first + part)) / run.accumulate
                updater.backward(loss)
                total += loss.detach()
            norm = updater.step(schedule.lr(step))

            step += 1
            log.add(step, loss=total, gradient=norm)
            if log.due(step):
                _stop_if_lost(updater, step)
                log.line(step, batches.waited, lr=schedule.lr(step - 1), skipped=updater.state["skipped"].item())
            if step == schedule.steps or (run.knn.every > 0 and step % watch_every == 0):
                measure(step)
            due = step % run.checkpoint_every == 0 if run.checkpoint_every else time.monotonic() - saved_at > AUTOSAVE
            if due or interrupts.asked or step == schedule.steps:
                save(step)
                saved_at = time.monotonic()

    if step < schedule.steps:
        return Outcome(step, finished=False)
    save_tensors(model.encoder.state_dict(), out / "encoder.safetensors", run, step)
    if log.data_wait > DATA_BOUND:
        console.print(
            f"the run waited for data {log.data_wait:.0%} of its time: `pixmim bench-data {run.data}` says what helps",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
    lost = int(updater.state["skipped"].item())
    if lost:
        console.print(f"{lost} of {step} updates were skipped because their gradient was not finite")
    if len(skipped):
        console.print(f"{len(skipped)} of {len(data)} images could not be read: see {out}/skipped.csv", markup=False)
    return Outcome(step, finished=True)


def _stop_if_lost(updater: Updater, step: int) -> None:
    streak = int(updater.state["streak"].item())
    if streak >= STREAK:
        raise UserError(
            f"the gradient was not finite in the last {streak} updates (up to step {step}). The weights are those "
            "before it. Try a lower --optim.base-lr, --optim.clip 1, or --precision fp32 (or bf16 instead of fp16)."
        )
