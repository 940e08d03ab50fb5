"""Split labeled images into train and test, into folds or by numbers of labels; and hold images out of training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pixmim.data.dataset import ConcatDataset, ImageDataset, Subset
from pixmim.data.duplicates import number_equal_images
from pixmim.data.uri import SplitSpec, describe_split
from pixmim.utils.errors import UserError
from pixmim.utils.rng import shuffled

MAX_HELD_OUT = 4_096
"""Most images that are held out: more would be missed in training, and measure little better."""


def split_labeled(
    labels: npt.NDArray[np.int64], share: float, seed: int, groups: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[np.bool_]:
    """Return which images are train images: a function of the labels, the groups and the seed.

    Each class is split on its own, in a random order of its groups (by default, each image is its own). Groups go to
    train until the number of images is as close to `share` of the class as they allow; at least one group is a train
    group, and if there are two, at least one is a test group. A group of several classes counts for its most frequent
    one (of equal ones, the first).
    """
    sizes, group_of, pairs, counts = _count_groups(labels, groups)
    class_of = np.full(len(sizes), -1)
    for group, label in pairs[np.argsort(-counts, kind="stable")]:  # most frequent first
        if class_of[group] < 0:
            class_of[group] = label
    is_train = np.zeros(len(sizes), np.bool_)
    for label in np.unique(class_of):
        members = np.flatnonzero(class_of == label)
        order = members[shuffled(seed, "split", label, len(members), np.arange(len(members)))]
        before = np.cumsum(sizes[order]) - sizes[order]
        middle = before + sizes[order] / 2  # a group belongs to the side on which most of it is
        chosen = middle <= share * sizes[order].sum()
        chosen[0] = True
        chosen[-1] &= len(order) == 1
        is_train[order[chosen]] = True
    return is_train[group_of]


def fold_labeled(
    labels: npt.NDArray[np.int64], folds: int, seed: int, groups: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[np.int64]:
    """Return the fold in which each image is tested (n): stratified, with each group in one fold.

    Groups (by default, each image is its own) are taken in random order, the largest first. Each goes to the fold that
    has the smallest shares of its classes, and of equal ones to the fold with the fewest images.
    """
    sizes, group_of, pairs, counts = _count_groups(labels, groups)
    starts = np.searchsorted(pairs[:, 0], np.arange(len(sizes) + 1))
    held, filled = np.zeros((folds, labels.max(initial=-1) + 1)), np.zeros(folds, np.int64)
    totals, fold_of = np.bincount(labels), np.zeros(len(sizes), np.int64)
    order = shuffled(seed, "folds", 0, len(sizes), np.arange(len(sizes)))
    for group in order[np.argsort(-sizes[order], kind="stable")]:
        own = slice(starts[group], starts[group + 1])
        classes, shares = pairs[own, 1], counts[own] / totals[pairs[own, 1]]
        fold = np.lexsort((filled, held[:, classes] @ shares))[0]
        held[fold, classes] += shares
        filled[fold] += sizes[group]
        fold_of[group] = fold
    return fold_of[group_of]


def _count_groups(labels: npt.NDArray[np.int64], groups: npt.NDArray[np.int64] | None) -> tuple[npt.NDArray[Any], ...]:
    """Return the size of each group (g), each image's group (n), and pairs of group and label with their counts."""
    _, group_of = np.unique(np.arange(len(labels)) if groups is None else groups, return_inverse=True)
    return np.bincount(group_of), group_of, *np.unique(np.stack([group_of, labels], 1), axis=0, return_counts=True)


def draw_labels(labels: npt.NDArray[np.int64], count: int, seed: int, draw: int) -> npt.NDArray[np.int64]:
    """Return the rows of `count` random images of each class, or of all if it has fewer, in increasing order.

    A larger count adds images to those of a smaller one. The images of a class depend on no other class.
    """
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = shuffled(seed, "shots", draw, len(members), np.arange(min(count, len(members))), part=label)
        chosen.append(members[order])
    return np.sort(np.concatenate(chosen))


@dataclass(frozen=True)
class Assignment:
    """The part of each image of a labeled dataset in a split."""

    part: npt.NDArray[np.int64]  # number of the part of each image (n)
    names: Sequence[str]  # of the parts: train and test, or the folds
    note: str  # what was kept together, for the user

    def rows(self, data: ImageDataset) -> list[list[str]]:
        """Return a table of path, class, group and part of each image, with a header."""
        assert data.labels is not None
        groups = [""] * len(data) if data.groups is None else [data.group_names[group] for group in data.groups]
        images = zip(map(data.path_of, range(len(data))), data.labels, groups, self.part, strict=True)
        rows = [[path, data.classes[label], group, self.names[part]] for path, label, group, part in images]
        return [["path", "class", "group", "part"], *rows]


def assign_split(data: ImageDataset, share: float, seed: int) -> Assignment:
    """Split a labeled dataset by `split_labeled`. Images with the same bytes stay together. Raises UserError."""
    labels, groups, note = _keep_together(data)
    return Assignment(1 - split_labeled(labels, share, seed, groups).astype(np.int64), ("train", "test"), note)


