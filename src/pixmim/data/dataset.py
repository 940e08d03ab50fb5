"""Datasets: random access to images of one channel count and dtype, and datasets made of other datasets."""

import hashlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Shaped
from torch import Tensor

from pixmim.transforms.crops import Array, as_image

DType = Literal["uint8", "uint16", "float32"]
"""Pixels as stored. 255 or 65535 mean 1.0; floating-point values are used unchanged."""

TiffPages = Literal["first", "channels"]
"""Pages of a TIFF to use: the first, or all of them, with their channels concatenated."""

_LOOKAHEAD = 16  # shards that a sequential read prefetches
_SHARD_SIZE = 1000  # images in a shard of a dataset without shards, where it is mixed with one that has them


@dataclass(frozen=True)
class ImageSpec:
    """Channels and dtype that every image of a dataset is converted to.

    Args:
        channels: Number of channels.
        dtype: Type of a value.
        tiff_pages: Pages of a TIFF, or frames of a DICOM file, that are used.
        stretch: Percentiles of each channel that are mapped to the full range, such as "1,99"; "" for none.
        max_no_data: Largest share of the pixels of a GeoTIFF that may have no data; an image with more is unreadable.
    """

    channels: int = 3
    dtype: DType = "uint8"
    tiff_pages: TiffPages = "first"
    stretch: str = ""
    max_no_data: float = 1.0

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"uint8": torch.uint8, "uint16": torch.uint16, "float32": torch.float32}[self.dtype]

    @property
    def itemsize(self) -> int:
        """Bytes of one value."""
        return self.torch_dtype.itemsize

    @property
    def flags(self) -> str:
        """Command-line flags that select this specification."""
        pages = " --tiff-pages channels" if self.tiff_pages == "channels" else ""
        stretch = f" --stretch {self.stretch}" if self.stretch else ""
        no_data = f" --max-no-data {self.max_no_data:g}" if self.max_no_data < 1 else ""
        return f"--channels {self.channels} --dtype {self.dtype}{pages}{stretch}{no_data}"

    def __str__(self) -> str:
        pages = ", pages as channels" if self.tiff_pages == "channels" else ""
        stretch = f", percentiles {self.stretch} stretched" if self.stretch else ""
        no_data = f", at most {self.max_no_data:.4%} without data" if self.max_no_data < 1 else ""
        count = f"{self.channels} {'channel' if self.channels == 1 else 'channels'}"
        return f"{count} in {self.dtype}{pages}{stretch}{no_data}"


RGB = ImageSpec()


class BadImage(Exception):  # noqa: N818 (describes a file, not a fault of the program)
    """An image cannot be used. The message is the reason, which is logged in skipped.csv; the run continues."""


