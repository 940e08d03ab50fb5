"""Classification: check labeled data before an evaluation, and compute accuracy and recalls after it."""

import math
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from pixmim.data.dataset import HasExtent, ImageDataset
from pixmim.data.duplicates import digests, file_sizes
from pixmim.data.synthetic import SyntheticShapes
from pixmim.evaluation.context import EvalContext, FeatureSet, Values, check_finite, read_batches
from pixmim.evaluation.frozen_encoder import FrozenEncoder
from pixmim.training.precision import autocast
from pixmim.transforms.crops import evaluation_crop
from pixmim.utils import rng
from pixmim.utils.console import label, print_plain
from pixmim.utils.errors import UserError, did_you_mean

_MAX_LISTED = 12  # classes in a line
_MAX_RESOLVED = 100_000  # images whose symbolic links are resolved one by one
_MAX_COMPARED_BYTES = 2**28  # bytes of images of equal size that are compared

_NARROW = "intervals count all test images as independent: those of one group make them too narrow"


@dataclass(frozen=True)
class LabeledSplits:
    """Train and test data with the same classes."""

    train: ImageDataset  # images to train on
    test: ImageDataset  # images to evaluate on
    train_labels: Int[Tensor, " n"]  # class of each train image (n)
    test_labels: Int[Tensor, " m"]  # class of each test image (m), as an index into `classes`
    classes: list[str]  # names of the classes of the train data


def open_labeled(context: EvalContext, train: str, test: str) -> LabeledSplits:
    """Open and check (`check_labeled`) train and test data, once for all contexts that share data. Raises UserError."""
    return context.once_for_all(
        ("labeled", train, test), lambda: check_labeled(context.data(train), context.data(test), context.console)
    )


def check_labeled(train: ImageDataset, test: ImageDataset, console: Console | None = None) -> LabeledSplits:
    """Match the classes of train and test data by name, print their shares, and warn of images that are in both.

    Raises UserError if there are no labels or fewer than two classes, if the train data lack a test class, or if a
    group, such as a patient, has images in both.
    """
    lines = [check_classes(data) for data in (train, test)]
    train_labels = torch.from_numpy(cast(np.ndarray, train.labels))
    test_labels = torch.from_numpy(cast(np.ndarray, test.labels))
    test_labels = class_indices(test.classes, train.classes, "the test data", test_labels)[test_labels]
    for name, line in zip(("train", "test"), lines, strict=True):
        print_plain(console, f"{name} data: {line}")
    for line in alike_classes(train.classes):
        print_plain(console, line)
    groups = [
        {data.group_names[i] for i in np.unique(data.groups)} - {""} if data.groups is not None else set()
        for data in (train, test)
    ]
    if shared := sorted(groups[0] & groups[1]):
        raise UserError(
            f"{len(shared):,} groups have images in both the train data {train.spec} and the test data {test.spec}: "
            f"{shortened_list(shared)}. Results would measure memorization: move each group to one of them, or split "
            "one table with --labelled. If the column is no group, name another one, such as ,group=path"
        )
    if test.groups is not None:
        sizes = np.bincount(test.groups, minlength=len(test.group_names)).tolist()
        if any(size > 1 and name for size, name in zip(sizes, test.group_names, strict=True)):
            print_plain(console, _NARROW)
    if console is not None and not console.quiet:
        warn_shared(train, test, console)
    missing = sorted(set(test_labels.tolist()) - set(train_labels.tolist()))
    if missing:
        names = shortened_list([label(train.classes[index]) for index in missing])
        print_plain(console, f"warning: {len(missing)} test classes have no train image, and a recall of 0: {names}")
    return LabeledSplits(train, test, train_labels, test_labels, train.classes)


def check_classes(data: ImageDataset) -> str:
    """Return a line about the classes of labeled data. Raises UserError for unlabeled images, or a single class."""
    if data.labels is None:
        raise UserError(data.no_labels_message)
    unlabeled = np.flatnonzero(data.labels < 0)
    if len(unlabeled):
        raise UserError(
            f"{len(unlabeled):,} of the {len(data):,} images of {data.spec} have no label, the first is "
            f"{data.path_of(int(unlabeled[0]))}: label or remove them"
        )
    numbers, counts = np.unique(data.labels, return_counts=True)  # not of classes without an image
    names = [data.classes[number] for number in numbers]
    _check_several(data.spec, names)
    groups = f", in {len(np.unique(data.groups)):,} groups" if data.groups is not None else ""
    note = f" ({data.left_out})" if data.left_out else ""
    return f"{len(data):,} images of {shares(names, counts.tolist())}{groups}{note}"


