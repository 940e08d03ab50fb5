"""Which image comes at each place of each epoch: a function of (seed, epoch, place), however large the data set.

Where any image is as near as any other, an epoch is one permutation of all of them. Where images lie far away in
pieces (shards on object storage), pieces are permuted, and then the images of each window of WINDOW pieces: so what a
stretch of the epoch needs is a few whole pieces, one after another. Either way every image comes once an epoch.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pixmim.utils import rng

WINDOW = 16
"""Pieces whose images are mixed. With 2,000 images in a shard, an image is mixed with 32,000 others."""

Indices = npt.NDArray[np.int64]


class Order:
    """The order of every epoch of a data set of `count` images.

    pieces  number of images in each contiguous piece that is best read together; None: any image is near
    """

    def __init__(self, seed: int, count: int, pieces: Indices | None = None) -> None:
        if pieces is not None and int(pieces.sum()) != count:
            raise ValueError(f"the pieces hold {int(pieces.sum())} images, and the data set {count}")
        self._seed, self._count, self._pieces = seed, count, pieces
        if pieces is not None:
            self._before = np.cumsum(pieces) - pieces  # images ahead of each piece in the data set
        self._shuffle = lru_cache(maxsize=2)(self._shuffle_pieces)

    def at(self, epoch: int, places: npt.ArrayLike) -> Indices:
        """The images at some places (from 0 to count - 1) of an epoch: int64, one for each place."""
        places = np.asarray(places, np.int64)
        if self._pieces is None:
            return rng.shuffled(self._seed, "order", epoch, self._count, places)
        pieces, ends = self._shuffle(epoch)
        window, first, last = self._window(ends, places)
        inside = rng.shuffled(self._seed, "order", epoch, last - first, places - first, window)
        k = np.searchsorted(ends, first + inside, side="right")
        return self._before[pieces[k]] + first + inside - (ends[k] - self._pieces[pieces[k]])

    def soon(self, epoch: int, place: int) -> list[int]:
        """The pieces that are read around a place, those of its window and then of the next; none if all is near."""
        if self._pieces is None:
            return []
        pieces, ends = self._shuffle(epoch)
        window = int(self._window(ends, np.asarray([place]))[0][0])
        found = pieces[window * WINDOW : (window + 2) * WINDOW].tolist()
        if (window + 1) * WINDOW >= len(pieces):  # the next window is the next epoch's first
            found += self._shuffle(epoch + 1)[0][:WINDOW].tolist()
        return list(dict.fromkeys(found))

    def _shuffle_pieces(self, epoch: int) -> tuple[Indices, Indices]:
        """The pieces in the epoch's order, and how many images lie up to the end of each."""
        assert self._pieces is not None
        pieces = rng.shuffled(self._seed, "pieces", epoch, len(self._pieces), np.arange(len(self._pieces)))
        return pieces, np.cumsum(self._pieces[pieces])

    def _window(self, ends: Indices, places: Indices) -> tuple[Indices, Indices, Indices]:
        """The window in which each place lies, the window's first place, and the one after its last."""
        borders = np.concatenate([ends[WINDOW - 1 : -1 : WINDOW], ends[-1:]])
        window = np.searchsorted(borders, places, side="right")
        return window, np.concatenate([[0], borders])[window], borders[window]
