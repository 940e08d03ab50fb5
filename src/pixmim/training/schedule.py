"""How long a run is, in steps, and the learning rate at each of them."""

import math
from dataclasses import dataclass

from pixmim.config import PretrainConfig


@dataclass(frozen=True)
class Schedule:
    """Compute the learning rate of each step: linear warm-up from `first`, then half a cosine down to `final`.

    MAE's cosine begins at the end of the warm-up (arXiv 2111.06377, appendix A). SimMIM's and DeiT III's counts from
    the first step, so the warm-up replaces its beginning (timm's CosineLRScheduler with `warmup_prefix=False`).
    With a `drop`, as in SimMIM's 800 epochs, the rate is constant after the warm-up, and a tenth from `drop` on.

    steps   steps of the whole run
    warmup  steps of warm-up
    peak, final, first  learning rates
    drop    step from which on the rate is a tenth of the peak; None: a cosine
    warmup_prefix  True: the cosine begins after the warm-up. False: at step 0
    """

    steps: int
    warmup: int
    peak: float
    final: float
    first: float = 0.0
    drop: int | None = None
    warmup_prefix: bool = True

    @staticmethod
    def of(config: PretrainConfig, images: int) -> "Schedule":
        """The schedule of a run over `images` images. Warm-up takes at most a fifth of it, a drop its share of it."""
        steps_an_epoch = images / config.batch_size
        steps = config.steps if config.steps is not None else max(1, round(config.epochs * steps_an_epoch))
        warmup = min(round(config.optim.warmup * steps_an_epoch), steps // 5)
        drop = round(config.optim.lr_drop_at * steps) if config.optim.schedule == "step" else None
        return Schedule(
            steps,
            warmup,
            config.lr,
            config.optim.min_lr,
            config.optim.warmup_start_lr,
            drop,
            config.optim.warmup_prefix,
        )

    def lr(self, step: int) -> float:
        """The learning rate of update `step`, counted from 0."""
        if step < self.warmup:
            return self.first + (self.peak - self.first) * step / self.warmup
        if self.drop is not None:
            return self.peak if step < self.drop else self.peak / 10
        begin = self.warmup if self.warmup_prefix else 0
        through = (step - begin) / (self.steps - begin)
        return self.final + (self.peak - self.final) * 0.5 * (1 + math.cos(math.pi * through))
