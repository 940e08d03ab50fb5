"""Find the most similar images by their features, all near-duplicates, and the images least like any other."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

_BLOCK = 2048  # images whose similarities to all others are in memory at once


def nearest(
    features: Float[Tensor, "n d"], queries: Float[Tensor, "m d"], count: int
) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
    """Return the cosine similarities and indices of the `count` rows nearest to each query, the nearest first.

    Exact. Among equally similar rows any may be first.

    Args:
        features: A row for each image.
        queries: A row for each query.
        count: Rows per query; at most n are returned.
    """
    unit = F.normalize(features, dim=1)
    parts = [(F.normalize(part, dim=1) @ unit.T).topk(min(count, len(unit)), dim=1) for part in queries.split(_BLOCK)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def nearest_others(
    features: Float[Tensor, "n d"], advance: Callable[[int], None] = lambda done: None
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Return the similarity and index of the image nearest to each image, apart from itself.

    Compares all n^2 pairs, 2,048 images with all others at a time.

    Args:
        features: A row for each image; at least two.
        advance: Called with the number of images that are done.

    Raises:
        ValueError: If there are fewer than two images.
    """
    if len(features) < 2:
        raise ValueError(f"{len(features)} images have no nearest other image: at least two are needed")
    unit = F.normalize(features, dim=1)
    similarity, index = torch.empty(len(unit)), torch.empty(len(unit), dtype=torch.int64)
    for start in range(0, len(unit), _BLOCK):
        block = unit[start : start + _BLOCK] @ unit.T
        rows = torch.arange(len(block))
        block[rows, start + rows] = -2  # below every cosine
        similarity[start : start + _BLOCK], index[start : start + _BLOCK] = block.max(dim=1)
        advance(start + len(block))
    return similarity, index


def most_similar_pairs(
    similarity: Float[Tensor, " n"], index: Int[Tensor, " n"], count: int
) -> list[tuple[int, int, float]]:
    """Return the `count` most similar pairs (i, j, cosine), i < j, among each image and its nearest other.

    Args:
        similarity: From `nearest_others`.
        index: From `nearest_others`.
        count: Number of pairs.
    """
    pairs: dict[tuple[int, int], float] = {}
    for i in similarity.argsort(descending=True, stable=True).tolist():
        j = int(index[i])
        pairs.setdefault((min(i, j), max(i, j)), float(similarity[i]))
        if len(pairs) == count:
            break
    return [(i, j, value) for (i, j), value in pairs.items()]
