"""The loop that every training here goes through, with labels or without: gradients, update, log, checkpoint."""

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from pixmim.training.checkpoint import AUTOSAVE
from pixmim.training.distributed import ALONE, World
from pixmim.training.metric_logger import RunLog
from pixmim.training.optim import Updater
from pixmim.training.parallelize import accumulating
from pixmim.training.preemption import Interrupted, Interrupts
from pixmim.training.watchdog import Watchdog
from pixmim.utils.errors import UserError

T = TypeVar("T")

STREAK = 20
"""Updates in a row without a finite gradient, after which a run is lost."""


def loop(
    start: int,
    steps: int,
    feed: Iterator[T],
    loss_of: Callable[[T, int], Tensor],
    network: nn.Module,
    updater: Updater,
    rate: Callable[[int], float],
    save: Callable[[int, bool], None],
    *,
    log: RunLog,
    interrupts: Interrupts,
    planned: Callable[[int], bool] = lambda step: False,
    autosave: float = AUTOSAVE,
    accumulate: int = 1,
    after: Callable[[int], None] = lambda step: None,
    world: World = ALONE,
    timeout: float = 600.0,
) -> int:
    """Update weights from `start` updates done up to `steps`, or until interrupted; gives how many are done then.

    feed       endless parts of batches; `wait_seconds`, if any, is how long they were waited for, and `ready` whether
               the next one is there
    loss_of    of a part and its number, counted in parts from the very first: its share of the batch's loss, a scalar;
               whatever is random in it is a function of that number
    network    what computes: see `engine.parallel`
    rate       the learning rate of each update, counted from 0
    save       writes a checkpoint of the state after so many updates; True: and waits until it is on disk
    planned    whether one is due after so many updates
    autosave   seconds after which one is due besides
    accumulate  parts of a batch
    after      called after each update, with their number
    timeout    seconds that the processes of `world` wait for each other

    On any number of processes, all that decides what happens next is the same on each: whether the gradient was finite,
    and, one update late, whether any of them was interrupted. Raises UserError if the gradient is not finite many times
    in a row.

    A single process that waits for data when it is interrupted, or would have to for another part of the batch, saves
    the state after the last complete update: the data may never come.
    """
    step, stop, saved_at = start, False, time.monotonic()
    alone = world.size == 1
    buffers = list(network.buffers()) if alone and accumulate > 1 else []  # a forward pass may change them
    with Watchdog(world, timeout) as watchdog:
        while step < steps and not stop:
            total = torch.zeros((), device=updater.device)
            before = [buffer.clone() for buffer in buffers]
            try:
                for part in range(accumulate):
                    watchdog.at(step, "waiting for data")
                    there = part > 0 and getattr(feed, "ready", False)  # then an interrupt lets the step be finished
                    with interrupts.waiting(alone and not there):
                        batch = next(feed)
                    watchdog.at(step, "computing")
                    with accumulating(network, last=part == accumulate - 1):
                        loss = loss_of(batch, step * accumulate + part)
                        updater.backward(loss)
                    total += loss.detach()
            except Interrupted:
                for buffer, value in zip(buffers, before, strict=True):
                    buffer.copy_(value)
                if step > start:
                    save(step, True)
                return step
            norm = updater.step(rate(step))

            step += 1
            log.add(step, loss=total, gradient=norm)
            if log.due(step):
                _stop_if_lost(updater, step)
                waited = getattr(feed, "wait_seconds", 0.0)
                log.line(step, waited, lr=rate(step - 1), skipped=updater.state["skipped"].item())
            watchdog.at(step, "measuring")
            after(step)
            watchdog.at(step, "saving")
            stop, late = world.any(interrupts.asked, world.first and time.monotonic() - saved_at > autosave)
            last = stop or step == steps
            if last or late or planned(step):
                save(step, last)
                saved_at = time.monotonic()
    return step


def _stop_if_lost(updater: Updater, step: int) -> None:
    streak = int(updater.state["streak"].item())
    if streak >= STREAK:
        raise UserError(
            f"the gradient was not finite in the last {streak} updates (up to step {step}). The weights are those "
            "before it. Try a lower learning rate, clipping the gradient (--optim.clip 1), or --precision fp32 "
            "(or bf16 instead of fp16)."
        )
