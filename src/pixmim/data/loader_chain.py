"""Loaders of the parts of a run, one after the other: for a run whose images change their size."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pixmim.data.loader import Batch, BatchLoader


class LoaderChain(Iterator[Batch]):
    """Iterate over the batches of several loaders, each opened when the one before has ended. Use it in `with`.

    Args:
        open_loader: Open the loader of a part, given its number, at a batch of the run.
        ends: Batch of the run before which each part ends. The last part is endless.
        start: First batch.
    """

    def __init__(
        self, open_loader: Callable[[int, int], BatchLoader[Any, Batch]], ends: Sequence[int], start: int
    ) -> None:
        self._open_loader, self._ends, self._position = open_loader, ends, start
        self._part, self._waited = self._part_at(start), 0.0
        self._loader = open_loader(self._part, start)

    @property
    def ready(self) -> bool:
        """Return True if the next batch is complete."""
        return self._part_at(self._position) == self._part and self._loader.ready

    @property
    def wait_seconds(self) -> float:
        """Seconds spent waiting for batches so far."""
        return self._waited + self._loader.wait_seconds

    def __next__(self) -> Batch:
        if (part := self._part_at(self._position)) != self._part:
            self._waited += self._loader.wait_seconds
            self._loader.close()
            self._part, self._loader = part, self._open_loader(part, self._position)
        batch = next(self._loader)
        self._position += 1
        return batch

    def __enter__(self) -> "LoaderChain":
        return self

    def __exit__(self, *error: Any) -> None:
        self._loader.close()

    def _part_at(self, position: int) -> int:
        return sum(position >= end for end in self._ends[:-1])
