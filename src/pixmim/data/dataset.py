"""The contract of a data set: random access to images of one form by index, and labels where there are any."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Shaped
from torch import Tensor

from pixmim.transforms.crops import Array, as_image

DType = Literal["uint8", "uint16", "float32"]
"""How a pixel is held: 255 or 65535 count as one, or floating-point values are taken as they are."""

TiffPages = Literal["first", "channels"]
"""What counts of a TIFF with several pages: the first one, or the channels of all of them, one after another."""


@dataclass(frozen=True)
class ImageSpec:
    """What every image of a data set is brought into, whatever its file holds."""

    channels: int = 3
    dtype: DType = "uint8"
    tiff_pages: TiffPages = "first"

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of its images as tensors."""
        return {"uint8": torch.uint8, "uint16": torch.uint16, "float32": torch.float32}[self.dtype]

    @property
    def bytes(self) -> int:
        """That one value takes."""
        return self.torch_dtype.itemsize

    @property
    def flags(self) -> str:
        """How the command line is told of it."""
        return f"--channels {self.channels} --dtype {self.dtype}" + " --tiff-pages channels" * (
            self.tiff_pages == "channels"
        )

    def __str__(self) -> str:
        pages = ", pages as channels" if self.tiff_pages == "channels" else ""
        return f"{self.channels} {'channel' if self.channels == 1 else 'channels'} in {self.dtype}{pages}"


RGB = ImageSpec()


class BadImage(Exception):  # noqa: N818 (a fact about a file, not a fault of the program)
    """One image cannot be used. The message is the reason; it costs a line in skipped.csv, not the run."""


class ImageDataset(ABC):
    """A data set. Reading is safe from several threads at once.

    spec     what the user wrote to get it
    form     what its images are brought into
    classes  names of the classes; empty where there are no labels
    about    what a user should know of how it is read, in a line; empty where there is nothing to say
    sizes    (h, w) of each image in pixels (n 2); None where only reading them tells
    pieces   images in each contiguous piece that is best read together; None where any image is as near as any other
    stray    the image whose place leaves a folder without classes; empty where there is none
    """

    stray_file = ""

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
        """Class number of each image (n), -1 for none; or None. Computed when asked for, if that costs something."""
        return self._labels

    @property
    def no_labels_message(self) -> str:
        """What an evaluation says where there are no labels."""
        why = (
            f". It has subfolders, but {self.stray_file} is beside them: move it into one, or away"
            if self.stray_file
            else ""
        )
        return f"{self.spec} has no labels: an evaluation needs one subfolder for each class, or a column (label=){why}"

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read_array(self, index: int) -> Shaped[Array, "h w c"]:
        """Read and decode one image, in the data set's format. Raises BadImage."""

    def image(self, index: int) -> Shaped[Tensor, "c h w"]:
        """The same as a tensor."""
        return as_image(self.read_array(index))

    @abstractmethod
    def path_of(self, index: int) -> str:
        """Where an image comes from, for messages: a path."""

    def fingerprint(self) -> str:
        """Of all images in order, so that unfinished work on others is not taken for work on these.

        Made of their places, unless a data set knows better.
        """
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(self.path_of(index).encode("utf-8", "surrogateescape") + b"\0")
        return digest.hexdigest()[:16]

    def prefetch(self, shards: Sequence[int]) -> None:  # noqa: B027 (most data sets have nothing to fetch)
        """Hear which pieces will be read next, in order, so that they can be fetched ahead of time."""


@runtime_checkable
class HasBytes(Protocol):
    """A data set of picture files, which gives their bytes to look into."""

    def read(self, index: int) -> bytes:
        """What is in the file of one image. Raises BadImage."""


@runtime_checkable
class HasExtent(Protocol):
    """A data set of files, or of parts of them."""

    def extent(self, index: int) -> tuple[str, int, int]:
        """Where an image's bytes lie: file or URL, first byte, number of bytes (0: all that follow)."""


_ON = 16  # pieces that a reader in order is taken to need next


def prefetch_in_order(source: ImageDataset) -> Callable[[int], None]:
    """Gives a function that lets a data set hear which image a reader in order has come to."""
    if source.shard_sizes is None:
        return lambda index: None
    ends, before = np.cumsum(source.shard_sizes), -1

    def advance(index: int) -> None:
        nonlocal before
        piece = int(np.searchsorted(ends, index, side="right"))
        if before != piece < len(ends):
            before = piece
            source.prefetch(range(piece, min(piece + _ON, len(ends))))

    return advance
