"""Patch tokens of a dataset, computed once and kept in a file instead of in memory."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from tempfile import TemporaryFile

import numpy as np
import torch
from jaxtyping import Float, Float16, Int
from torch import Tensor

from pixmim.evaluation.classification import check_classes
from pixmim.evaluation.context import EvalContext, check_finite, read_batches
from pixmim.evaluation.frozen_encoder import FrozenEncoder
from pixmim.models import features
from pixmim.transforms.crops import evaluation_crop
from pixmim.utils.errors import UserError
from pixmim.utils.validation import MAX_DEPTH

_BYTES = 2  # of a float16


@dataclass(frozen=True)
class TokenSet:
    """Patch tokens of i images."""

    tokens: Float16[np.ndarray, "t n d"]  # patch tokens after the final norm (t n d), mapped from a file
    labels: Int[Tensor, " i"]  # class of each image (i)
    classes: list[str]
    grid: tuple[int, int]  # rows and columns of the patches of an image, n in all
    indices: Int[np.ndarray, " i"]  # dataset index of each image (i)
    groups: Int[np.ndarray, " i"] | None = None  # number of each image's group (i), if the dataset has any
    rows: Int[np.ndarray, " i"] | None = None  # row of `tokens` for each image (i); None if they are in the same order

    def batch(
        self, rows: Int[np.ndarray, " b"], device: torch.device
    ) -> tuple[Float[Tensor, "b n d"], Int[Tensor, " b"]]:
        """Read the tokens of these rows as float32, and their labels, onto a device."""
        tokens = torch.from_numpy(self.tokens[rows if self.rows is None else self.rows[rows]])
        return tokens.to(device).float(), self.labels[torch.from_numpy(rows)].to(device)

    def select(self, rows: Int[np.ndarray, " r"]) -> "TokenSet":
        """Return the tokens of some rows, which stay in the file."""
        inner = rows if self.rows is None else self.rows[rows]
        groups = None if self.groups is None else self.groups[rows]
        return replace(self, labels=self.labels[rows], indices=self.indices[rows], groups=groups, rows=inner)


def check_space(context: EvalContext, images: int, blocks: int = 1) -> None:
    """Raise UserError unless the patch tokens of `images` images and `blocks` blocks fit on the context's disk."""
    rows, columns, width = token_shape(context.encoder)
    needed = images * blocks * rows * columns * width * _BYTES
    folder = next(path for path in (context.folder.absolute(), *context.folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the patch tokens of {images:,} images need {needed / 2**30:,.1f} GiB in {folder} for a time, and "
            f"{free / 2**30:,.1f} are free: pass another --out, or fewer images; or leave the attentive probe out of "
            "`evaluate all` with --no-attentive"
        )


def token_shape(encoder: FrozenEncoder) -> tuple[int, int, int]:
    """Return rows, columns and width of the patch tokens of an image."""
    encoder.check_batch(1)
    image = torch.zeros(1, encoder.image_spec.channels, *encoder.size, device=encoder.device)
    with encoder.evaluating():
        width, rows, columns = features(encoder.module, image).map.shape[1:]
    return rows, columns, width


@contextmanager
def extract_tokens(
    context: EvalContext, spec: str, blocks: Sequence[int] = (), batch: int = 256
) -> Iterator[list[TokenSet]]:
    """Compute the patch tokens of a labeled dataset, on the images of `context.extract_features`.

    They are float16 in a file in the context's folder. It has no name where the system allows that, so nothing is left
    however the process ends. Each of the `blocks` (indices) has a set of tokens; by default the last block alone.
    Raises UserError if the data have no labels, or tokens are not finite.
    """
    encoder, data = context.encoder, context.data(spec)
    check_classes(data)
    skipped, indices = context.skipped(data), []
    encoder.check_batch(min(batch, len(data)))
    rows, columns, width = token_shape(encoder)
    context.folder.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=context.folder, prefix="tokens-") as file:
        with encoder.evaluating():
            crop = evaluation_crop(encoder.size)
            for images, read, _ in read_batches(data, crop, skipped, "patch tokens of", context.console, batch):
                maps = features(encoder.module, encoder.preprocess(images), MAX_DEPTH if blocks else 1).maps
                tokens = torch.stack([maps[block] for block in blocks or [-1]], dim=1).flatten(3).transpose(2, 3)
                tokens = tokens.to(torch.float16).cpu()
                check_finite(tokens, f"patch tokens of {spec}")
                # Written instead of assigned to a map: a full disk is then an error instead of a fatal signal.
                file.write(np.ascontiguousarray(tokens.numpy()).data)
                indices.append(read)
        file.flush()
        order = np.concatenate(indices)
        labels = torch.from_numpy(np.asarray(data.labels)[order])
        groups, count = None if data.groups is None else data.groups[order], len(blocks or [-1])
        mapped = np.memmap(file, np.float16, "r", shape=(len(order), count, rows * columns, width))
        yield [TokenSet(mapped[:, i], labels, data.classes, (rows, columns), order, groups) for i in range(count)]
