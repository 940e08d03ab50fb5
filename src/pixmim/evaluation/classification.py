"""Labelled data for classification: what is checked before anything is measured, and how good the answers are."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import cast

import numpy as np
import torch
from jaxtyping import Int
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from pixmim.data.dataset import BadImage, Encoded, Placed, Source
from pixmim.data.loader import iterate_in_order
from pixmim.data.synthetic import Shapes
from pixmim.evaluation.context import Bench, Values
from pixmim.evaluation.features import check_finite, numbers_among
from pixmim.evaluation.frozen_encoder import Encoder
from pixmim.evaluation.metrics import recalls, wilson_interval
from pixmim.training.precision import autocast
from pixmim.transforms.crops import evaluation_crop
from pixmim.utils.console import label, say
from pixmim.utils.errors import UserError
from pixmim.utils.progress import progress

_LISTED = 12  # classes named in a line
_RESOLVED = 100_000  # images whose links are followed one by one
_COMPARED_BYTES = 2**28  # of images of the same length that are compared


@dataclass(frozen=True)
class Labelled:
    """Train and test data of the same classes. labels: of each train image; wanted: of each test image (n)."""

    train: Source
    test: Source
    labels: Int[Tensor, " n"]
    wanted: Int[Tensor, " m"]
    classes: list[str]


def open_labelled(bench: Bench, train: str, test: str, *, all_classes: bool = False) -> Labelled:
    """Open both, and print their classes, once for all evaluations of a bench. Raises UserError: see `check_labelled`.

    all_classes  refuse test data that lack a class of the train data
    """

    def make() -> Labelled:
        return check_labelled(bench.data(train), bench.data(test), bench.console)

    found = bench.once(("labelled", train, test), make)
    for name in found.classes if all_classes else ():
        if name not in found.test.classes:
            raise UserError(f"the test data {found.test.spec} lack the class '{name}' of the train data")
    return found


def check_labelled(train: Source, test: Source, console: Console | None = None) -> Labelled:
    """Match the classes of train and test data by name, and print the share of each.

    Prints a warning if test images are train images as well. Raises UserError for data without labels or with fewer
    than two classes, and for a test class that train lacks.
    """
    out = console or Console(quiet=True)
    lines = [check_classes(data) for data in (train, test)]
    number = numbers_among(test.classes, train.classes)
    labels, wanted = (torch.from_numpy(cast(np.ndarray, data.labels)) for data in (train, test))
    for what, line in zip(("train", "test"), lines, strict=True):
        say(out, f"{what} data: {line}")
    if not out.quiet:
        warn_shared(train, test, out)
    wanted = number[wanted]
    without = sorted(set(wanted.tolist()) - set(labels.tolist()))
    if without:
        some = a_few([label(train.classes[place]) for place in without])
        say(out, f"warning: the train data have no image of {len(without)} test classes, whose recall is 0: {some}")
    return Labelled(train, test, labels, wanted, train.classes)


def check_classes(data: Source) -> str:
    """Return a line about the classes of labelled data. Raises UserError if there are fewer than two with images."""
    if data.labels is None:
        raise UserError(data.no_labels)
    without = np.flatnonzero(data.labels < 0)
    if len(without):
        raise UserError(
            f"{len(without):,} of the {len(data):,} images of {data.spec} have no label, the first is "
            f"{data.locate(int(without[0]))}: label or remove them"
        )
    counts = np.bincount(data.labels, minlength=len(data.classes))
    check_several(data.spec, [name for name, count in zip(data.classes, counts, strict=True) if count])
    return f"{len(data):,} images of {shares(data.classes, counts.tolist())}"


def check_several(spec: str, names: Sequence[str]) -> None:
    """Raise UserError if fewer than two classes are left."""
    if len(names) < 2:
        only = f"a single class, '{names[0]}'" if names else "no class"
        raise UserError(f"{spec} has {only}: there is nothing to tell apart, and every answer would be right")


def a_few(names: Sequence[str]) -> str:
    """Return the first six names, and dots for more."""
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def shares(names: Sequence[str], counts: Sequence[int]) -> str:
    """Return "3 classes: a 50.0 %, b 30.0 %, c 20.0 %", the largest first; of very many, some."""
    total, order = max(1, sum(counts)), sorted(range(len(names)), key=lambda i: -counts[i])
    listed = [f"{label(names[i])} {100 * counts[i] / total:.1f} %" for i in islice(order, _LISTED)]
    if len(names) > _LISTED:
        listed.append(f"... {label(names[order[-1]])} {100 * counts[order[-1]] / total:.2g} %")
    return f"{len(names):,} {'class' if len(names) == 1 else 'classes'}: {', '.join(listed)}"


def warn_shared(train: Source, test: Source, console: Console) -> None:
    """Print a warning if test images are train images as well."""
    count = len(shared(train, test))
    if count:
        some = "all" if count == len(test) else f"{count:,} of the"
        say(
            console,
            f"warning: {some} {len(test):,} test images ({test.spec}) are train images as well: for these, the measure "
            "tells what is remembered, not what is recognized. Give other images as --test, or remove them",
        )


def shared(train: Source, test: Source) -> set[int]:
    """Return the indices of test images that are train images as well.

    These have the same place (links are followed), or the same bytes, as far as images of the same length are few.
    """
    if isinstance(train, Shapes) and isinstance(test, Shapes):
        same = (train.seed, train.size, train.texture) == (test.seed, test.size, test.texture)
        return set(range(min(len(train), len(test)))) if same else set()
    each = len(train) + len(test) <= _RESOLVED
    known = set(_places(train, each))
    found = {index for index, place in enumerate(_places(test, each)) if place in known}
    if not each or not isinstance(train, Encoded) or not isinstance(test, Encoded):
        return found
    ours, theirs = _lengths(train), _lengths(test)
    common = (set(ours) & set(theirs)) - {0}
    left = [i for i, length in enumerate(theirs) if length in common and i not in found]
    before = [i for i, length in enumerate(ours) if length in {theirs[k] for k in left}]
    if sum(ours[i] for i in before) + sum(theirs[i] for i in left) > _COMPARED_BYTES:
        return found
    digests = {_digest(train, i) for i in before} - {None}
    return found | {i for i in left if _digest(test, i) in digests}


def _places(data: Source, each: bool) -> Iterator[object]:
    """The place of each image: the real path of its file, or of its folder alone; of a shard, with the position."""
    real = lru_cache(4096)(os.path.realpath)
    for index in range(len(data)):
        if not isinstance(data, Placed):
            yield data.locate(index)
            continue
        file, first, _ = data.extent(index)
        folder, name = os.path.split(file)
        yield (os.path.realpath(file) if each else os.path.join(real(folder), name)), first


def _lengths(data: Source) -> list[int]:
    """The bytes of each image's file; 0 where that is not known, or it is not on this machine."""
    if not isinstance(data, Placed):
        return []
    found = []
    for file, _, length in map(data.extent, range(len(data))):
        try:
            found.append(0 if "://" in file else length or os.stat(file).st_size)
        except (OSError, ValueError):
            found.append(0)
    return found