def alike_classes(names: Sequence[str]) -> list[str]:
    """Return a warning if names of classes differ only in case, spaces, equal characters or the form of a number."""
    groups: dict[str, list[str]] = {}
    for name in names:
        key = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
        number = re.fullmatch(r"(-?)0*([0-9]+)(?:\.0*)?", key)  # 007, 7 and 7.0
        groups.setdefault(number[1] + number[2] if number else key, []).append(name)
    alike = [f"{' and '.join(repr(label(name)) for name in group)}" for group in groups.values() if len(group) > 1]
    if not alike:
        return []
    return [
        "warning: classes differ only in case, spaces, Unicode normalization or the form of a number, and are nearly "
        f"always one class: {shortened_list(alike)}. They are measured as separate ones: rename them, unless they "
        "should be"
    ]


def class_indices(
    classes: Sequence[str], known: Sequence[str], spec: str, labels: npt.NDArray[np.integer] | Tensor
) -> Int[Tensor, " k"]:
    """Return the index of each class among the known ones; -1 for an unknown one without a label.

    Some sources name more classes than their images have. Raises UserError if one of the `labels` is of an unknown
    class.
    """
    index = {name: i for i, name in enumerate(known)}
    unknown = [name for name in (classes[number] for number in np.unique(labels)) if name not in index]
    if unknown:
        more = f" and {len(unknown) - 1:,} more" if len(unknown) > 1 else ""
        raise UserError(
            f"{spec} has a class '{unknown[0]}'{more}, which is not one of the {len(known)} known classes"
            f"{did_you_mean(unknown[0], known)}"
        )
    return torch.tensor([index.get(name, -1) for name in classes])


def labels_among(data: ImageDataset, known: Sequence[str]) -> Int[Tensor, " n"]:
    """Return each image's label as an index into the known classes. Raises UserError, as `check_classes` does."""
    check_classes(data)
    labels = torch.from_numpy(cast(np.ndarray, data.labels))
    return class_indices(data.classes, known, data.spec, labels)[labels]


def same_classes(train: FeatureSet, test: FeatureSet) -> Int[Tensor, " n"]:
    """Return the test labels as indices into the classes of the train set. Raises UserError for unknown classes."""
    return class_indices(test.classes, train.classes, "the test data", test.labels)[test.labels]


def _check_several(spec: str, names: Sequence[str]) -> None:
    if len(names) < 2:
        only = f"a single class, '{names[0]}'" if names else "no class"
        raise UserError(f"{spec} has {only}: any prediction would be correct. Pass data with two classes or more")


def shortened_list(names: Sequence[str]) -> str:
    """Return the first six names, and an ellipsis for more."""
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")


def shares(names: Sequence[str], counts: Sequence[int]) -> str:
    """Return "3 classes: a 50.0 %, b 30.0 %, c 20.0 %", the largest first; at most twelve are listed."""
    total, order = max(1, sum(counts)), sorted(range(len(names)), key=lambda i: -counts[i])
    listed = [f"{label(names[i])} {100 * counts[i] / total:.1f} %" for i in order[:_MAX_LISTED]]
    if len(names) > _MAX_LISTED:
        listed.append(f"... {label(names[order[-1]])} {100 * counts[order[-1]] / total:.2g} %")
    return f"{len(names):,} {'class' if len(names) == 1 else 'classes'}: {', '.join(listed)}"


def warn_shared(train: ImageDataset, test: ImageDataset, console: Console | None) -> None:
    """Print a warning if test images are train images as well."""
    count = len(shared_images(train, test))
    if count:
        some = "all" if count == len(test) else f"{count:,} of the"
        print_plain(
            console,
            f"warning: {some} {len(test):,} test images ({test.spec}) are train images as well: their results measure "
            "memorization. Pass other images as --test, or remove them",
        )


