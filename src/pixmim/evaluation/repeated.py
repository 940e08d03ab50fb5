"""Repeat an evaluation of frozen features: over folds, numbers of labels per class, or blocks of the encoder."""

import re
from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import Any, TypeVar

import numpy as np

from pixmim.data.split import Assignment, assign_folds, assign_split, draw_labels
from pixmim.data.uri import SplitSpec, read_parts
from pixmim.evaluation.classification import alike_classes, check_classes, open_labeled, shortened_list
from pixmim.evaluation.context import EvalContext, FeatureSet, Values
from pixmim.evaluation.evals import labels_per_class
from pixmim.evaluation.patch_tokens import TokenSet
from pixmim.evaluation.settings import FrozenSettings
from pixmim.models import depth
from pixmim.utils.console import label
from pixmim.utils.errors import UserError

S = TypeVar("S", FeatureSet, TokenSet)


def check_repeated(context: EvalContext, settings: FrozenSettings) -> tuple[int, int]:
    """Check labeled data, folds, numbers of labels and blocks, and print what they are.

    Returns the smallest number of images that is trained on, and the number of all images. Raises UserError for
    unsuitable data, a class with fewer images than folds, or a block that the encoder lacks.
    """
    selected_blocks(context, settings)
    if settings.folds:
        data, folds = context.data(settings.labelled), _folds(context, settings)
        return len(data) - int(np.bincount(folds.part).max()), len(data)
    splits = open_labeled(context, settings.train, settings.test)
    labels, smallest = splits.train_labels.numpy(), len(splits.train)
    sizes = np.bincount(labels)
    for count in (int(count) for count in settings.counts if count != "all"):
        few = [f"{label(splits.classes[i])} {sizes[i]:,}" for i in np.flatnonzero((sizes > 0) & (sizes < count))]
        if few:
            have_fewer = f"{len(few)} of {np.count_nonzero(sizes)} classes have fewer and use all: "
            line = f"with {labels_per_class(f'{count:,}')}, {have_fewer}"
            _print_once(context, line + shortened_list(few))
        smallest = min(smallest, int(sizes.clip(max=count).sum()))
    return smallest, len(splits.train) + len(splits.test)


def selected_blocks(context: EvalContext, settings: FrozenSettings) -> tuple[int, ...]:
    """Return the indices of the blocks that `layers` selects. Raises UserError if the encoder lacks one."""
    if not settings.layers:
        return ()
    count = depth(context.encoder.module)
    if count == 1:
        raise UserError(
            f"--layers {settings.layers}: the encoder has comparable features of its last block only: the stages of "
            f"{type(context.encoder.module).__name__} have different widths"
        )
    numbers = list(range(1, count + 1)) if settings.layers == "all" else [int(n) for n in settings.layers.split(",")]
    if not all(1 <= number <= count for number in numbers):
        raise UserError(f"--layers {settings.layers}: the encoder has blocks 1 to {count}")
    return tuple(number - 1 for number in dict.fromkeys(numbers))


def repeat(
    context: EvalContext,
    settings: FrozenSettings,
    train: Sequence[S],
    test: Sequence[S],
    measure: Callable[[S, S], Values],
) -> Values:
    """Evaluate features of each block as often as the settings want; with folds, train and test are the same.

    Yields the values of `measure`, of block N with the prefix block/N/. Over folds their mean, KEY/std, the standard
    deviation, and KEY/fold/I. With N labels per class the prefix is shots/N/, and KEY/draw/I are the single draws.
    """
    prefixes = [f"block/{index + 1}/" for index in selected_blocks(context, settings)] or [""]
    for prefix, a, b in zip(prefixes, train, test, strict=True):
        if settings.folds:
            assert a.indices is not None  # of features of a dataset
            fold_of = _folds(context, settings).part[a.indices]
            parts = [(np.flatnonzero(fold_of != i), np.flatnonzero(fold_of == i)) for i in range(settings.folds)]
            values = _summarize([dict(measure(a.select(rest), a.select(held))) for rest, held in parts], "fold")
        else:
            values = _by_labels(settings, a, b, measure) if settings.shots else measure(a, b)
        for key, value in values:
            yield key if key.startswith("majority") else f"{prefix}{key}", value


def _by_labels(settings: FrozenSettings, train: S, test: S, measure: Callable[[S, S], Values]) -> Values:
    labels = train.labels.numpy()
    largest = int(np.bincount(labels).max())
    for name in settings.counts:
        count = largest if name == "all" else int(name)
        draws = settings.draws if count < largest else 1  # of all images there is one
        rows = (draw_labels(labels, count, settings.split_seed, draw) for draw in range(draws))
        runs = [dict(measure(train.select(each), test)) for each in rows]
        yield "majority", [run.pop("majority") for run in runs][-1]
        yield from ((f"shots/{name}/{key}", value) for key, value in _summarize(runs, "draw"))


def _summarize(runs: Sequence[dict[str, float]], name: str) -> Values:
    """Yield mean and standard deviation of each metric over runs, and its values; one run's own values and interval."""
    if len(runs) == 1:
        yield from runs[0].items()
        return
    is_end = re.compile("(.+)/(?:low|high)", re.DOTALL)  # of the interval of another value
    for key in dict.fromkeys(k for run in runs for k in run if not ((end := is_end.fullmatch(k)) and end[1] in run)):
        values = [run[key] for run in runs if key in run]  # a fold may lack a class
        if not key.startswith("setting/"):
            yield key, mean(values)
            if len(values) > 1:
                yield f"{key}/std", stdev(values)
        yield from ((f"{key}/{name}/{i}", run[key]) for i, run in enumerate(runs, 1) if key in run)


def _folds(context: EvalContext, settings: FrozenSettings) -> Assignment:
    """Return the folds of the labeled data, and print the classes once. Raises UserError."""

    def assign() -> Assignment:
        data = context.data(settings.labelled)
        line = f"labeled data: {check_classes(data)}"
        folds = assign_folds(data, settings.folds, settings.split_seed)
        for each in ("; ".join(filter(None, (line, folds.note))), *alike_classes(data.classes)):
            _print_once(context, each)
        return folds

    return context.once_for_all(("folds", settings.labelled, settings.folds, settings.split_seed), assign)


def _print_once(context: EvalContext, line: str) -> None:
    context.once_for_all(("printed", line), lambda: context.print(line))


def split_table(context: EvalContext, settings: Any) -> list[list[str]]:
    """Return path, class, group and part of each image, if the settings split labeled data; otherwise nothing."""
    if getattr(settings, "folds", 0):
        return _folds(context, settings).rows(context.data(settings.labelled))
    train, test = (SplitSpec.read(str(getattr(settings, name, ""))) for name in ("train", "test"))
    if train[0] is None or test[0] is None or train[1] != test[1] or len(read_parts(train[1])) > 1:
        return []
    share, seed, source = train[0].share, train[0].seed, train[1]
    if (test[0].share, test[0].seed) != (share, seed):
        return []
    data = context.data(source)
    return context.once_for_all(("split", source, share, seed), lambda: assign_split(data, share, seed).rows(data))
