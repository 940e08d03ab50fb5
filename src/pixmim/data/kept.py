"""Images that stay decoded in memory once they were read."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from jaxtyping import Shaped
from torch import Tensor

from pixmim.data.source import Form, Source


class Kept(Source):
    """A data set whose images stay decoded in memory."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._images: list[Tensor | None] = [None] * len(source)
        self._there = np.zeros(len(source), np.bool_)
        self._ends = np.cumsum(source.pieces if source.pieces is not None else [])

    @property
    def spec(self) -> str:
        return self._source.spec

    @property
    def form(self) -> Form:
        return self._source.form

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        return self._source.labels

    @property
    def classes(self) -> list[str]:
        return self._source.classes

    @property
    def about(self) -> str:
        return self._source.about

    @property
    def sizes(self) -> npt.NDArray[np.int64] | None:
        return self._source.sizes

    @property
    def pieces(self) -> npt.NDArray[np.int64] | None:
        return self._source.pieces

    def soon(self, pieces: Sequence[int]) -> None:
        """Only pieces of which something is not yet in memory are passed on."""
        self._source.soon([piece for piece in pieces if not self._images_of(piece).all()])

    def __len__(self) -> int:
        return len(self._source)

    def locate(self, index: int) -> str:
        return self._source.locate(index)

    def fingerprint(self) -> str:
        return self._source.fingerprint()

    def image(self, index: int) -> Shaped[Tensor, "c h w"]:
        found = self._images[index]
        if found is None:  # two threads may both read it; the second one's copy replaces an equal first
            found = self._images[index] = self._source.image(index)
            self._there[index] = True
        return found

    def _images_of(self, piece: int) -> npt.NDArray[np.bool_]:
        """Which images of a piece are in memory."""
        return self._there[self._ends[piece - 1] if piece else 0 : self._ends[piece]]