def shared_images(train: ImageDataset, test: ImageDataset) -> set[int]:
    """Return the indices of test images that are train images as well.

    These have the same path after resolving symbolic links, or the same bytes. Bytes are compared only if few images
    have the same size, and only the first of images whose size is unknown until they are read, as in tables.
    """
    resolve = len(train) + len(test) <= _MAX_RESOLVED
    locations = set(_locations(train, resolve))
    shared = {index for index, location in enumerate(_locations(test, resolve)) if location in locations}
    if not resolve:
        return shared
    sizes, test_sizes = file_sizes(train), file_sizes(test)
    test_sizes[list(shared)] = 0
    chosen, test_chosen = _of_equal_size(sizes, test_sizes), _of_equal_size(test_sizes, sizes)
    if sizes[chosen].sum() + test_sizes[test_chosen].sum() > _MAX_COMPARED_BYTES:
        return shared
    known = {content for _, content in digests(train, chosen.tolist(), _MAX_COMPARED_BYTES)}
    found = digests(test, test_chosen.tolist(), _MAX_COMPARED_BYTES) if known else ()
    return shared | {index for index, content in found if content in known}


def _of_equal_size(sizes: npt.NDArray[np.int64], others: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return which images may have the bytes of one of the others. Size 0: nothing to compare; -1: unknown."""
    if (others < 0).any():
        return np.flatnonzero(sizes)
    return np.flatnonzero((sizes < 0) | ((sizes > 0) & np.isin(sizes, others)))


def _locations(data: ImageDataset, resolve: bool) -> Iterator[object]:
    """Yield the location of each image: the real path of its file, or only of its folder; in a shard, with offset.

    Of synthetic images it is what they are drawn from.
    """
    real = lru_cache(4096)(os.path.realpath)
    for index in range(len(data)):
        source, inside = data.locate(index)
        if isinstance(source, SyntheticShapes):
            yield source.seed, source.size, source.texture, inside
        elif isinstance(source, HasExtent):
            file, first, _ = source.extents(inside)[0]
            folder, name = os.path.split(file)
            yield (os.path.realpath(file) if resolve else os.path.join(real(folder), name)), first
        else:
            yield source.path_of(inside)


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % confidence interval of the share `correct` / `total` by Wilson's score, both ends in [0, 1]."""
    if total == 0:
        return 0.0, 1.0
    share = correct / total
    center = share + z * z / (2 * total)
    margin = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    low, high = (center - margin) / (1 + z * z / total), (center + margin) / (1 + z * z / total)
    return 0.0 if correct == 0 else low, 1.0 if correct == total else high  # exactly, where rounding leaves a rest


def difference_interval(correct: int, total: int, correct2: int, total2: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of the second share minus the first, for independent samples.

    Newcombe's hybrid of Wilson intervals (Statistics in Medicine 17, 1998, method 10).
    """
    (low, high), (low2, high2) = wilson_interval(correct, total), wilson_interval(correct2, total2)
    share, share2 = correct / total, correct2 / total2
    gain = share2 - share
    return gain - math.hypot(share2 - low2, high - share), gain + math.hypot(high2 - share2, share - low)


def tally(predictions: Int[Tensor, " n"], labels: Int[Tensor, " n"], classes: int) -> Int[Tensor, "2 k"]:
    """Count the correctly predicted images of each class, and all of its images."""
    correct = torch.bincount(labels[predictions == labels], minlength=classes)
    return torch.stack([correct, torch.bincount(labels, minlength=classes)])


def rated(counts: Int[Tensor, "2 k"], names: Sequence[str], prefix: str = "") -> Values:
    """Yield metrics in per cent from the counts of `tally`, with `prefix` before their names.

    "top1" and the ends of its 95 % interval; "recall/NAME" of each class that has images; "balanced", the mean recall.
    Raises UserError if the images are of fewer than two classes.
    """
    correct, total = counts
    _check_several("the readable test data", [name for name, count in zip(names, total, strict=True) if count])
    low, high = wilson_interval(int(correct.sum()), int(total.sum()))
    recall = torch.where(total > 0, correct.double() / total.double(), math.nan)
    yield f"{prefix}top1", 100 * float(correct.sum()) / float(total.sum())
    yield f"{prefix}top1/low", 100 * low
    yield f"{prefix}top1/high", 100 * high
    yield f"{prefix}balanced", 100 * float(recall.nanmean())
    for name, value, count in zip(names, recall.tolist(), total.tolist(), strict=True):
        if count:
            yield f"{prefix}recall/{name}", 100 * value


def is_unequal(labels: Int[Tensor, " n"]) -> bool:
    """Return True if the largest class of the labels has twice as many images as the smallest, or more."""
    counts = labels.unique(return_counts=True)[1]
    return bool(counts.max() >= 2 * counts.min())


def hold_out_rows(
    count: int, groups: Int[np.ndarray, " n"] | None, share: float, seed: int
) -> tuple[Int[np.ndarray, " h"], Int[np.ndarray, " r"]]:
    """Choose a random share of the rows of a train set, to compare settings on; return them and the others.

    A group is on one side, as it is between train and test data, unless there is only one. Held out are the first
    groups of a random order that fit, or if none does, the smallest.
    """
    order, most = rng.permutation(seed, 0, count), max(1, round(share * count))
    if groups is None or (groups == groups[0]).all():
        return order[:most], order[most:]
    _, first, group_of, sizes = np.unique(groups[order], return_index=True, return_inverse=True, return_counts=True)
    by_appearance = np.argsort(first)
    fits = np.cumsum(sizes[by_appearance]) <= most
    held = np.isin(group_of, by_appearance[fits] if fits.any() else sizes.argmin())
    return order[held], order[~held]


def compare_held_out(
    predictions: Int[Tensor, "k n"], labels: Int[Tensor, " n"], train: Int[Tensor, " m"], classes: int
) -> list[float]:
    """Return the score, in [0, 1], of each of several predictions on a held-out part of the train set.

    It is the accuracy, or the mean recall of the part's classes if those of all `train` labels are unequal: by
    accuracy, a classifier that always predicts the largest class could win.
    """
    counts = torch.stack([tally(each, labels, classes) for each in predictions]).double()
    recall = counts[:, 0] / counts[:, 1]  # NaN for a class without images
    score = recall.nanmean(dim=1) if is_unequal(train) else counts[:, 0].sum(dim=1) / len(labels)
    return [float(value) for value in score]


def majority(counts: Int[Tensor, "2 k"]) -> float:
    """Return the share of the largest class in per cent: the accuracy of the best constant prediction."""
    return 100 * float(counts[1].max()) / float(counts[1].sum())


def evaluate_classifier(
    context: EvalContext,
    data: LabeledSplits,
    encoder: FrozenEncoder,
    size: tuple[int, int],
    classify: Callable[[Tensor], Tensor],
) -> Values:
    """Evaluate a classifier of normalized images on the test data, resized to 256/224 of `size` and center-cropped.

    Yields the values of `rated`; "top5" if more than 5 classes have train images; "loss", the mean cross-entropy; and
    "majority". Raises UserError if scores are not finite.
    """
    counts, in_top5, loss = torch.zeros(2, len(data.classes), dtype=torch.int64), 0, 0.0
    skipped, crop = context.skipped(data.test), evaluation_crop(size)
    for images, indices, _ in read_batches(data.test, crop, skipped, "predictions for", context.console):
        x = encoder.preprocess(images)
        with torch.no_grad(), autocast(encoder.device, encoder.precision):
            scores = classify(x)
        scores, labels = scores.float().cpu(), data.test_labels[torch.from_numpy(indices)]
        check_finite(scores, "scores of the classifier")
        loss += float(F.cross_entropy(scores, labels, reduction="sum"))
        top = scores.topk(min(5, len(data.classes)), dim=1).indices
        in_top5 += int((top == labels[:, None]).sum())
        counts += tally(top[:, 0], labels, len(data.classes))
    count = int(counts[1].sum())
    yield from rated(counts, data.classes)
    if len(data.train_labels.unique()) > 5:
        yield "top5", 100 * in_top5 / count
    yield "loss", loss / count
    yield "majority", majority(counts)
