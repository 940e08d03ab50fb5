"""Split datasets: labeled images into train and test, and any images into those to train on and those held out."""

import numpy as np
import numpy.typing as npt

from pixmim.data.dataset import ConcatDataset, ImageDataset, Subset
from pixmim.data.uri import SplitSpec
from pixmim.utils.errors import UserError
from pixmim.utils.rng import shuffled

MAX_HELD_OUT = 4_096
"""Most images that are held out: more would be missed in training, and measure little better."""


def split_labeled(
    labels: npt.NDArray[np.int64], share: float, seed: int, groups: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[np.bool_]:
    """Return which images are train images: a function of the labels, the groups and the seed.

    Each class is split on its own, in a random order of its groups. Groups go to train until the number of images is
    as close to `share` of the class as they allow; at least one group is a train group, and if there are two, at least
    one is a test group. A group of several classes counts for its most frequent one (of equal ones, the first).

    Args:
        labels: Class of each image (n).
        share: Share of the train images.
        seed: Seed of the order.
        groups: Group of each image (n); by default each image is its own.
    """
    _, group_of = np.unique(np.arange(len(labels)) if groups is None else groups, return_inverse=True)
    sizes, class_of = np.bincount(group_of), np.full(group_of.max(initial=-1) + 1, -1)
    pairs, counts = np.unique(np.stack([group_of, labels], 1), axis=0, return_counts=True)
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


def split_dataset(data: ImageDataset, spec: SplitSpec) -> Subset:
    """Return the train or the test images of a labeled dataset, in their order.

    Raises:
        UserError: If the data have no labels, an image has none, or no image is left.
    """
    if data.labels is None:
        raise UserError(data.no_labels_message)
    if (data.labels < 0).any():
        raise UserError(
            f"split: needs a label for each image, and {data.spec} has {int((data.labels < 0).sum()):,} without"
        )
    is_train = split_labeled(data.labels, spec.share, spec.seed, data.groups)
    chosen = np.flatnonzero(is_train == (spec.side == "train"))
    if not len(chosen):
        raise UserError(f"no image of {data.spec} is left for {spec.prefix}: each class has a single image or group")
    groups = f", {len(np.unique(data.groups[chosen])):,} groups" if data.groups is not None else ""
    subset = Subset(data, chosen.tolist())
    subset.spec = f"{spec.prefix}{data.spec}"
    note = f"{len(chosen):,} of {len(data):,} images by {spec.prefix}{groups}"
    subset.description = f"{data.description}; {note}" if data.description else note
    return subset


def hold_out(data: ImageDataset, share: float, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """Keep a share of the images out of training, as a function of the seed, the number of images and their groups.

    A group is on one side, and so are the copies of an image that a mixture repeats. At most `MAX_HELD_OUT` images are
    held out, and at least one of each part of a mixture.

    Args:
        data: The images.
        share: Share to hold out, above 0.
        seed: Seed of the choice.

    Returns:
        The images to train on, with their shards, and those held out, each once. Both are in the order of `data`.

    Raises:
        UserError: If a part of the data is a single image or group.
    """
    parts = data.parts if isinstance(data, ConcatDataset) else [(data, 1)]
    share = min(share, MAX_HELD_OUT / sum(len(part) for part, _ in parts))
    sides = [(*_hold_out(part, share, seed), weight) for part, weight in parts]
    if not isinstance(data, ConcatDataset):
        return sides[0][:2]
    train = ConcatDataset(data.spec, [(kept, weight) for kept, _, weight in sides])
    return train, ConcatDataset(data.spec, [(held, 1) for _, held, _ in sides])


def _hold_out(data: ImageDataset, share: float, seed: int) -> tuple[Subset, Subset]:
    count = max(1, round(share * len(data)))
    _, group_of = np.unique(np.arange(len(data)) if data.groups is None else data.groups, return_inverse=True)
    sizes = np.bincount(group_of)
    if len(sizes) < 2:
        raise UserError(f"--hold-out needs two images or groups at least, and {data.spec} has one")
    order = shuffled(seed, "hold-out", 0, len(sizes), np.arange(min(count, len(sizes) - 1)))
    fits = np.cumsum(sizes[order]) <= count
    fits[0] = True
    held = np.isin(group_of, order[fits])
    kept = Subset(data, np.flatnonzero(~held).tolist(), keep_shards=True)
    return kept, Subset(data, np.flatnonzero(held).tolist())
