"""Images that stay decoded in memory once they were read."""

import os
from typing import Literal

import numpy as np
import numpy.typing as npt
from jaxtyping import Shaped
from torch import Tensor

from pixmim.data.shards import Shards
from pixmim.data.source import Form, Source

Keep = Literal["auto", "memory", "disk"]

SHARE = 0.25
"""Share of the machine's memory that decoded images may take before they are read from disk each time."""


class Kept(Source):
    """A cache whose images stay decoded in memory."""

    def __init__(self, source: Shards) -> None:
        self._source = source
        self._images: list[Tensor | None] = [None] * len(source)

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
        return f"kept in memory once decoded, {_gib(self._source.decoded_bytes)} in all (--keep disk: not)"

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
        return found


def keep(shards: Shards, how: Keep = "auto") -> Source:
    """A cache as it is read from now on: from memory or disk; "auto": from memory if SHARE of it holds all images."""
    fits = shards.decoded_bytes <= SHARE * _memory()
    return Kept(shards) if how == "memory" or (how == "auto" and fits) else shards


def _memory() -> int:
    """Bytes of memory of this machine; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
