"""Features of a labeled dataset from a frozen encoder, for k-NN and linear probes."""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from rich.console import Console
from torch import Tensor

from pixmim.data.bad_images import BadImageLog
from pixmim.data.dataset import ImageDataset
from pixmim.data.loader import iterate_in_order
from pixmim.evaluation.frozen_encoder import FrozenEncoder
from pixmim.models import features
from pixmim.training.precision import autocast
from pixmim.transforms.crops import evaluation_crop
from pixmim.utils.console import progress
from pixmim.utils.errors import UserError

BLOCKS = 4
"""Blocks, counted from the end, whose global tokens are kept."""


@dataclass(frozen=True)
class FeatureSet:
    """Features of n images, float32 on the CPU.

    Attributes:
        vector: Global token of each of the last k blocks after the final norm (n k d), last block last. Encoders
            without a global token give the mean of the patch tokens.
        mean: Mean of the last block's patch tokens (n d).
        labels: Class of each image (n).
        classes: Names of the classes.
    """

    vector: Float[Tensor, "n k d"]
    mean: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"]
    classes: list[str]


@torch.no_grad()
def extract_features(
    encoder: FrozenEncoder,
    data: ImageDataset,
    skipped: BadImageLog | None = None,
    batch: int = 256,
    console: Console | None = None,
) -> FeatureSet:
    """Compute the features of a labeled dataset: resize to 256/224 of the size, center crop, no augmentation.

    Args:
        encoder: The encoder.
        data: The dataset.
        skipped: Log of unreadable images.
        batch: Images at a time.
        console: Where to show a progress bar.

    Raises:
        UserError: If the data have no labels.
    """
    if data.labels is None:
        raise UserError(data.no_labels_message)
    if skipped is None:
        skipped = bad_image_log(data)
    encoder.check_batch(min(batch, len(data)))
    wanted = torch.from_numpy(data.labels)  # once: some data sets compute them all each time
    vectors, means, labels = [], [], []
    training = encoder.module.training
    encoder.module.eval()
    bar = progress(f"features of {data.spec}", len(data), console)
    with bar as advance, autocast(encoder.device, encoder.precision):  # around all: weights are cast once
        for images, indices, end in iterate_in_order(data, evaluation_crop(encoder.size), skipped=skipped, batch=batch):
            if len(indices):
                found = features(encoder.module, encoder.preprocess(images), BLOCKS)
                vectors.append(found.vector.float().cpu())
                means.append(found.mean.float().cpu())
                labels.append(wanted[torch.from_numpy(indices)])
            advance(end)
    encoder.module.train(training)
    return FeatureSet(torch.cat(vectors), torch.cat(means), torch.cat(labels), data.classes)


def bad_image_log(data: ImageDataset, path: Path | None = None) -> BadImageLog:
    """Return a log of unreadable images, kept in `path` if given. At most 25 % may be skipped."""
    return BadImageLog(path, len(data), 0.25, "that an evaluation may leave out: mend or remove them")


def check_finite(values: Tensor, what: str) -> None:
    """Raise UserError if any value is not finite, because the largest of such values would be arbitrary."""
    odd = int((~torch.isfinite(values.reshape(len(values), -1)).all(dim=1)).sum())
    if odd:
        raise UserError(f"the {what} are not finite for {odd:,} of {len(values):,} images: try --precision fp32")
