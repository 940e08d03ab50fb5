"""Some images of a data set, as a data set of their own."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from jaxtyping import Shaped

from pixmim.data.dataset import Source
from pixmim.transforms.crops import Array


class Subset(Source):
    """The images of `source` with the numbers `indices`, in their order."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self._source, self._indices = source, list(indices)
        super().__init__(
            source.spec,
            source.form,
            classes=source.classes,
            about=source.about,
            sizes=None if source.sizes is None else source.sizes[self._indices],
        )

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        labels = self._source.labels
        return None if labels is None else labels[self._indices]

    def __len__(self) -> int:
        return len(self._indices)

    def array(self, index: int) -> Shaped[Array, "h w c"]:
        return self._source.array(self._indices[index])

    def locate(self, index: int) -> str:
        return self._source.locate(self._indices[index])