def assign_folds(data: ImageDataset, folds: int, seed: int) -> Assignment:
    """Divide a labeled dataset by `fold_labeled`. Images with the same bytes stay together. Raises UserError."""
    labels, groups, note = _keep_together(data)
    for label in np.unique(labels):
        count, different = int((labels == label).sum()), len(np.unique(groups[labels == label]))
        if different < folds:
            of = f" in {different:,} groups" * (different < count)
            raise UserError(
                f"--folds {folds}: class '{data.classes[label]}' of {data.spec} has {count:,} images{of}, which cannot "
                "be in each fold: use fewer folds, or leave the class out"
            )
    return Assignment(fold_labeled(labels, folds, seed, groups), [f"fold {i + 1}" for i in range(folds)], note)


def _keep_together(data: ImageDataset) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], str]:
    """Return labels and groups of a dataset, and a note. Groups that share bytes are one. Raises UserError."""
    if data.labels is None:
        raise UserError(data.no_labels_message)
    if (data.labels < 0).any():
        raise UserError(
            f"a split needs a label for each image, and {data.spec} has {int((data.labels < 0).sum()):,} without: "
            "label or remove them"
        )
    equal = number_equal_images(data)
    copies = len(data) - len(np.unique(equal))
    note = f"{copies:,} images have the same bytes as another and are in its part" if copies else ""
    if data.groups is None:
        return data.labels, equal, note
    merged = data.groups
    while True:  # until no group has an image in common with another
        before = merged
        for numbers in (data.groups, equal):
            least = np.full(numbers.max() + 1, len(data))
            np.minimum.at(least, numbers, merged)
            merged = least[numbers]
        if (merged == before).all():
            return data.labels, merged, note


def split_dataset(data: ImageDataset, spec: SplitSpec) -> Subset:
    """Return the train or the test images of a labeled dataset, in their order. Raises UserError if none is left."""
    split = assign_split(data, spec.share, spec.seed)
    chosen = np.flatnonzero(split.part == split.names.index(spec.side))
    if not len(chosen):
        raise UserError(
            f"no image of {data.spec} is left for the {spec.side} part: each class has a single image or group"
        )
    subset = Subset(data, chosen.tolist())
    subset.spec = describe_split(f"{spec.prefix}{data.spec}")
    groups = f", {len(np.unique(data.groups[chosen])):,} groups" if data.groups is not None else ""
    note = f"{len(chosen):,} of {len(data):,} images, the {spec.side} part of a split{groups}"
    subset.description = "; ".join(filter(None, (data.description, note, split.note)))
    subset.left_out = "; ".join(filter(None, (data.left_out, split.note)))
    return subset


def hold_out(data: ImageDataset, share: float, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """Keep a share of the images out of training, as a function of the seed, the number of images and their groups.

    A group is on one side, and so are the copies of an image that a mixture repeats. At most `MAX_HELD_OUT` images are
    held out, and at least one of each part of a mixture.

    Returns:
        The images to train on, with their shards, and those held out, each once. Both are in the order of `data`.

    Raises:
        UserError: If a part of the data is a single image or group.
    """
    parts = data.parts if isinstance(data, ConcatDataset) else [(data, 1)]
    share = min(share, MAX_HELD_OUT / sum(len(part) for part, _ in parts))
    held = [_choose_held_out(part, share, seed) for part, _ in parts]
    if isinstance(data, ConcatDataset) and data.groups is not None:  # held out of one part, out of all
        starts = np.cumsum([0, *(len(part) * weight for part, weight in parts)])
        groups = [data.groups[start : start + len(part)] for start, (part, _) in zip(starts, parts, strict=False)]
        all_held = np.concatenate([own[out] for own, out in zip(groups, held, strict=True)])
        held = [np.isin(own, all_held) for own in groups]
    for out, (part, _) in zip(held, parts, strict=True):
        if out.all():
            raise UserError(f"--hold-out leaves no image of {part.spec}: all its groups are held out of other data too")
    kept = [
        (Subset(part, np.flatnonzero(~out).tolist(), keep_shards=True), weight)
        for out, (part, weight) in zip(held, parts, strict=True)
    ]
    left = [(Subset(part, np.flatnonzero(out).tolist()), 1) for out, (part, _) in zip(held, parts, strict=True)]
    if not isinstance(data, ConcatDataset):
        return kept[0][0], left[0][0]
    return ConcatDataset(data.spec, kept), ConcatDataset(data.spec, left)


def _choose_held_out(data: ImageDataset, share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Return which images are held out (n). Raises UserError for a single image or group."""
    count = max(1, round(share * len(data)))
    _, group_of = np.unique(np.arange(len(data)) if data.groups is None else data.groups, return_inverse=True)
    sizes = np.bincount(group_of)
    if len(sizes) < 2:
        raise UserError(f"--hold-out needs two images or groups at least, and {data.spec} has one")
    order = shuffled(seed, "hold-out", 0, len(sizes), np.arange(min(count, len(sizes) - 1)))
    fits = np.cumsum(sizes[order]) <= count
    fits[0] = True
    return np.isin(group_of, order[fits])
