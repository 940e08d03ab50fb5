"""Classification: check labeled data before a measurement, and compute accuracy and recalls after it."""

import hashlib
import math
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

from pixmim.data.dataset import BadImage, HasBytes, HasExtent, ImageDataset
from pixmim.data.loader import iterate_in_order
from pixmim.data.synthetic import SyntheticShapes
from pixmim.evaluation.context import EvalContext, Values
from pixmim.evaluation.features import FeatureSet, check_finite
from pixmim.evaluation.frozen_encoder import FrozenEncoder
from pixmim.training.precision import autocast
from pixmim.transforms.crops import evaluation_crop
from pixmim.utils.console import label, print_plain, progress
from pixmim.utils.errors import UserError, did_you_mean

_LISTED = 12  # classes named in a line
_RESOLVED = 100_000  # images whose links are followed one by one
_COMPARED_BYTES = 2**28  # of images of the same length that are compared


@dataclass(frozen=True)
class LabeledSplits:
    """Train and test data of the same classes.

    Attributes:
        labels: Class of each train image (n).
        wanted: Class of each test image (m), as an index into the classes of the train data.
    """

    train: ImageDataset
    test: ImageDataset
    labels: Int[Tensor, " n"]
    wanted: Int[Tensor, " m"]
    classes: list[str]


def open_labeled(context: EvalContext, train: str, test: str, *, all_classes: bool = False) -> LabeledSplits:
    """Open train and test data and print their classes, once for all evaluations of a context.

    Args:
        context: The context.
        train: Labeled data to learn from.
        test: Labeled data to measure on.
        all_classes: Refuse test data that lack a class of the train data.

    Raises:
        UserError: See `check_labeled`.
    """

    def make() -> LabeledSplits:
        return check_labeled(context.data(train), context.data(test), context.console)

    found = context.cached(("labeled", train, test), make)
    for name in found.classes if all_classes else ():
        if name not in found.test.classes:
            raise UserError(f"the test data {found.test.spec} lack the class '{name}' of the train data")
    return found


def check_labeled(train: ImageDataset, test: ImageDataset, console: Console | None = None) -> LabeledSplits:
    """Match the classes of train and test data by name, print their shares, and warn of images that are in both.

    Raises:
        UserError: If there are no labels or fewer than two classes, or the train data lack a test class.
    """
    out = console or Console(quiet=True)
    lines = [check_classes(data) for data in (train, test)]
    labels, wanted = (torch.from_numpy(cast(np.ndarray, data.labels)) for data in (train, test))
    wanted = class_indices(test.classes, train.classes, "the test data")[wanted]
    for what, line in zip(("train", "test"), lines, strict=True):
        print_plain(out, f"{what} data: {line}")
    if not out.quiet:
        warn_shared(train, test, out)
    without = sorted(set(wanted.tolist()) - set(labels.tolist()))
    if without:
        some = shortened_list([label(train.classes[place]) for place in without])
        print_plain(
            out, f"warning: the train data have no image of {len(without)} test classes, whose recall is 0: {some}"
        )
    return LabeledSplits(train, test, labels, wanted, train.classes)


def check_classes(data: ImageDataset) -> str:
    """Return a line about the classes of labeled data.

    Raises:
        UserError: If an image has no label, or fewer than two classes have images.
    """
    if data.labels is None:
        raise UserError(data.no_labels_message)
    without = np.flatnonzero(data.labels < 0)
    if len(without):
        raise UserError(
            f"{len(without):,} of the {len(data):,} images of {data.spec} have no label, the first is "
            f"{data.path_of(int(without[0]))}: label or remove them"
        )
    counts = np.bincount(data.labels, minlength=len(data.classes))
    check_several(data.spec, [name for name, count in zip(data.classes, counts, strict=True) if count])
    return f"{len(data):,} images of {shares(data.classes, counts.tolist())}"


