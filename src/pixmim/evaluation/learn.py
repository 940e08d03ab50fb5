"""Training with labels, for the evaluations that fine-tune: resumed exactly as pre-training is."""

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from torch import Tensor, nn

from pixmim.training.checkpoint import Checkpoints
from pixmim.training.find_batch_size import images_at_once
from pixmim.training.metric_logger import RunLog
from pixmim.training.optim import Updater
from pixmim.training.preemption import Interrupts
from pixmim.training.trainer import loop
from pixmim.utils.console import say
from pixmim.utils.errors import UserError
from pixmim.utils.lock import alone

T = TypeVar("T")


def learn(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rate: Callable[[int], float],
    steps: int,
    batches: Callable[[int], AbstractContextManager[Iterator[T]]],
    loss_of: Callable[[T, int], Tensor],
    folder: Path,
    *,
    images: int,
    batch: int,
    accumulate: int = 1,
    clip: float | None = None,
    scaling: bool = False,
    after: Callable[[], None] = lambda: None,
    console: Console | None = None,
) -> None:
    """Train `model` for `steps` updates, from the newest checkpoint in `folder` if there is one.

    model    all that is trained or averaged, and so kept in checkpoints
    rate     the learning rate of each update, counted from 0; a group's own "scale" multiplies it (layer decay)
    batches  opens what feeds the loop, from a position on, counted in parts of batches
    optimizer  one that `Updater` can step: fused AdamW, or one of `layerwise`
    loss_of  of a part of a batch and its number, counted in parts from the very first: a scalar; whatever is random in
             it is a function of that number
    images   in the data set; a checkpoint of another number is refused
    batch    images in an update, in `accumulate` parts
    scaling  multiply the loss against underflow, as float16 needs
    after    called after each update, as an average of the weights needs

    On Ctrl-C it writes a checkpoint and raises KeyboardInterrupt; the same call goes on from there, on a CPU to bitwise
    the same weights. Raises UserError if the gradient is not finite many times in a row.
    """
    updater = Updater(optimizer, clip, scaling=scaling, device=next(model.parameters()).device)
    console = console or Console(quiet=True)
    with (
        alone(folder, partial(say, console)),
        Checkpoints(folder / "checkpoints", say=partial(say, console)) as checkpoints,
    ):
        start = checkpoints.load(model, updater, images=images)
        with (
            batches(start * accumulate) as feed,
            Interrupts() as interrupts,
            RunLog(
                folder / "metrics.jsonl",
                steps=steps,
                start=start,
                every=max(1, min(50, steps // 200)),
                epoch=batch / images,
                images=batch,
                console=console,
            ) as log,
        ):
            step = loop(
                start,
                steps,
                feed,
                lambda part, number: loss_of(part, number) / accumulate,
                model,
                updater,
                rate,
                lambda step, wait: checkpoints.save(step, model, updater, images=images, wait=wait),
                log=log,
                interrupts=interrupts,
                accumulate=accumulate,
                after=lambda step: after(),
            )
    if step < steps:
        say(console, f"stopped after update {step:,} of {steps:,}; the same command goes on")
        raise KeyboardInterrupt


def equal_parts(batch: int, asked: int, device: torch.device, size: tuple[int, int], width: int) -> int:
    """Return the number of equal parts to compute a batch in: `asked`, or for 0 what a CPU's memory suits.

    Raises:
        UserError: If the batch does not divide into as many as were asked for.
    """
    if asked and batch % asked:
        raise UserError(f"a batch of {batch} does not divide into --accumulate {asked} equal parts")
    if asked or device.type != "cpu":
        return asked or 1
    fewest = -(-batch // images_at_once(math.prod(size), width))
    return next(parts for parts in range(fewest, batch + 1) if batch % parts == 0)


def forget(folder: Path) -> None:
    """Remove the folder of work that is finished and measured, and the one above it when that is empty."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()
