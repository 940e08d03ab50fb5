"""Linear probes on frozen features: many learning rates at once, the best chosen on a part held out from train.

DINOv2's sweep (arXiv 2304.07193, appendix), which suits small data: the global tokens of the last 1 or 4 blocks, with
and without the mean of the patch tokens, at thirteen learning rates. Features are standardised first with the train
set's statistics, as the parameter-free BatchNorm of MAE's probe does: the scale of MAE's features is far from one.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from pixmim.evaluation import linear_probe_mae as probe
from pixmim.evaluation.classification import majority, open_labelled, rated, tally
from pixmim.evaluation.context import Bench, Values
from pixmim.evaluation.features import BLOCKS, Frozen, same_classes
from pixmim.evaluation.settings import Linear
from pixmim.models.base import Features
from pixmim.utils import rng

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
"""Learning rates per 256 images of a batch."""


@dataclass(frozen=True)
class Setting:
    """One member of the sweep: blocks used, whether the mean of the patch tokens is added, and the learning rate."""

    blocks: int
    mean: bool
    rate: float

    def select(self, features: Frozen | Features) -> Float[Tensor, "n d"]:
        parts = [features.vector[:, -self.blocks :].flatten(1)]
        return torch.cat(parts + [features.mean] * self.mean, dim=1)


@dataclass(frozen=True)
class Probe:
    """A linear classifier of features: what the sweep chose, fitted to all of train.

    mean, deviation  of train's features (d): others are standardised by them
    weights   of each class, the bias last (c e), e = d + 1
    classes   their names
    held_out  accuracy in [0, 1] of the same setting, fitted without the part held out, on that part
    """

    setting: Setting
    mean: Float[Tensor, " d"]
    deviation: Float[Tensor, " d"]
    weights: Float[Tensor, "c e"]
    classes: list[str]
    held_out: float

    def scores(self, features: Frozen | Features) -> Float[Tensor, "n c"]:
        """A score of each class for each image; a softmax makes probabilities of them."""
        x = (self.setting.select(features).float().cpu() - self.mean) / (self.deviation + 1e-6)
        return F.pad(x, (0, 1), value=1.0) @ self.weights.T


def check(bench: Bench, settings: Linear) -> None:
    """Raise UserError now for data or settings that `measure` would refuse."""
    if settings.protocol == "mae":
        probe.check(bench, settings)
    else:
        open_labelled(bench, settings.train, settings.test)


def measure(bench: Bench, settings: Linear) -> Values:
    """Top-1 accuracy on the test data: see `graded`, or `probe` for MAE's protocol. Raises UserError."""
    if settings.protocol == "mae":
        yield from probe.measure(bench, settings)
        return
    open_labelled(bench, settings.train, settings.test)
    test = bench.frozen(settings.test)
    wanted = same_classes(bench.frozen(settings.train), test)
    epochs = 100 if settings.epochs is None else settings.epochs
    yield from graded(fitted(bench, settings.train, epochs, settings.seed), test, wanted)


def fitted(bench: Bench, train: str, epochs: int, seed: int) -> Probe:
    """The probe that `choose` gives on a data set's features, fitted once for all evaluations of one call."""
    return bench.once(("probe", train, epochs, seed), lambda: choose(bench.frozen(train), epochs=epochs, seed=seed))


def graded(probe: Probe, test: Frozen, wanted: Int[Tensor, " n"]) -> Values:
    """How good a probe is, in per cent. wanted: the test labels in the numbers of the probe's classes.

    Yields what `labelled.rated` does, "majority", the accuracy on the held-out part, and the setting that won.
    """
    counts = tally(probe.scores(test).argmax(dim=1), wanted, len(probe.classes))
    yield from rated(counts, probe.classes)
    yield "majority", majority(counts)
    yield "held_out", 100 * probe.held_out
    yield "setting/blocks", probe.setting.blocks
    yield "setting/mean", float(probe.setting.mean)
    yield "setting/rate", probe.setting.rate


def choose(train: Frozen, *, epochs: int = 100, batch: int = 256, held_out: float = 0.1, seed: int = 0) -> Probe:
    """The probe of the sweep that is best on `held_out` of train, fitted anew on all of it."""
    order = torch.from_numpy(rng.permutation(seed, 0, len(train.labels)))
    held, kept = order.split([max(1, round(held_out * len(order))), len(order) - max(1, round(held_out * len(order)))])

    best, chosen = -1.0, Setting(1, False, RATES[0])
    for blocks in sorted({1, min(BLOCKS, train.vector.shape[1])}):
        for mean in (False, True):
            x = standardise(Setting(blocks, mean, 0).select(train))
            weights = fit(x[kept], train.labels[kept], len(train.classes), RATES, epochs, batch, seed)
            for rate, accuracy in zip(RATES, _accuracy(weights, x[held], train.labels[held]).tolist(), strict=True):
                if accuracy > best:
                    best, chosen = accuracy, Setting(blocks, mean, rate)

    x = chosen.select(train)
    deviation, middle = torch.std_mean(x, dim=0)
    (weights,) = fit(
        (x - middle) / (deviation + 1e-6), train.labels, len(train.classes), (chosen.rate,), epochs, batch, seed
    )
    return Probe(chosen, middle, deviation, weights, train.classes, best)


def fit(
    x: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    classes: int,
    rates: tuple[float, ...],
    epochs: int,
    batch: int,
    seed: int,
) -> Float[Tensor, "r c e"]:
    """Softmax regression by SGD (momentum 0.9, no decay, cosine), one probe for each rate, all in the same batches.

    Gives weights with the bias as last column, e = d + 1. Starts from zero, so that only the order is random.
    """
    x = F.pad(x, (0, 1), value=1.0)
    weights = torch.zeros(len(rates), classes, x.shape[1])
    momentum = torch.zeros_like(weights)
    batch = min(batch, len(x))
    lr = torch.tensor(rates).view(-1, 1, 1) * batch / 256
    steps = max(1, epochs * len(x) // batch)
    stream = np.concatenate([rng.permutation(seed, 1 + e, len(x)) for e in range(-(-steps * batch // len(x)))])
    for step in range(steps):
        rows = torch.from_numpy(stream[step * batch : (step + 1) * batch])
        part = x[rows]
        # The gradient of the mean cross-entropy: (softmax - one-hot)^T x / batch, for each probe.
        error = (part @ weights.transpose(1, 2)).softmax(dim=2)
        error -= F.one_hot(labels[rows], classes)
        momentum.mul_(0.9).add_(error.transpose(1, 2) @ part / batch)
        weights -= momentum * lr * (0.5 + 0.5 * np.cos(np.pi * step / steps))
    return weights


def standardise(train: Float[Tensor, "n d"], *others: Tensor) -> Tensor | tuple[Tensor, ...]:
    """Zero mean and unit deviation in each feature, by the statistics of `train`, for it and for the others."""
    deviation, mean = torch.std_mean(train, dim=0)
    done = tuple((x - mean) / (deviation + 1e-6) for x in (train, *others))
    return done if others else done[0]


def _accuracy(weights: Tensor, x: Tensor, labels: Tensor) -> Tensor:
    """Share of right answers of each probe (r)."""
    answers = (F.pad(x, (0, 1), value=1.0) @ weights.transpose(1, 2)).argmax(dim=2)
    return (answers == labels).float().mean(dim=1)