def class_indices(classes: Sequence[str], known: Sequence[str], spec: str) -> Int[Tensor, " k"]:
    """Return the index of each class among the known ones. Raises UserError for classes that are not known."""
    index = {name: i for i, name in enumerate(known)}
    unknown = [name for name in classes if name not in index]
    if unknown:
        more = f" and {len(unknown) - 1:,} more" if len(unknown) > 1 else ""
        raise UserError(
            f"{spec} has a class '{unknown[0]}'{more}, which is not one of the {len(known)} known classes"
            f"{did_you_mean(unknown[0], known)}"
        )
    return torch.tensor([index[name] for name in classes])


def labels_among(data: ImageDataset, known: Sequence[str]) -> Int[Tensor, " n"]:
    """Return the label of each image as an index into the known classes.

    Raises:
        UserError: If a class is not known, or `check_classes` refuses the data.
    """
    check_classes(data)
    return class_indices(data.classes, known, data.spec)[torch.from_numpy(cast(np.ndarray, data.labels))]


def same_classes(train: FeatureSet, test: FeatureSet) -> Int[Tensor, " n"]:
    """Return the test labels as indices into the classes of the train set. Raises UserError as `class_indices`."""
    return class_indices(test.classes, train.classes, "the test data")[test.labels]


def check_several(spec: str, names: Sequence[str]) -> None:
    """Raise UserError if fewer than two classes are left."""
    if len(names) < 2:
        only = f"a single class, '{names[0]}'" if names else "no class"
        raise UserError(f"{spec} has {only}: there is nothing to tell apart, and every answer would be right")


def shortened_list(names: Sequence[str]) -> str:
    """Return the first six names, and dots for more."""
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def shares(names: Sequence[str], counts: Sequence[int]) -> str:
    """Return "3 classes: a 50.0 %, b 30.0 %, c 20.0 %", the largest first; at most twelve are named."""
    total, order = max(1, sum(counts)), sorted(range(len(names)), key=lambda i: -counts[i])
    listed = [f"{label(names[i])} {100 * counts[i] / total:.1f} %" for i in islice(order, _LISTED)]
    if len(names) > _LISTED:
        listed.append(f"... {label(names[order[-1]])} {100 * counts[order[-1]] / total:.2g} %")
    return f"{len(names):,} {'class' if len(names) == 1 else 'classes'}: {', '.join(listed)}"


def warn_shared(train: ImageDataset, test: ImageDataset, console: Console) -> None:
    """Print a warning if test images are train images as well."""
    count = len(shared(train, test))
    if count:
        some = "all" if count == len(test) else f"{count:,} of the"
        print_plain(
            console,
            f"warning: {some} {len(test):,} test images ({test.spec}) are train images as well: for these, the measure "
            "tells what is remembered, not what is recognized. Give other images as --test, or remove them",
        )


def shared(train: ImageDataset, test: ImageDataset) -> set[int]:
    """Return the indices of test images that are train images as well.

    These have the same path (links are followed) or the same bytes. Bytes are compared if few images have the same
    length.
    """
    if isinstance(train, SyntheticShapes) and isinstance(test, SyntheticShapes):
        same = (train.seed, train.size, train.texture) == (test.seed, test.size, test.texture)
        return set(range(min(len(train), len(test)))) if same else set()
    each = len(train) + len(test) <= _RESOLVED
    known = set(_places(train, each))
    found = {index for index, place in enumerate(_places(test, each)) if place in known}
    if not each or not isinstance(train, HasBytes) or not isinstance(test, HasBytes):
        return found
    train_sizes, test_sizes = _lengths(train), _lengths(test)
    common = (set(train_sizes) & set(test_sizes)) - {0}
    test_left = [i for i, length in enumerate(test_sizes) if length in common and i not in found]
    train_left = [i for i, length in enumerate(train_sizes) if length in {test_sizes[k] for k in test_left}]
    if sum(train_sizes[i] for i in train_left) + sum(test_sizes[i] for i in test_left) > _COMPARED_BYTES:
        return found
    digests = {_digest(train, i) for i in train_left} - {None}
    return found | {i for i in test_left if _digest(test, i) in digests}


