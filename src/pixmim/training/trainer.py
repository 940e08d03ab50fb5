"""The training loop that pre-training, fine-tuning, segmentation, detection and MAE's probe share."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor, nn

from pixmim.config import CheckpointConfig
from pixmim.training.checkpoint import AUTOSAVE, CheckpointManager, is_multiple_of
from pixmim.training.distributed import SINGLE_PROCESS, Distributed
from pixmim.training.metric_logger import MetricLogger
from pixmim.training.optim import SyncFreeOptimizer
from pixmim.training.parallelize import sync_last_microbatch
from pixmim.training.preemption import Interrupted, PreemptionHandler
from pixmim.utils.console import print_plain
from pixmim.utils.errors import UserError
from pixmim.utils.lock import locked_folder

Batch = TypeVar("Batch")

MAX_BAD_STEPS = 20
"""Abort after this many consecutive gradients that are not finite."""


class Trainer:
    """Train a model: gradients, optimizer steps, learning rate, checkpoints, metrics and preemption.

    Whether a step is skipped, saved or the last one is decided alike on all ranks. On a CPU, a training that was
    interrupted and resumed on as many ranks ends with bitwise the weights of one that was not.

        trainer = Trainer(model, updater, schedule.lr, steps, folder, images=len(data), batch_size=256)
        start = trainer.resume()
        with open_loader(start) as loader, trainer:
            step = trainer.fit(loader, compute_loss)

    Args:
        model: What checkpoints hold.
        updater: Takes the optimizer steps.
        rate: Return the learning rate of a step, counted from 0.
        steps: Length of the training.
        folder: Where metrics.jsonl and checkpoints/ are written.
        images: Size of the dataset. A checkpoint made with another one is refused.
        batch_size: Images per step, over all ranks.
        accumulate: Parts that each rank computes its share of a batch in.
        network: The module that computes, if not the model itself: see `parallelize.spread`.
        world: The ranks of the run.
        checkpoint: When checkpoints are written, and which are kept.
        log_every: Steps between two lines of metrics; 0: a two-hundredth of the training, at most 50.
        on_log: Called on rank 0 with each record of metrics.jsonl.
        console: Where progress is shown; None: nowhere.
    """

    def __init__(
        self,
        model: nn.Module,
        updater: SyncFreeOptimizer,
        rate: Callable[[int], float],
        steps: int,
        folder: Path,
        *,
        images: int,
        batch_size: int,
        accumulation_steps: int = 1,
        network: nn.Module | None = None,
        world: Distributed = SINGLE_PROCESS,
        checkpoint: CheckpointConfig = CheckpointConfig(),  # noqa: B008 (frozen)
        log_every: int = 0,
        on_log: Callable[[dict[str, Any]], None] | None = None,
        console: Console | None = None,
    ) -> None:
        self.model, self.updater, self.rate, self.steps, self.folder = model, updater, rate, steps, folder
        self.images, self.batch_size, self.accumulation_steps = images, batch_size, accumulation_steps
        self.network, self.world = network if network is not None else model, world
        self.epoch = batch_size / images
        """Passes over the dataset that a step makes."""
        self.start = 0
        """Steps that were done when this process began."""
        self.checkpoints = CheckpointManager(
            folder / "checkpoints", last=checkpoint.keep_last, stays=self._is_milestone, world=world, say=self._say
        )
        self._on_log = on_log
        self._checkpoint, self._console = checkpoint, console or Console(quiet=True)
        self._log_every = log_every or max(1, min(50, steps // 200))

    def resume(self) -> int:
        """Restore the newest valid checkpoint, if there is one. Collective: call on every rank.

        Returns:
            The number of steps done.

        Raises:
            UserError: If no checkpoint is valid, or it does not fit the model or the dataset.
        """
        self.start = self.checkpoints.load(self.model, self.updater, images=self.images)
        return self.start

    def __enter__(self) -> "Trainer":
        with ExitStack() as stack:
            self.interrupts = stack.enter_context(PreemptionHandler(speaks=self.world.is_main))
            self.log = stack.enter_context(
                MetricLogger(
                    self.folder / "metrics.jsonl" if self.world.is_main else None,
                    steps=self.steps,
                    start=self.start,
                    every=self._log_every,
                    epoch=self.epoch,
                    images=self.batch_size,
                    console=self._console,
                    total=self.world.total,
                    on_write=self._on_log,
                )
            )
            stack.enter_context(self.checkpoints)
            self._exits = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._exits.__exit__(kind, error, at)

    def fit(
        self,
        loader: Iterator[Batch],
        compute_loss: Callable[[Batch, int], Tensor],
        on_step_end: Callable[[int], None] = lambda step: None,
    ) -> int:
        """Train until the last step, or until interrupted; a checkpoint is written at the end of either.

        A single process that waits for data when it is interrupted saves the state after the last complete step: the
        data may never come.

        Args:
            loader: Endless parts of batches, from `start` on. If it has them, `wait_seconds` counts the seconds it was
                waited for, and `ready` is True if the next part is there.
            compute_loss: Return the share that a part has of its batch's loss, a scalar. The part comes with its
                number, counted from the first part of step 0; all randomness is a function of that number.
            on_step_end: Called after each step with the number of steps done.

        Returns:
            The number of steps done.

        Raises:
            UserError: If the gradient is not finite in many consecutive steps, or a rank is stuck.
        """
        step, saved_at = self.start, time.monotonic()
        autosave = math.inf if self._checkpoint.every else AUTOSAVE
        with self.world.naming_stuck_ranks():
            while step < self.steps:
                try:
                    loss, norm = self._step(step, loader, compute_loss)
                except Interrupted:
                    if step > self.start:
                        self._save(step, wait=True)
                    break
                step += 1
                self._log(step, loss, norm, getattr(loader, "wait_seconds", 0.0))
                on_step_end(step)
                late = self.world.is_main and time.monotonic() - saved_at > autosave
                stop, late = self.world.any_rank_delayed(self.interrupts.requested, late)
                last = stop or step == self.steps
                if last or late or self._is_planned(step):
                    self._save(step, wait=last)
                    saved_at = time.monotonic()
                if last:
                    break
        return step

    def resume_and_fit(
        self,
        open_loader: Callable[[int], AbstractContextManager[Iterator[Batch]]],
        compute_loss: Callable[[Batch, int], Tensor],
        on_step_end: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Train to the last step, as the only process in `folder`.

        Args:
            open_loader: Open the loader at a position, counted in parts of batches.
            compute_loss: Return the mean loss of a part; see `fit`. It may seed torch's generators, which are restored
                at the end.
            on_step_end: See `fit`.

        Raises:
            KeyboardInterrupt: If interrupted. The same call resumes from the checkpoint that was written.
            UserError: If another process trains in the folder; and as `resume` and `fit` do.
        """
        device = self.updater.device
        with (
            locked_folder(self.folder, self._say),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            open_loader(self.resume() * self.accumulation_steps) as loader,
            self,
        ):
            step = self.fit(
                loader, lambda part, number: compute_loss(part, number) / self.accumulation_steps, on_step_end
            )
        if step < self.steps:
            self._say(f"stopped after step {step:,} of {self.steps:,}; the same command resumes")
            raise KeyboardInterrupt

    def _step(
        self, step: int, loader: Iterator[Batch], compute_loss: Callable[[Batch, int], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Take a step, and return loss and norm of the gradient. Raises Interrupted, with all buffers restored."""
        single = self.world.size == 1
        buffers = list(self.network.buffers()) if single and self.accumulation_steps > 1 else []
        before = [buffer.clone() for buffer in buffers]  # a forward pass may change them
        total = torch.zeros((), device=self.updater.device)
        try:
            for part in range(self.accumulation_steps):
                ready = part > 0 and getattr(loader, "ready", False)  # then an interrupt lets the step be finished
                with self.interrupts.waiting(single and not ready):
                    batch = next(loader)
                with sync_last_microbatch(self.network, last=part == self.accumulation_steps - 1):
                    loss = compute_loss(batch, step * self.accumulation_steps + part)
                    self.updater.backward(loss)
                total += loss.detach()
        except Interrupted:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            raise
        return total, self.updater.step(self.rate(step))

    def _log(self, step: int, loss: Tensor, norm: Tensor, waited: float) -> None:
        self.log.update(step, loss=loss, grad_norm=norm)
        if not self.log.should_log(step):
            return
        self.world.meet()  # nothing interrupts the wait for a device that waits for a stuck rank
        bad = int(self.updater.state["streak"].item())
        if bad >= MAX_BAD_STEPS:
            raise UserError(
                f"the gradient was not finite in the last {bad} steps (up to step {step}); the weights are those "
                "before them. Try a lower learning rate, --optim.clip 1, or --precision fp32 (or bf16 instead of fp16)"
            )
        self.log.log(step, waited, lr=self.rate(step - 1), skipped_steps=self.updater.state["skipped"].item())

    def _is_milestone(self, step: int) -> bool:
        return is_multiple_of(step, self._checkpoint.keep_every_epochs / self.epoch)

    def _is_planned(self, step: int) -> bool:
        return self._is_milestone(step) or (self._checkpoint.every > 0 and step % self._checkpoint.every == 0)

    def _save(self, step: int, wait: bool) -> None:
        self.checkpoints.save(step, self.model, self.updater, images=self.images, wait=wait)

    def _say(self, text: str) -> None:
        print_plain(self._console, text)
