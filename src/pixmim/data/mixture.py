"""Several data sets as one: each image of a part comes as often in an epoch as the part's weight says.

A mixture is a map of indices and nothing else: its n samples are the first part's images, weight times over, then the
next part's. So order, crops, flips and resuming are those of any data set with n samples, each of which comes exactly
once an epoch; and the copies of an image, having different indices, are cropped differently.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Shaped

from pixmim.data.dataset import Source
from pixmim.transforms.crops import Array

_PIECE = 1000


class Mixture(Source):
    """The parts, each with its weight (at least 1), all of one form.

    Labels: there are some if every part has them. Classes are joined by name: those of the first part, then those that
    the next one adds, and so on.
    """

    def __init__(self, spec: str, parts: Sequence[tuple[Source, int]]) -> None:
        self._parts = list(parts)
        lengths = [len(part) * weight for part, weight in parts]
        self._starts = [0, *np.cumsum(lengths).tolist()]
        named = all(part.classes for part, _ in parts)
        sizes = [part.sizes for part, _ in parts]
        near = all(part.pieces is None for part, _ in parts)
        super().__init__(
            spec,
            parts[0][0].form,
            classes=list(dict.fromkeys(name for part, _ in parts for name in part.classes)) if named else (),
            about="a mixture of " + ", ".join(_line(part, weight, sum(lengths)) for part, weight in parts),
            sizes=None if any(size is None for size in sizes) else _woven(sizes, parts),
            pieces=None if near else _woven([_pieces(part) for part, _ in parts], parts),
        )

    @cached_property
    def labels(self) -> npt.NDArray[np.int64] | None:
        if not self.classes:
            return None
        number = {name: i for i, name in enumerate(self.classes)}
        ours = [np.asarray([*(number[name] for name in part.classes), -1]) for part, _ in self._parts]  # -1 stays -1
        return _woven([to[part.labels] for to, (part, _) in zip(ours, self._parts, strict=True)], self._parts)

    def soon(self, pieces: Sequence[int]) -> None:
        counts = [len(_pieces(part)) * weight for part, weight in self._parts]
        first = 0
        for (part, _), count in zip(self._parts, counts, strict=True):
            if part.pieces is not None:
                inside = [(piece - first) % len(part.pieces) for piece in pieces if first <= piece < first + count]
                part.soon(list(dict.fromkeys(inside)))
            first += count

    def __len__(self) -> int:
        return self._starts[-1]

    def array(self, index: int) -> Shaped[Array, "h w c"]:
        part, inside = self._find(index)
        return part.array(inside)

    def locate(self, index: int) -> str:
        part, inside = self._find(index)
        return part.locate(inside)

    def fingerprint(self) -> str:
        words = [f"{weight}*{part.fingerprint()}" for part, weight in self._parts]
        return hashlib.sha256("+".join(words).encode()).hexdigest()[:16]

    def _find(self, index: int) -> tuple[Source, int]:
        """The part that a sample belongs to, and its index there."""
        number = bisect_right(self._starts, index) - 1
        part, _ = self._parts[number]
        return part, (index - self._starts[number]) % len(part)


def _woven(values: Sequence[Any], parts: Sequence[tuple[Source, int]]) -> npt.NDArray[Any]:
    """What each part has for its images or pieces, as often as its weight says, one part after the other."""
    repeated = zip(values, parts, strict=True)
    return np.concatenate([np.concatenate([value] * weight) for value, (_, weight) in repeated])


def _line(part: Source, weight: int, samples: int) -> str:
    """What to say of a part."""
    often = f", each {weight} times an epoch" if weight > 1 else ""
    more = f"; {part.about}" if part.about else ""
    return f"{len(part) * weight / samples:.1%} {part.spec} ({len(part):,} images{often}{more})"


def _pieces(part: Source) -> npt.NDArray[np.int64]:
    """A part's pieces; a part that is near is cut into some, so that it mixes with the others."""
    if part.pieces is not None:
        return part.pieces
    full, rest = divmod(len(part), _PIECE)
    return np.asarray([_PIECE] * full + [rest] * (rest > 0))
