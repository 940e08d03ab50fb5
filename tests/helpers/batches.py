"""Bitwise comparison of batches."""

import torch
from torch import Tensor

from pixmim.data.loader import Batch


def same(one: list[Batch], two: list[Batch]) -> bool:
    """Return True if all batches are bitwise equal."""
    return len(one) == len(two) and all(
        len(parts := tensors(a)) == len(tensors(b))
        and all(torch.equal(x, y) for x, y in zip(parts, tensors(b), strict=True))
        and a.weight == b.weight
        for a, b in zip(one, two, strict=True)
    )


def tensors(batch: Batch) -> list[Tensor]:
    """Return the tensors of a batch and its mask."""
    mask = [] if batch.mask is None else [t for t in vars(batch.mask).values() if t is not None]
    return [batch.images, batch.flip, batch.indices, *mask]