def number_names(names: Sequence[str]) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Return the number of each name among the unique ones, sorted, and these."""
    unique = sorted(set(names))
    number = {name: i for i, name in enumerate(unique)}
    return np.asarray([number[name] for name in names], np.int64), unique


class ImageDataset(ABC):
    """Random access to images. Reading is safe from several threads at once.

    Args:
        spec: What the user passed to open it.
        image_spec: Channels and dtype that images are converted to.
        labels: Class index of each image (n), -1 for none; None without labels.
        classes: Names of the classes; empty without labels.
        description: One line for the user about how it is read; may be empty.
        sizes: (h, w) of each image in pixels (n 2); None if only decoding shows them.
        shard_sizes: Images in each contiguous shard that is best read together; None if any order is as fast.
    """

    label_hint = "an evaluation needs one subfolder per class, or a column (label=)"
    """What a dataset without labels lacks, for the user."""

    left_out = ""
    """Note on images or rows that are left out or kept together, for the user; otherwise empty."""

    groups: npt.NDArray[np.int64] | None = None
    """Number of each image's group (n), such as a patient, which a split keeps together. None without groups."""

    group_names: Sequence[str] = ()
    """Name of each group by its number; empty for an image that is its own group."""

    def __init__(
        self,
        spec: str,
        image_spec: ImageSpec,
        *,
        labels: npt.NDArray[np.int64] | None = None,
        classes: Sequence[str] = (),
        description: str = "",
        sizes: npt.NDArray[np.integer] | None = None,
        shard_sizes: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self.spec, self.image_spec, self.classes = spec, image_spec, list(classes)
        self.description, self.sizes, self.shard_sizes = description, sizes, shard_sizes
        self._labels = labels

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        """Class index of each image (n), -1 for none; None without labels. Some datasets compute it at each access."""
        return self._labels

    @property
    def no_labels_message(self) -> str:
        """Error of an evaluation that needs labels."""
        return f"{self.spec} has no labels: {self.label_hint}"

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read_array(self, index: int) -> Shaped[Array, "h w c"]:
        """Read and decode one image, converted to `image_spec`. Raises BadImage if it cannot be read."""

    def image(self, index: int) -> Shaped[Tensor, "c h w"]:
        """Read one image as `read_array` does, as a tensor."""
        return as_image(self.read_array(index))

    @abstractmethod
    def path_of(self, index: int) -> str:
        """Return the path of an image, for messages."""

    def locate(self, index: int) -> "tuple[ImageDataset, int]":
        """Return the dataset that reads an image, and its index there: a part of a mixture, or what a subset is of."""
        return self, index

    def fingerprint(self) -> str:
        """Return a hash of the images in order, by their paths, to detect that a dataset has changed."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(self.path_of(index).encode("utf-8", "surrogateescape") + b"\0")
        return digest.hexdigest()[:16]

    def set_groups(self, names: Sequence[str]) -> None:
        """Set `groups` and `group_names` from the name of each image's group, "" for an image that is its own."""
        self.groups, keys = number_names([name or f"\0{index}" for index, name in enumerate(names)])
        self.group_names = ["" if key.startswith("\0") else key for key in keys]

    def prefetch(self, shards: Sequence[int]) -> None:  # noqa: B027 (most datasets have nothing to prefetch)
        """Start to fetch these shards, in order. Does not wait for them."""


Extent = tuple[str, int, int]
"""File or URL, first byte and number of bytes (0: up to the end)."""


@runtime_checkable
class HasBytes(Protocol):
    """A dataset of encoded image files."""

    def read(self, index: int) -> bytes:
        """Read the file of one image without decoding it. Raises BadImage."""


@runtime_checkable
class HasExtent(Protocol):
    """A dataset whose images are files, or byte ranges of files."""

    def extents(self, index: int) -> list[Extent]:
        """Return the byte ranges of an image: one, unless its channels are in separate files."""


def prefetch_in_order(dataset: ImageDataset, indices: Iterable[int]) -> Iterator[int]:
    """Yield increasing indices; before each, prefetch the shards that a sequential read from it needs."""
    ends, previous = np.cumsum(dataset.shard_sizes if dataset.shard_sizes is not None else []), -1
    for index in indices:
        shard = int(np.searchsorted(ends, index, side="right")) if len(ends) else -1
        if shard != previous:
            previous = shard
            dataset.prefetch(range(shard, min(shard + _LOOKAHEAD, len(ends))))
        yield index


class DatasetWrapper(ImageDataset):
    """Forward everything to another dataset, except arguments of `ImageDataset` given here and what is overridden."""

    def __init__(self, source: ImageDataset, **changes: Any) -> None:
        attributes = ("spec", "image_spec", "classes", "description", "sizes", "shard_sizes")
        super().__init__(**({name: getattr(source, name) for name in attributes} | changes))
        self.source, self.label_hint, self.left_out = source, source.label_hint, source.left_out
        self.groups, self.group_names = source.groups, source.group_names

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        return self.source.labels

    def __len__(self) -> int:
        return len(self.source)

    def read_array(self, index: int) -> Shaped[Array, "h w c"]:
        return self.source.read_array(index)

    def path_of(self, index: int) -> str:
        return self.source.path_of(index)

    def locate(self, index: int) -> tuple[ImageDataset, int]:
        return self.source.locate(index)

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
    """Some images of a dataset, in the given order.

    It has no shards, unless `keep_shards` keeps those of the dataset without the other images (increasing indices).
    """

    def __init__(self, source: ImageDataset, indices: Sequence[int], *, keep_shards: bool = False) -> None:
        self.indices = list(indices)
        sizes = None if source.sizes is None else source.sizes[self.indices]
        shards = source.shard_sizes if keep_shards else None
        if shards is not None:
            owner = np.searchsorted(np.cumsum(shards), self.indices, side="right")
            shards = np.bincount(owner, minlength=len(shards))  # some may become empty: their numbers stay
        super().__init__(source, sizes=sizes, shard_sizes=shards)
        self.groups = None if source.groups is None else source.groups[self.indices]

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

    def locate(self, index: int) -> tuple[ImageDataset, int]:
        return self.source.locate(self.indices[index])

    def fingerprint(self) -> str:
        return ImageDataset.fingerprint(self)


class ConcatDataset(ImageDataset):
    """Several datasets as one, each repeated as often as its weight.

    Copies of an image have different indices, so they are cropped differently. There are labels if all datasets have
    them; classes are merged by name, in order of first appearance, and so are groups, if a dataset has any. All
    datasets have one `image_spec`.
    """

    def __init__(self, spec: str, parts: Sequence[tuple[ImageDataset, int]]) -> None:
        self.parts = list(parts)
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
        self.left_out = "; ".join(part.left_out for part, _ in parts if part.left_out)
        if not labeled:
            self.label_hint = next(part.no_labels_message for part, _ in parts if not part.classes)
        if any(part.groups is not None for part, _ in parts):
            self.groups, self.group_names = self._merge_groups()

    def _merge_groups(self) -> tuple[npt.NDArray[np.int64], list[str]]:
        """Return the groups of all images, with their names. An image that is its own group is one with its copies."""
        numbers, names, merged = dict[str, int](), list[str](), []
        for part, _ in self.parts:
            own = np.arange(len(part)) if part.groups is None else part.groups
            of = [""] * len(part) if part.groups is None else part.group_names
            new = np.empty(len(of), np.int64)
            for group, name in enumerate(of):
                new[group] = numbers.setdefault(name, len(names)) if name else len(names)
                if new[group] == len(names):
                    names.append(name)
            merged.append(new[own])
        return self._repeat(merged), names

    @cached_property
    def labels(self) -> npt.NDArray[np.int64] | None:
        if not self.classes:
            return None
        ids = {name: i for i, name in enumerate(self.classes)}
        merged = [np.asarray([*(ids[name] for name in part.classes), -1]) for part, _ in self.parts]  # -1 stays -1
        return self._repeat([to[part.labels] for to, (part, _) in zip(merged, self.parts, strict=True)])

    def __len__(self) -> int:
        return self._starts[-1]

    def read_array(self, index: int) -> Shaped[Array, "h w c"]:
        part, inside = self._find(index)
        return part.read_array(inside)

    def path_of(self, index: int) -> str:
        part, inside = self._find(index)
        return part.path_of(inside)

    def locate(self, index: int) -> tuple[ImageDataset, int]:
        part, inside = self._find(index)
        return part.locate(inside)

    def fingerprint(self) -> str:
        text = "+".join(f"{weight}*{part.fingerprint()}" for part, weight in self.parts)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def prefetch(self, shards: Sequence[int]) -> None:
        first = 0
        for part, weight in self.parts:
            count = len(_shard_sizes(part)) * weight
            if part.shard_sizes is not None:
                inside = [(shard - first) % len(part.shard_sizes) for shard in shards if first <= shard < first + count]
                part.prefetch(list(dict.fromkeys(inside)))
            first += count

    def _find(self, index: int) -> tuple[ImageDataset, int]:
        """Return the dataset that holds an image, and its index there."""
        number = bisect_right(self._starts, index) - 1
        part, _ = self.parts[number]
        return part, (index - self._starts[number]) % len(part)

    def _repeat(self, values: Sequence[Any]) -> npt.NDArray[Any]:
        """Concatenate an array of each dataset, repeated by its weight."""
        return np.concatenate([v for v, (_, weight) in zip(values, self.parts, strict=True) for _ in range(weight)])


def _describe(part: ImageDataset, weight: int, total: int) -> str:
    repeated = f", each {weight} times an epoch" if weight > 1 else ""
    more = f"; {part.description}" if part.description else ""
    return f"{len(part) * weight / total:.1%} {part.spec} ({len(part):,} images{repeated}{more})"


def _shard_sizes(part: ImageDataset) -> npt.NDArray[np.int64]:
    """Return the shard sizes of a dataset; those of equal slices if it has no shards."""
    if part.shard_sizes is not None:
        return part.shard_sizes
    full, rest = divmod(len(part), _SHARD_SIZE)
    return np.asarray([_SHARD_SIZE] * full + [rest] * (rest > 0))
