"""Frozen features of a labelled data set: what every evaluation of a frozen encoder starts from."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from pixmim.data.feed.loader import in_order
from pixmim.data.skipped import Skipped
from pixmim.data.source import Source
from pixmim.engine.device import autocast
from pixmim.errors import UserError, nearest
from pixmim.evaluate.encoder import Encoder
from pixmim.models import features
from pixmim.transforms import evaluation_crop, finish

BLOCKS = 4
"""Blocks, counted from the end, whose global tokens are kept."""


@dataclass(frozen=True)
class Frozen:
    """Features of n images, float32 on the CPU.

    vector  global token of each of the last blocks, after the final norm (n k d); the last axis but one ends with the
            last block. Encoders without a global token give the mean of the patch tokens.
    mean    mean of the last block's patch tokens (n d)
    labels  class of each image (n)
    classes  names of the classes
    """

    vector: Float[Tensor, "n k d"]
    mean: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"]
    classes: list[str]


@torch.no_grad()
def freeze(
    encoder: Encoder,
    data: Source,
    skipped: Skipped | None = None,
    batch: int = 256,
    console: Console | None = None,
) -> Frozen:
    """Run an encoder over all of a labelled data set: resize to 256/224 of its size, centre crop, no augmentation.

    Shows a bar if `console` is a terminal. Raises UserError if the data have no labels.
    """
    if data.labels is None:
        raise UserError(
            f"{data.spec} has no labels: an evaluation needs one subfolder for each class, or a column (label=)"
        )
    if skipped is None:
        skipped = Skipped(None, len(data), 0.25)
    vectors, means, labels = [], [], []
    training = encoder.module.training
    encoder.module.eval()
    with progress(f"features of {data.spec}", len(data), console) as advance:
        for images, indices, end in in_order(data, evaluation_crop(encoder.size), skipped=skipped, batch=batch):
            if len(indices):
                x = finish(images.to(encoder.device, non_blocking=True), None, encoder.mean, encoder.std)
                with autocast(encoder.device, encoder.precision):
                    found = features(encoder.module, x, BLOCKS)
                vectors.append(found.vector.float().cpu())
                means.append(found.mean.float().cpu())
                labels.append(torch.from_numpy(data.labels[indices]))
            advance(end)
    encoder.module.train(training)
    return Frozen(torch.cat(vectors), torch.cat(means), torch.cat(labels), data.classes)


@contextmanager
def progress(what: str, total: int, console: Console | None) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere; it is told how many are done."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    quiet = console is None or not console.is_terminal
    with Progress(*columns, console=console, disable=quiet, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def same_classes(train: Frozen, test: Frozen) -> Int[Tensor, " n"]:
    """The test labels in the numbers that the train set's classes have. Raises UserError for a class train has not."""
    for name in test.classes:
        if name not in train.classes:
            raise UserError(
                f"the test data have a class '{name}' that the train data lack{nearest(name, train.classes)}"
            )
    return torch.tensor([train.classes.index(name) for name in test.classes])[test.labels]
