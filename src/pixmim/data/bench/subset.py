"""Some images of a data set, as a data set of their own."""

from collections.abc import Sequence

from jaxtyping import Shaped
from torch import Tensor

from pixmim.data.source import Source


class Subset(Source):
    """The images of `source` with the numbers `indices`, in their order."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self._source, self._indices = source, list(indices)
        super().__init__(
            source.spec,
            source.form,
            labels=None if source.labels is None else source.labels[self._indices],
            classes=source.classes,
            about=source.about,
            sizes=None if source.sizes is None else source.sizes[self._indices],
        )

    def __len__(self) -> int:
        return len(self._indices)

    def image(self, index: int) -> Shaped[Tensor, "c h w"]:
        return self._source.image(self._indices[index])

    def locate(self, index: int) -> str:
        return self._source.locate(self._indices[index])
