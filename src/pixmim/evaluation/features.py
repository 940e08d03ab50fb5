"""Frozen features of a labelled data set: what every evaluation of a frozen encoder starts from."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from rich.console import Console
from torch import Tensor

from pixmim.data.bad_images import Skipped
from pixmim.data.dataset import Source
from pixmim.data.loader import iterate_in_order
from pixmim.evaluation.frozen_encoder import Encoder
from pixmim.models import features
from pixmim.training.precision import autocast
from pixmim.transforms.crops import evaluation_crop
from pixmim.utils.errors import UserError, nearest
from pixmim.utils.progress import progress

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
        raise UserError(data.no_labels)
    if skipped is None:
        skipped = account(data)
    encoder.check_batch(min(batch, len(data)))
    wanted = torch.from_numpy(data.labels)  # once: some data sets compute them all each time
    vectors, means, labels = [], [], []
    training = encoder.module.training
    encoder.module.eval()
    bar = progress(f"features of {data.spec}", len(data), console)
    with bar as advance, autocast(encoder.device, encoder.precision):  # around all: weights are cast once
        for images, indices, end in iterate_in_order(data, evaluation_crop(encoder.size), skipped=skipped, batch=batch):
            if len(indices):
                found = features(encoder.module, encoder.ready(images), BLOCKS)
                vectors.append(found.vector.float().cpu())
                means.append(found.mean.float().cpu())
                labels.append(wanted[torch.from_numpy(indices)])
            advance(end)
    encoder.module.train(training)
    return Frozen(torch.cat(vectors), torch.cat(means), torch.cat(labels), data.classes)


def account(data: Source, path: Path | None = None) -> Skipped:
    """The account of images that cannot be read, of a data set that is evaluated on: a quarter may be left out.

    path  where it is kept, if anywhere
    """
    return Skipped(path, len(data), 0.25, "that an evaluation may leave out: mend or remove them")


def check_finite(values: Tensor, what: str) -> None:
    """Raise UserError if any value is infinite or not a number: the largest of such values is an arbitrary one."""
    odd = int((~torch.isfinite(values.reshape(len(values), -1)).all(dim=1)).sum())
    if odd:
        raise UserError(f"the {what} are not finite for {odd:,} of {len(values):,} images: try --precision fp32")


def same_classes(train: Frozen, test: Frozen) -> Int[Tensor, " n"]:
    """The test labels in the numbers that the train set's classes have. Raises UserError for a class train has not."""
    return numbers_among(test.classes, train.classes)[test.labels]


def numbers_among(test: list[str], train: list[str]) -> Int[Tensor, " k"]:
    """The number that each test class has among the train classes. Raises UserError for one that they lack."""
    number = {name: i for i, name in enumerate(train)}
    for name in test:
        if name not in number:
            raise UserError(f"the test data have a class '{name}' that the train data lack{nearest(name, train)}")
    return torch.tensor([number[name] for name in test])
