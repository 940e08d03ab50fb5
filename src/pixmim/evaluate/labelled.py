"""Two labelled data sets that a classifier learns from and is measured on, and how good its answers are."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from pixmim.data.feed.loader import in_order
from pixmim.data.patience import progress
from pixmim.data.source import Source
from pixmim.engine.device import autocast
from pixmim.errors import UserError
from pixmim.evaluate.bench import Bench
from pixmim.evaluate.encoder import Encoder
from pixmim.evaluate.features import numbers_among
from pixmim.metrics import wilson_interval
from pixmim.transforms import evaluation_crop


@dataclass(frozen=True)
class Labelled:
    """Train and test data of the same classes. labels: of each train image; wanted: of each test image (n)."""

    train: Source
    test: Source
    labels: Int[Tensor, " n"]
    wanted: Int[Tensor, " m"]
    classes: list[str]


def open_labelled(bench: Bench, train: str, test: str) -> Labelled:
    """Open both. Raises UserError where there are no labels, a single class, or other classes here than there."""
    learnt, measured = bench.data(train), bench.data(test)
    for data in (learnt, measured):
        if data.labels is None:
            raise UserError(data.no_labels)
    if len(learnt.classes) < 2:
        raise UserError(f"{learnt.spec} has a single class, '{learnt.classes[0]}': there is nothing to tell apart")
    number = numbers_among(measured.classes, learnt.classes)
    for name in learnt.classes:
        if name not in measured.classes:
            raise UserError(f"the test data {measured.spec} lack the class '{name}' of the train data")
    labels, wanted = (torch.from_numpy(cast(np.ndarray, data.labels)) for data in (learnt, measured))
    return Labelled(learnt, measured, labels, number[wanted], learnt.classes)


def grade(
    bench: Bench, data: Labelled, encoder: Encoder, size: tuple[int, int], classify: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, float]]:
    """How good the answers to the test data are, resized to 256/224 of the size, and their centre cut out.

    encoder   how images are fed: normalisation, device, precision
    classify  from normalised images to a score for each class

    Yields "top1" in per cent, the ends of its 95 % interval, "top5" where there are more than 5 classes, and "loss",
    the mean cross-entropy. Raises UserError if not one image can be read.
    """
    right, among, loss, count = 0, 0, 0.0, 0
    with progress(f"answers to {data.test.spec}", len(data.test), bench.console) as advance:
        skipped = bench.skipped(data.test)
        for images, indices, end in in_order(data.test, evaluation_crop(size), skipped=skipped, batch=256):
            if len(indices):
                x = encoder.ready(images)
                with torch.no_grad(), autocast(encoder.device, encoder.precision):
                    scores = classify(x)
                scores, wanted = scores.float().cpu(), data.wanted[torch.from_numpy(indices)]
                loss += float(F.cross_entropy(scores, wanted, reduction="sum"))
                best = scores.topk(min(5, len(data.classes)), dim=1).indices == wanted[:, None]
                right += int(best[:, 0].sum())
                among += int(best.sum())
                count += len(wanted)
            advance(end)
    if not count:
        raise UserError(f"not one image of {data.test.spec} can be read: see evaluations-skipped.csv")
    low, high = wilson_interval(right, count)
    yield "top1", 100 * right / count
    yield "top1/low", 100 * low
    yield "top1/high", 100 * high
    if len(data.classes) > 5:
        yield "top5", 100 * among / count
    yield "loss", loss / count
