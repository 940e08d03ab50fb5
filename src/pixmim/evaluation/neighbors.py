"""Find the most similar images by their features, all near-duplicates, and the images least like any other."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from rich.console import Console
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from pixmim.data.bad_images import BadImageLog
from pixmim.data.dataset import ImageDataset
from pixmim.evaluation.embed import embed_batches
from pixmim.evaluation.frozen_encoder import FrozenEncoder, fingerprint
from pixmim.utils.errors import UserError
from pixmim.utils.files import write_text_atomically
from pixmim.utils.trust import inside
from pixmim.weights.safe_load import read

_BLOCK = 2048  # images whose similarities to all others are in memory at once
_BATCH = 64
_TENSORS = ("unit", "indices", "similarity", "nearest")


@dataclass(frozen=True)
class Index:
    """Features of n readable images by one encoder, and the image most similar to each."""

    unit: Float[Tensor, "n d"]  # the mean patch token of each image, scaled to length 1
    indices: Int[Tensor, " n"]  # dataset index of each row
    similarity: Float[Tensor, " n"]  # cosine of each row with the nearest other row
    nearest: Int[Tensor, " n"]  # that other row

    def query(self, vector: Float[Tensor, "1 d"], count: int, without: int | None = None) -> list[tuple[int, float]]:
        """Return dataset index and cosine of the images nearest to a vector, except the image `without`."""
        cosines, rows = nearest(self.unit, vector, count + 1)
        found = zip(self.indices[rows[0]].tolist(), cosines[0].tolist(), strict=True)
        return [(index, cosine) for index, cosine in found if index != without][:count]

    def duplicates(self, count: int) -> list[tuple[int, int, float]]:
        """Return the most similar pairs of images, as dataset indices and cosine."""
        pairs = most_similar_pairs(self.similarity, self.nearest, count)
        return [(int(self.indices[i]), int(self.indices[j]), cosine) for i, j, cosine in pairs]

    def outliers(self, count: int) -> list[tuple[int, float]]:
        """Return the images whose nearest other image is least similar, as dataset index and cosine."""
        rows = self.similarity.argsort(stable=True)[:count]
        return list(zip(self.indices[rows].tolist(), self.similarity[rows].tolist(), strict=True))


def index_file(run: Path, untrained: bool = False) -> Path:
    """Return where the index of a run's encoder, or of its initial weights, is kept."""
    return run / f"index{'-untrained' * untrained}.safetensors"


def load_index(
    file: Path,
    encoder: FrozenEncoder,
    data: ImageDataset,
    advance: Callable[[int, int], None] = lambda done, total: None,
    console: Console | None = None,
) -> Index:
    """Read the index of an encoder and images from its file, or compute and save it.

    A folder that cannot be written costs nothing: the index is then computed again the next time. `advance` is called
    with the work done and its total: two units for each image. Raises UserError if fewer than two images can be read,
    or the file leads out of its folder.
    """
    identity = {"model": fingerprint(encoder), "data": data.fingerprint(), "images": str(len(data))}
    index = _read(inside(file.parent, file.name), identity, len(data))
    if index is not None:
        return index
    vectors, indices, total = list[np.ndarray[Any, Any]](), list[np.ndarray[Any, Any]](), 2 * len(data)
    for rows, batch, end in embed_batches(encoder, data, BadImageLog(None, len(data), 1.0), _BATCH, console=console):
        vectors.append(rows["mean"])
        indices.append(batch)
        advance(end, total)
    if sum(map(len, vectors)) < 2:
        raise UserError(f"fewer than two images of {data.spec} can be read")
    unit = F.normalize(torch.from_numpy(np.concatenate(vectors)), dim=1)
    others = nearest_others(unit, lambda done: advance(len(data) + done, total))
    index = Index(unit, torch.from_numpy(np.concatenate(indices)), *others)
    with suppress(OSError):
        write_text_atomically(file, save({name: getattr(index, name).contiguous() for name in _TENSORS}, identity))
    return index


def _read(file: Path, identity: dict[str, str], images: int) -> Index | None:
    """Return the index in a file, or None if the file is missing, damaged, or of another encoder or dataset."""
    try:
        saved = read(file)
    except UserError:
        return None
    if {name: saved.metadata.get(name) for name in identity} != identity or set(saved.tensors) != set(_TENSORS):
        return None
    unit, indices, similarity, other = (saved.tensors[name].clone() for name in _TENSORS)
    n = len(unit) if unit.ndim == 2 else 0
    fits = n > 1 and all(values.shape == (n,) for values in (indices, similarity, other))
    fits = fits and all(v.dtype == torch.float32 and bool(v.isfinite().all()) for v in (unit, similarity))
    for rows, end in ((indices, images), (other, n)):
        fits = fits and rows.dtype == torch.int64 and int(rows.min()) >= 0 and int(rows.max()) < end
    return Index(unit, indices, similarity, other) if fits else None


def nearest(
    unit: Float[Tensor, "n d"], queries: Float[Tensor, "m d"], count: int
) -> tuple[Float[Tensor, "m k"], Int[Tensor, "m k"]]:
    """Return cosines and indices of the (at most n) rows of length 1 nearest to each query, nearest first. Exact."""
    parts = [(F.normalize(part, dim=1) @ unit.T).topk(min(count, len(unit)), dim=1) for part in queries.split(_BLOCK)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])


def nearest_others(
    unit: Float[Tensor, "n d"], advance: Callable[[int], None] = lambda done: None
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """Return the similarity and index of the image nearest to each image, apart from itself.

    Compares all n^2 pairs, 2,048 images with all others at a time; `advance` is called with the images done. Rows of
    `unit` have length 1. Raises ValueError if there are fewer than two.
    """
    if len(unit) < 2:
        raise ValueError(f"{len(unit)} images have no nearest other image: at least two are needed")
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
    """Return the `count` most similar pairs (i, j, cosine), i < j, of the result of `nearest_others`."""
    pairs: dict[tuple[int, int], float] = {}
    for i in similarity.argsort(descending=True, stable=True).tolist():
        j = int(index[i])
        pairs.setdefault((min(i, j), max(i, j)), float(similarity[i]))
        if len(pairs) == count:
            break
    return [(i, j, value) for (i, j), value in pairs.items()]
