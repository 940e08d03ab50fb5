"""Datasets made of other datasets: cached in memory, a subset, several as one."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Shaped

from pixmim.data.dataset import ImageDataset
from pixmim.transforms.crops import Array

_SHARD_SIZE = 1000


class DatasetWrapper(ImageDataset):
    """Forward everything to another dataset, except what is given here and what a subclass overrides.

    Args:
        source: The other dataset.
        changes: Arguments of `ImageDataset` that differ.
    """

    def __init__(self, source: ImageDataset, **changes: Any) -> None:
        attributes = ("spec", "image_spec", "classes", "description", "sizes", "shard_sizes")
        super().__init__(**({name: getattr(source, name) for name in attributes} | changes))
        self.source, self.stray_file = source, source.stray_file

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        return self.source.labels

    def __len__(self) -> int:
        return len(self.source)

    def read_array(self, index: int) -> Shaped[Array, "h w c"]:
        return self.source.read_array(index)

    def path_of(self, index: int) -> str:
        return self.source.path_of(index)

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def prefetch(self, shards: Sequence[int]) -> None:
        self.source.prefetch(shards)


class InMemoryDataset(DatasetWrapper):
    """Keep decoded images in memory once they are read."""

    def __init__(self, source: ImageDataset) -> None:
        super().__init__(source)
        self._images: list[Array | None] = [None] * len(source)
        self._cached = np.zeros(len(source), np.bool_)
        self._ends = np.cumsum(source.shard_sizes if source.shard_sizes is not None else [])

    def prefetch(self, shards: Sequence[int]) -> None:
        """Prefetch only shards that are not fully cached."""
        starts = [0, *self._ends]
        self.source.prefetch([shard for shard in shards if not self._cached[starts[shard] : starts[shard + 1]].all()])

    def read_array(self, index: int) -> Shaped[Array, "h w c"]:
        image = self._images[index]
        if image is None:  # if two threads read it, the copy of the second replaces an equal one
            image = self._images[index] = self.source.read_array(index)
            self._cached[index] = True
        return image


class Subset(DatasetWrapper):
    """Some images of a dataset, in the given order. It has no shards."""

    def __init__(self, source: ImageDataset, indices: Sequence[int]) -> None:
        self.indices = list(indices)
        super().__init__(source, sizes=None if source.sizes is None else source.sizes[self.indices], shard_sizes=None)

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        labels = self.source.labels
        return None if labels is None else labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def read_array(self, index: int) -> Shaped[Array, "h w c"]:
        return self.source.read_array(self.indices[index])

    def path_of(self, index: int) -> str:
        return self.source.path_of(self.indices[index])

    def fingerprint(self) -> str:
        return ImageDataset.fingerprint(self)


class ConcatDataset(ImageDataset):
    """Several datasets as one, each repeated as often as its weight.

    The copies of an image have different indices, so they are cropped differently, and each comes once an epoch.
    There are labels if all datasets have them. Classes are merged by name, in order of first appearance.

    Args:
        spec: What the user wrote.
        parts: Datasets of one form, with their weights (at least 1).
    """

    def __init__(self, spec: str, parts: Sequence[tuple[ImageDataset, int]]) -> None:
        self._parts = list(parts)
        lengths = [len(part) * weight for part, weight in parts]
        self._starts = [0, *np.cumsum(lengths).tolist()]
        labeled = all(part.classes for part, _ in parts)
        sizes = [part.sizes for part, _ in parts]
        sharded = any(part.shard_sizes is not None for part, _ in parts)
        super().__init__(
            spec,
            parts[0][0].image_spec,
            classes=list(dict.fromkeys(name for part, _ in parts for name in part.classes)) if labeled else (),
            description="a mixture of " + ", ".join(_describe(part, weight, sum(lengths)) for part, weight in parts),
            sizes=None if any(size is None for size in sizes) else self._repeat(sizes),
            shard_sizes=self._repeat([_shard_sizes(part) for part, _ in parts]) if sharded else None,
        )

    @cached_property
    def labels(self) -> npt.NDArray[np.int64] | None:
        if not self.classes:
            return None
        number = {name: i for i, name in enumerate(self.classes)}
        merged = [np.asarray([*(number[name] for name in part.classes), -1]) for part, _ in self._parts]  # -1 stays -1
        return self._repeat([to[part.labels] for to, (part, _) in zip(merged, self._parts, strict=True)])

    def __len__(self) -> int:
        return self._starts[-1]

    def read_array(self, index: int) -> Shaped[Array, "h w c"]:
        part, inside = self._find(index)
        return part.read_array(inside)

    def path_of(self, index: int) -> str:
        part, inside = self._find(index)
        return part.path_of(inside)

    def fingerprint(self) -> str:
        words = [f"{weight}*{part.fingerprint()}" for part, weight in self._parts]
        return hashlib.sha256("+".join(words).encode()).hexdigest()[:16]

    def prefetch(self, shards: Sequence[int]) -> None:
        first = 0
        for part, weight in self._parts:
            count = len(_shard_sizes(part)) * weight
            if part.shard_sizes is not None:
                inside = [(shard - first) % len(part.shard_sizes) for shard in shards if first <= shard < first + count]
                part.prefetch(list(dict.fromkeys(inside)))
            first += count

    def _find(self, index: int) -> tuple[ImageDataset, int]:
        """Return the dataset that holds an image, and its index there."""
        number = bisect_right(self._starts, index) - 1
        part, _ = self._parts[number]
        return part, (index - self._starts[number]) % len(part)

    def _repeat(self, values: Sequence[Any]) -> npt.NDArray[Any]:
        """Concatenate an array of each dataset, repeated by its weight."""
        return np.concatenate(
            [value for value, (_, weight) in zip(values, self._parts, strict=True) for _ in range(weight)]
        )


def _describe(part: ImageDataset, weight: int, total: int) -> str:
    often = f", each {weight} times an epoch" if weight > 1 else ""
    more = f"; {part.description}" if part.description else ""
    return f"{len(part) * weight / total:.1%} {part.spec} ({len(part):,} images{often}{more})"


def _shard_sizes(part: ImageDataset) -> npt.NDArray[np.int64]:
    """Return the shard sizes of a dataset; one without shards is cut into some, so that it mixes with the others."""
    if part.shard_sizes is not None:
        return part.shard_sizes
    full, rest = divmod(len(part), _SHARD_SIZE)
    return np.asarray([_SHARD_SIZE] * full + [rest] * (rest > 0))
