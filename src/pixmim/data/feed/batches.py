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
    rank, ranks  of each batch, this process has part number `rank` of `ranks` equal ones

    Raises ValueError for a batch that does not divide among the ranks.
    """

    batch: int
    start: int = 0
    rank: int = 0
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.batch % self.ranks:
            raise ValueError(f"a batch of {self.batch} does not divide among {self.ranks} ranks")

    @property
    def count(self) -> int:
        """Images of each batch that are this process's."""
        return self.batch // self.ranks

    def positions(self, number: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        """The positions of this process's samples in batch `number`, counted from `start`."""
        first = self.start + number * self.batch + self.rank * self.count
        return np.arange(first, first + self.count)
