"""Linear probes on frozen features: fit many learning rates at once and choose the best on a held-out part.

The sweep of DINOv2 (arXiv 2304.07193, appendix), which suits small data: the global tokens of the last 1 or 4 blocks,
with and without the mean of the patch tokens, at thirteen learning rates. Features are first standardized by the train
set's statistics, like the parameter-free BatchNorm of MAE's probe, because MAE's features are not of unit scale.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from pixmim.evaluation.classification import (
    compare_held_out,
    hold_out_rows,
    is_unequal,
    majority,
    rated,
    same_classes,
    tally,
)
from pixmim.evaluation.context import BLOCKS, EvalContext, FeatureSet, Values
from pixmim.evaluation.linear_probe_mae import check_linear_mae, evaluate_linear_mae
from pixmim.evaluation.repeated import check_repeated, repeat, selected_blocks
from pixmim.evaluation.settings import LinearSettings
from pixmim.models.base import Features
from pixmim.utils import rng

RATES = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)
"""Learning rates per 256 images of a batch."""


@dataclass(frozen=True)
class ProbeConfig:
    """One member of the sweep."""

    blocks: int  # number of last blocks whose global tokens are used
    mean: bool  # use the mean of the patch tokens as well
    rate: float

    def select(self, features: FeatureSet | Features) -> Float[Tensor, "n d"]:
        """Return the features that this member uses."""
        parts = [features.vector[:, -self.blocks :].flatten(1)]
        return torch.cat(parts + [features.mean] * self.mean, dim=1)


@dataclass(frozen=True)
class Probe:
    """A linear classifier of features: the best of the sweep, fitted to the complete train set."""

    config: ProbeConfig  # the member of the sweep
    mean: Float[Tensor, " d"]  # mean of the train features (d)
    deviation: Float[Tensor, " d"]  # standard deviation of the train features (d)
    weights: Float[Tensor, "c e"]  # weights of each class, the bias last (c d+1)
    classes: list[str]
    held_out: float  # score of `compare_held_out` on the held-out part, of the same member fitted without it
    balanced: bool  # the score is the mean recall of the classes instead of the accuracy

    def scores(self, features: FeatureSet | Features) -> Float[Tensor, "n c"]:
        """Return the logits of each image."""
        x = (self.config.select(features).float().cpu() - self.mean) / (self.deviation + 1e-6)
        return F.pad(x, (0, 1), value=1.0) @ self.weights.T


def check_linear(context: EvalContext, settings: LinearSettings) -> None:
    """Raise UserError for data or settings that `evaluate_linear` would refuse."""
    if settings.protocol == "mae":
        check_linear_mae(context, settings)
    else:
        check_repeated(context, settings)


def evaluate_linear(context: EvalContext, settings: LinearSettings) -> Values:
    """Evaluate a linear probe by `fit_sweep` and `repeated.repeat`, or `evaluate_linear_mae`. Raises UserError."""
    if settings.protocol == "mae":
        yield from evaluate_linear_mae(context, settings)
        return
    epochs, blocks = 100 if settings.epochs is None else settings.epochs, selected_blocks(context, settings)

    def measure(train: FeatureSet, test: FeatureSet) -> Values:
        if blocks or settings.folds or settings.shots:
            probe = fit_sweep(train, epochs=epochs, seed=settings.seed)
        else:  # other evaluations may use it
            probe = cached_probe(context, settings.train, epochs, settings.seed)
        yield from evaluate_probe(probe, test, same_classes(train, test))

    train, test = (context.features(spec, blocks) for spec in settings.sources)
    yield from repeat(context, settings, train, test, measure)


def cached_probe(context: EvalContext, train: str, epochs: int, seed: int) -> Probe:
    """Return the result of `fit_sweep` on a dataset, computed once for all evaluations of a context."""
    return context.cached(
        ("probe", train, epochs, seed), lambda: fit_sweep(context.features(train)[0], epochs=epochs, seed=seed)
    )


def evaluate_probe(probe: Probe, test: FeatureSet, labels: Int[Tensor, " n"]) -> Values:
    """Yield `rated`, "majority", the held-out score and the member of the sweep; labels index its classes."""
    counts = tally(probe.scores(test).argmax(dim=1), labels, len(probe.classes))
    yield from rated(counts, probe.classes)
    yield "majority", majority(counts)
    yield "held_out", 100 * probe.held_out
    yield "setting/blocks", probe.config.blocks
    yield "setting/mean", float(probe.config.mean)
    yield "setting/rate", probe.config.rate
    yield "setting/chosen_by_balanced", float(probe.balanced)


def fit_sweep(train: FeatureSet, *, epochs: int = 100, batch: int = 256, held_out: float = 0.1, seed: int = 0) -> Probe:
    """Fit all members of the sweep, choose the best on the share `held_out` of train, and refit it on all of train.

    The held-out part is that of `hold_out_rows`. The best is that of `compare_held_out`: by balanced accuracy if the
    classes are unequal.
    """
    test, rest = map(torch.from_numpy, hold_out_rows(len(train.labels), train.groups, held_out, seed))
    classes = len(train.classes)
    best, chosen = -1.0, ProbeConfig(1, False, RATES[0])
    for blocks in sorted({1, min(BLOCKS, train.vector.shape[1])}):
        for mean in (False, True):
            x = standardize(ProbeConfig(blocks, mean, 0).select(train))[0]
            weights = fit(x[rest], train.labels[rest], classes, RATES, epochs, batch, seed)
            predictions = (F.pad(x[test], (0, 1), value=1.0) @ weights.transpose(1, 2)).argmax(dim=2)
            scores = compare_held_out(predictions, train.labels[test], train.labels, classes)
            for rate, score in zip(RATES, scores, strict=True):
                if score > best:
                    best, chosen = score, ProbeConfig(blocks, mean, rate)
    x, center, deviation = standardize(chosen.select(train))
    (weights,) = fit(x, train.labels, classes, (chosen.rate,), epochs, batch, seed)
    return Probe(chosen, center, deviation, weights, train.classes, best, is_unequal(train.labels))


def fit(
    x: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    classes: int,
    rates: tuple[float, ...],
    epochs: int,
    batch: int,
    seed: int,
) -> Float[Tensor, "r c e"]:
    """Fit one softmax regression per rate by SGD (momentum 0.9, no decay, cosine), all on the same batches.

    Returns weights with the bias as last column, e = d + 1. They are initialized to zero: only the order is random.
    """
    x = F.pad(x, (0, 1), value=1.0)
    weights = torch.zeros(len(rates), classes, x.shape[1])
    momentum = torch.zeros_like(weights)
    batch = min(batch, len(x))
    lr = torch.tensor(rates).view(-1, 1, 1) * batch / 256
    steps = max(1, epochs * len(x) // batch)
    order = np.concatenate([rng.permutation(seed, 1 + e, len(x)) for e in range(-(-steps * batch // len(x)))])
    for step in range(steps):
        rows = torch.from_numpy(order[step * batch : (step + 1) * batch])
        part = x[rows]
        # The gradient of the mean cross-entropy: (softmax - one-hot)^T x / batch, for each probe.
        error = (part @ weights.transpose(1, 2)).softmax(dim=2)
        error -= F.one_hot(labels[rows], classes)
        momentum.mul_(0.9).add_(error.transpose(1, 2) @ part / batch)
        weights -= momentum * lr * (0.5 + 0.5 * np.cos(np.pi * step / steps))
    return weights


def standardize(x: Float[Tensor, "n d"]) -> tuple[Tensor, Tensor, Tensor]:
    """Return features with zero mean and unit deviation, and their original mean and deviation (d)."""
    deviation, mean = torch.std_mean(x, dim=0)
    return (x - mean) / (deviation + 1e-6), mean, deviation
