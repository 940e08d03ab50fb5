"""Which image, with which numbers for its flip and crop, stands at each position of a run: a pure function.

Positions count the samples of the whole run: position p belongs to epoch p // n and is place p % n of that epoch's
order. Batches are cut from this one stream, so every sample comes exactly once an epoch and there is no short batch
(a batch may span two epochs).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pixmim.data.order import Indices, Order
from pixmim.utils import rng


@dataclass(frozen=True)
class Plan:
    """What some positions hold: of each its epoch and place, the image, its flip, and the numbers u of its crop."""

    epochs: Indices
    places: Indices
    indices: Indices
    flip: npt.NDArray[np.bool_]
    u: npt.NDArray[np.float64]


class Stream:
    """The samples of a run over `count` images.

    pieces  number of images in each contiguous piece that is best read together; None: any image is near
    draws   uniform numbers in [0, 1) that a crop takes
    flip    probability of a horizontal flip
    """

    def __init__(self, seed: int, count: int, pieces: Indices | None, draws: int, flip: float) -> None:
        self._seed, self._count, self._draws, self._flip = seed, count, draws, flip
        self._order = Order(seed, count, pieces)

    def plan(self, positions: npt.ArrayLike) -> Plan:
        """What the positions hold."""
        epochs, places = np.divmod(np.asarray(positions, np.int64), self._count)
        return self._at(epochs, places, places)

    def instead(self, plan: Plan, row: int, step: int) -> Plan:
        """What row `row` of a plan holds if its image, and the step - 1 after it in the order, cannot be read."""
        one = slice(row, row + 1)
        return self._at(plan.epochs[one], plan.places[one], (plan.places[one] + step) % self._count)

    def soon(self, plan: Plan) -> list[int]:
        """The pieces that are read around a plan's end, and next."""
        return self._order.soon(int(plan.epochs[-1]), int(plan.places[-1]))

    def _at(self, epochs: Indices, places: Indices, read: Indices) -> Plan:
        indices = np.empty_like(read)
        for epoch in np.unique(epochs).tolist():
            indices[epochs == epoch] = self._order.at(epoch, read[epochs == epoch])
        numbers = rng.uniform(self._seed, "crop", epochs, indices, self._draws + 1)
        return Plan(epochs, places, indices, numbers[:, 0] < self._flip, numbers[:, 1:])
