"""How long a run is, in steps, and the learning rate at each of them."""

import math
from dataclasses import dataclass

from pixmim.config import Run


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from `first`, then half a cosine down to `final`; both step by step (MAE, appendix A).

    Or with a `drop`, as SimMIM's 800 epochs: constant after the warm-up, and a tenth of that from `drop` on.

    steps   updates in the whole run
    warmup  updates of warm-up
    peak, final, first  learning rates
    drop    update from which on the rate is a tenth of the peak; None: a cosine
    """

    steps: int
    warmup: int
    peak: float
    final: float
    first: float = 0.0
    drop: int | None = None

    @staticmethod
    def of(run: Run, images: int) -> "Schedule":
        """The schedule of a run over `images` images. Warm-up takes at most a fifth of it, a drop its share of it."""
        steps_an_epoch = images / run.batch_size
        steps = run.steps if run.steps is not None else max(1, round(run.epochs * steps_an_epoch))
        warmup = min(round(run.optim.warmup * steps_an_epoch), steps // 5)
        drop = round(run.optim.drop_at * steps) if run.optim.schedule == "step" else None
        return Schedule(steps, warmup, run.lr, run.optim.final_lr, run.optim.first_lr, drop)

    def lr(self, step: int) -> float:
        """The learning rate of update `step`, counted from 0."""
        if step < self.warmup:
            return self.first + (self.peak - self.first) * step / self.warmup
        if self.drop is not None:
            return self.peak if step < self.drop else self.peak / 10
        through = (step - self.warmup) / (self.steps - self.warmup)
        return self.final + (self.peak - self.final) * 0.5 * (1 + math.cos(math.pi * through))
