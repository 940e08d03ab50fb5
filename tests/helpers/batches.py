"""Helpers of tests: batches."""

import torch

from pixmim.data.batches import Batch


def same(one: list[Batch], two: list[Batch]) -> bool:
    pairs = [
        pair for a, b in zip(one, two, strict=True) for pair in zip(vars(a).values(), vars(b).values(), strict=True)
    ]
    return all(torch.equal(x, y) for x, y in pairs)
