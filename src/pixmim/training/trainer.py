"""The training loop of pre-training, fine-tuning, segmentation, detection and MAE's linear probe."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor, nn

from pixmim.config import CheckpointConfig
from pixmim.training.checkpoint import CheckpointManager, is_multiple_of
from pixmim.training.distributed import SINGLE_PROCESS, Distributed
from pixmim.training.metric_logger import MetricLogger
from pixmim.training.optim import SyncFreeOptimizer
from pixmim.training.parallelize import batch_norms, settle_statistics, sync_last_microbatch
from pixmim.training.preemption import Interrupted, PreemptionHandler
from pixmim.utils.console import print_plain
from pixmim.utils.errors import UserError
from pixmim.utils.lock import locked_folder

Batch = TypeVar("Batch")

AUTOSAVE = 600.0
"""Seconds between checkpoints, unless a number of steps is given."""

MAX_BAD_STEPS = 20
"""Abort after this many consecutive non-finite gradients."""


class Trainer:
    """Train a model: gradients, optimizer steps, learning rate, checkpoints, metrics and preemption.

    All ranks agree on whether a step is skipped, saved or the last one. On a CPU, an interrupted and resumed training
    ends with bitwise the same weights as an uninterrupted one on as many ranks.

        trainer = Trainer(model, optimizer, schedule.lr, steps, folder, images=len(data), batch_size=256)
        start = trainer.resume()
        with open_loader(start) as loader, trainer:
            step = trainer.fit(loader, compute_loss)

    Args:
        model: The model to train and save.
        optimizer: Its optimizer.
        lr: Return the learning rate of a step, counted from 0.
        steps: Length of the training.
        folder: Where metrics.jsonl and checkpoints/ are written.
        images: Size of the dataset. A checkpoint from a dataset of another size is refused.
        batch_size: Images per step, over all ranks.
        accumulation_steps: Parts in which each rank computes its share of a batch.
        network: The module to call, if not the model itself; see `parallelize`.
        world: Ranks of the run.
        checkpoint: When checkpoints are written, and which are kept.
        log_every: Steps between two lines of metrics; 0: a two-hundredth of the training, at most 50.
        on_log: Called on rank 0 with each record of metrics.jsonl.
        console: Prints progress; None: nothing is printed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: SyncFreeOptimizer,
        lr: Callable[[int], float],
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
        on_log: Callable[[dict[str, Any]], object] | None = None,
        console: Console | None = None,
    ) -> None:
        self.model, self.optimizer, self.lr, self.steps, self.folder = model, optimizer, lr, steps, folder
        self.images, self.batch_size, self.accumulation_steps = images, batch_size, accumulation_steps
        self.network, self.world = network if network is not None else model, world
        self.epoch = batch_size / images
        """Epochs per step."""
        self.start = 0
        """Steps done before this process started."""
        self._checkpoint, self._console, self._on_log = checkpoint, console or Console(quiet=True), on_log
        self._log_every, self._norms = log_every or max(1, min(50, steps // 200)), batch_norms(model)
        self.checkpoints = CheckpointManager(
            folder / "checkpoints", checkpoint.keep_last, keep_if=self._is_milestone, world=world, warn=self._print
        )

    def resume(self) -> int:
        """Restore the newest valid checkpoint, if there is one. Collective: call on every rank.

        Returns:
            The number of steps done.

        Raises:
            UserError: If no checkpoint is valid, or it does not fit the model or the dataset.
        """
        self.start = self.checkpoints.load(self.model, self.optimizer, images=self.images)
        return self.start

    def __enter__(self) -> "Trainer":
        with ExitStack() as stack:
            self.interrupts = stack.enter_context(PreemptionHandler(verbose=self.world.is_main))
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

    def __exit__(self, *error: Any) -> None:
        self._exits.__exit__(*error)

    def fit(
        self,
        loader: Iterator[Batch],
        compute_loss: Callable[[Batch, int], Tensor],
        on_step_end: Callable[[int], object] = lambda step: None,
    ) -> int:
        """Train until the last step, or until interrupted; both end with a checkpoint.

        If a single process is interrupted while it waits for data, it saves the state after the last complete step,
        since the data may never arrive.

        Args:
            loader: Endless parts of batches, from `start` on. Two attributes are optional: `wait_seconds`, the time
                spent waiting for it, and `ready`, True if the next part is available.
            compute_loss: Return a part's share of the loss of its batch, a scalar. Its arguments are the part and the
                part's number, counted from the first part of step 0; all randomness is a function of that number.
            on_step_end: Called after each step with the number of steps done.

        Returns:
            The number of steps done.

        Raises:
            UserError: If the gradient is not finite in many consecutive steps, or a rank is stuck.
        """
        step, saved_at, every = self.start, time.monotonic(), self._checkpoint.every
        autosave = math.inf if every else AUTOSAVE
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
                is_due = self.world.is_main and time.monotonic() - saved_at > autosave
                stop, is_due = self.world.any_rank_delayed(self.interrupts.requested, is_due)
                is_last = stop or step == self.steps
                is_due |= self._is_milestone(step) or (every > 0 and step % every == 0)
                if is_last or is_due:
                    self._save(step, wait=is_last)
                    saved_at = time.monotonic()
                if is_last:
                    break
        return step

    def resume_and_fit(
        self,
        open_loader: Callable[[int], AbstractContextManager[Iterator[Batch]]],
        compute_loss: Callable[[Batch, int], Tensor],
        on_step_end: Callable[[int], object] = lambda step: None,
    ) -> None:
        """Train to the last step, as the only process in `folder`.

        Args:
            open_loader: Open the loader at a position, counted in parts of batches.
            compute_loss: Return the mean loss of a part; see `fit`. It may seed torch's generators, whose states are
                restored at the end.
            on_step_end: See `fit`.

        Raises:
            KeyboardInterrupt: If interrupted. The same call resumes from the checkpoint that was written.
            UserError: If another process trains in the folder, and as in `resume` and `fit`.
        """
        device, parts = self.optimizer.device, self.accumulation_steps
        with (
            locked_folder(self.folder, self._print),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            open_loader(self.resume() * parts) as loader,
            self,
        ):
            step = self.fit(loader, lambda part, number: compute_loss(part, number) / parts, on_step_end)
        if step < self.steps:
            self._print(f"stopped after step {step:,} of {self.steps:,}; the same command resumes")
            raise KeyboardInterrupt

    def _step(
        self, step: int, loader: Iterator[Batch], compute_loss: Callable[[Batch, int], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Take a step; return loss and gradient norm. Raises Interrupted, after which all buffers are restored."""
        single = self.world.size == 1
        buffers = list(self.network.buffers()) if self._norms or (single and self.accumulation_steps > 1) else []
        before = [buffer.clone() for buffer in buffers]  # a forward pass may change them
        total = torch.zeros((), device=self.optimizer.device)
        try:
            for part in range(self.accumulation_steps):
                ready = part > 0 and getattr(loader, "ready", False)  # if so, the step is finished on an interrupt
                with self.interrupts.waiting(single and not ready):
                    batch = next(loader)
                with sync_last_microbatch(self.network, last=part == self.accumulation_steps - 1):
                    loss = compute_loss(batch, step * self.accumulation_steps + part)
                    self.optimizer.backward(loss)
                total += loss.detach()
        except Interrupted:
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
            raise
        norm = self.optimizer.step(self.lr(step), step)
        settle_statistics(self._norms, buffers, before, self.optimizer, step, self.world)
        return total, norm

    def _log(self, step: int, loss: Tensor, norm: Tensor, waited: float) -> None:
        self.log.update(step, waited, loss=loss, grad_norm=norm)
        if not self.log.should_log(step):
            return
        self.world.barrier()  # it times out if a rank is stuck, unlike waiting for a device
        bad = int(self.optimizer.state["streak"].item())
        if bad >= MAX_BAD_STEPS:
            raise UserError(
                f"the gradient was not finite in the last {bad} steps (up to step {step}), which left the weights "
                "unchanged. Try a lower learning rate, --optim.clip 1, or --precision fp32 (or bf16 instead of fp16)"
            )
        self.log.log(step, lr=self.lr(step - 1), skipped_steps=self.optimizer.state["skipped"].item())

    def _is_milestone(self, step: int) -> bool:
        return is_multiple_of(step, self._checkpoint.keep_every_epochs / self.epoch)

    def _save(self, step: int, wait: bool) -> None:
        self.checkpoints.save(step, self.model, self.optimizer, images=self.images, wait=wait)

    def _print(self, text: str) -> None:
        print_plain(self._console, text)