def _places(data: ImageDataset, each: bool) -> Iterator[object]:
    """Yield where each image is: the real path of its file, or only of its folder; in a shard, with the offset."""
    real = lru_cache(4096)(os.path.realpath)
    for index in range(len(data)):
        if not isinstance(data, HasExtent):
            yield data.path_of(index)
            continue
        file, first, _ = data.extent(index)
        folder, name = os.path.split(file)
        yield (os.path.realpath(file) if each else os.path.join(real(folder), name)), first


def _lengths(data: ImageDataset) -> list[int]:
    """Return the bytes of each image's file; 0 if that is unknown, or the file is on another machine."""
    if not isinstance(data, HasExtent):
        return []
    found = []
    for file, _, length in map(data.extent, range(len(data))):
        try:
            found.append(0 if "://" in file else length or os.stat(file).st_size)
        except (OSError, ValueError):
            found.append(0)
    return found


def _digest(data: HasBytes, index: int) -> bytes | None:
    try:
        return hashlib.sha256(data.read(index)).digest()
    except BadImage:
        return None


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % confidence interval of the share `correct` / `total` by Wilson's score, both ends in [0, 1]."""
    if total == 0:
        return 0.0, 1.0
    share = correct / total
    center = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return (center - spread) / (1 + z * z / total), (center + spread) / (1 + z * z / total)


def tally(answers: Int[Tensor, " n"], wanted: Int[Tensor, " n"], classes: int) -> Int[Tensor, "2 k"]:
    """Count, for each class, the images that are predicted right, and all of its images."""
    right = torch.bincount(wanted[answers == wanted], minlength=classes)
    return torch.stack([right, torch.bincount(wanted, minlength=classes)])


def rated(counts: Int[Tensor, "2 k"], names: Sequence[str], prefix: str = "") -> Values:
    """Yield metrics in per cent from the counts of `tally`, with `prefix` before their names.

    "top1" and the ends of its 95 % interval; "recall/NAME" of each class that has images; "balanced", the mean recall.

    Raises:
        UserError: If the images are of fewer than two classes.
    """
    right, total = counts
    check_several("what could be read of the test data", [n for n, c in zip(names, total, strict=True) if c])
    low, high = wilson_interval(int(right.sum()), int(total.sum()))
    recall = torch.where(total > 0, right.double() / total.double(), math.nan)
    yield f"{prefix}top1", 100 * float(right.sum()) / float(total.sum())
    yield f"{prefix}top1/low", 100 * low
    yield f"{prefix}top1/high", 100 * high
    yield f"{prefix}balanced", 100 * float(recall.nanmean())
    for name, value, count in zip(names, recall.tolist(), total.tolist(), strict=True):
        if count:
            yield f"{prefix}recall/{name}", 100 * value


def majority(counts: Int[Tensor, "2 k"]) -> float:
    """Return the share of the largest class in per cent: the best that a constant prediction reaches."""
    return 100 * float(counts[1].max()) / float(counts[1].sum())


def evaluate_classifier(
    context: EvalContext,
    data: LabeledSplits,
    encoder: FrozenEncoder,
    size: tuple[int, int],
    classify: Callable[[Tensor], Tensor],
) -> Values:
    """Evaluate a classifier on the test data, resized to 256/224 of `size` and cropped at the center.

    Args:
        context: The context.
        data: Train and test data.
        encoder: Normalization, device and precision.
        size: (h, w) of the crop.
        classify: From normalized images to a score for each class.

    Yields:
        What `rated` does; "top5" if there are more than 5 classes; "loss", the mean cross-entropy; and "majority".

    Raises:
        UserError: If no image can be read, or scores are not finite.
    """
    counts, among, loss = torch.zeros(2, len(data.classes), dtype=torch.int64), 0, 0.0
    with progress(f"answers to {data.test.spec}", len(data.test), context.console) as advance:
        skipped = context.skipped(data.test)
        for images, indices, end in iterate_in_order(data.test, evaluation_crop(size), skipped=skipped, batch=256):
            if len(indices):
                x = encoder.preprocess(images)
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
