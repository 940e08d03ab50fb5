"""The contract of what feeds the loop: an endless iterator of batches, used in a `with` statement."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from jaxtyping import Bool, Int, Shaped
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Cropped images as they lie in memory, which of them the device must still flip, and which images they are.

    On a CPU, a batch may be overwritten once the next one is asked for: copy what shall last.
    """

    images: Shaped[Tensor, "b c h w"]
    flip: Bool[Tensor, " b"]
    indices: Int[Tensor, " b"]
    """Which image of the data set each is; on the host."""


class Batches(ABC):
    """An endless iterator of Batches; the end of its `with` statement lets go of threads and memory."""

    @property
    @abstractmethod
    def waited(self) -> float:
        """Seconds the loop has waited for batches so far."""

    @property
    @abstractmethod
    def ready(self) -> bool:
        """Return True if the next batch need not be waited for."""

    @abstractmethod
    def __next__(self) -> Batch: ...

    @abstractmethod
    def close(self) -> None:
        """Stop what works in the background, and wait for it for a moment. Can be called twice."""

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


@dataclass(frozen=True)
class Portion:
    """Which samples a process gets, step by step.

    batch  images in a batch, of all ranks together
    start  position in the run of the first sample; a resumed run starts where it was interrupted
    rank, ranks  of each batch, this process has share number `rank` of `ranks` equal ones
    parts  a share comes in so many parts, one after another, which differ by at most one image

    Raises ValueError for a batch that does not divide among the ranks.
    """

    batch: int
    start: int = 0
    rank: int = 0
    ranks: int = 1
    parts: int = 1

    def __post_init__(self) -> None:
        if self.batch % self.ranks:
            raise ValueError(f"a batch of {self.batch} does not divide among {self.ranks} ranks")

    @property
    def count(self) -> int:
        """Most images of a part."""
        return -(-self.batch // self.ranks // self.parts)

    def positions(self, number: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        """Return the positions of this process's samples in part `number`, counted from `start` on."""
        batch, part = divmod(number, self.parts)
        share = self.batch // self.ranks
        first = self.start + batch * self.batch + self.rank * share
        return np.arange(first + part * share // self.parts, first + (part + 1) * share // self.parts)
