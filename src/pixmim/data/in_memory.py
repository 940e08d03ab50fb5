"""Images that stay decoded in memory once they were read."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from jaxtyping import Shaped

from pixmim.data.dataset import Remade, Source
from pixmim.transforms.crops import Array


class Kept(Remade):
    """A data set whose images stay decoded in memory."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self._images: list[Array | None] = [None] * len(source)
        self._there = np.zeros(len(source), np.bool_)
        self._ends = np.cumsum(source.pieces if source.pieces is not None else [])

    def soon(self, pieces: Sequence[int]) -> None:
        """Only pieces of which something is not yet in memory are passed on."""
        self.source.soon([piece for piece in pieces if not self._images_of(piece).all()])

    def array(self, index: int) -> Shaped[Array, "h w c"]:
        found = self._images[index]
        if found is None:  # two threads may both read it; the second one's copy replaces an equal first
            found = self._images[index] = self.source.array(index)
            self._there[index] = True
        return found

    def _images_of(self, piece: int) -> npt.NDArray[np.bool_]:
        """Which images of a piece are in memory."""
        return self._there[self._ends[piece - 1] if piece else 0 : self._ends[piece]]