def _digest(data: Encoded, index: int) -> bytes | None:
    try:
        return hashlib.sha256(data.read(index)).digest()
    except BadImage:
        return None


def tally(answers: Int[Tensor, " n"], wanted: Int[Tensor, " n"], classes: int) -> Int[Tensor, "2 k"]:
    """Count, for each class, the images that are answered rightly, and all of its images."""
    right = torch.bincount(wanted[answers == wanted], minlength=classes)
    return torch.stack([right, torch.bincount(wanted, minlength=classes)])


def rated(counts: Int[Tensor, "2 k"], names: Sequence[str], prefix: str = "") -> Values:
    """Yield how good answers are, in per cent, from what `tally` counted.

    "top1" and the ends of its 95 % interval; "recall/NAME" of each class that has images, and "balanced", their mean.
    `prefix` comes before all of these names. Raises UserError if the images are of fewer than two classes.
    """
    right, total = counts
    check_several("what could be read of the test data", [n for n, c in zip(names, total, strict=True) if c])
    low, high = wilson_interval(int(right.sum()), int(total.sum()))
    recall = recalls(right, total)
    yield f"{prefix}top1", 100 * float(right.sum()) / float(total.sum())
    yield f"{prefix}top1/low", 100 * low
    yield f"{prefix}top1/high", 100 * high
    yield f"{prefix}balanced", 100 * float(recall.nanmean())
    for name, value, count in zip(names, recall.tolist(), total.tolist(), strict=True):
        if count:
            yield f"{prefix}recall/{name}", 100 * value


def majority(counts: Int[Tensor, "2 k"]) -> float:
    """The share of the largest class in per cent: what a constant answer reaches at best."""
    return 100 * float(counts[1].max()) / float(counts[1].sum())


def grade(
    bench: Bench, data: Labelled, encoder: Encoder, size: tuple[int, int], classify: Callable[[Tensor], Tensor]
) -> Values:
    """How good the answers to the test data are, resized to 256/224 of the size, and their centre cut out.

    encoder   how images are fed: normalisation, device, precision
    classify  from normalised images to a score for each class

    Yields what `rated` does, "top5" where there are more than 5 classes, "loss", the mean cross-entropy, and
    "majority". Raises UserError if not one image can be read, or scores are not finite.
    """
    counts, among, loss = torch.zeros(2, len(data.classes), dtype=torch.int64), 0, 0.0
    with progress(f"answers to {data.test.spec}", len(data.test), bench.console) as advance:
        skipped = bench.skipped(data.test)
        for images, indices, end in iterate_in_order(data.test, evaluation_crop(size), skipped=skipped, batch=256):
            if len(indices):
                x = encoder.ready(images)
                with torch.no_grad(), autocast(encoder.device, encoder.precision):
                    scores = classify(x)
                scores, wanted = scores.float().cpu(), data.wanted[torch.from_numpy(indices)]
                check_finite(scores, "scores of the classifier")
                loss += float(F.cross_entropy(scores, wanted, reduction="sum"))
                best = scores.topk(min(5, len(data.classes)), dim=1).indices
                among += int((best == wanted[:, None]).sum())
                counts += tally(best[:, 0], wanted, len(data.classes))
            advance(end)
    count = int(counts[1].sum())
    if not count:
        raise UserError(f"not one image of {data.test.spec} can be read: see evaluations-skipped.csv")
    yield from rated(counts, data.classes)
    if len(data.classes) > 5:
        yield "top5", 100 * among / count
    yield "loss", loss / count
    yield "majority", majority(counts)
