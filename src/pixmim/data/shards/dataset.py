"""Images in tar shards, read by shard, offset and length.

The index comes from the files of a resized cache (`resized_cache.py`) or from scanning the tars (`webdataset.py`).
"""

import io
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from jaxtyping import Shaped

from pixmim.data.dataset import BadImage, Extent, ImageDataset, ImageSpec
from pixmim.data.decode.image import decode
from pixmim.data.decode.limits import check_bytes
from pixmim.data.shards.local import ShardStore
from pixmim.transforms.crops import Array

INDEX_DTYPE = np.dtype(
    [("image", "<i8"), ("offset", "<i8"), ("length", "<i4"), ("label", "<i4"), ("h", "<i4"), ("w", "<i4")]
)
"""A sample of a tar: its number, offset and length in bytes, class (-1: none), height and width (0: unknown)."""

IndexEntries = npt.NDArray[Any]
"""Samples of dtype INDEX_DTYPE."""

_MAX_KEY_BYTES = 2**30  # of one tar's samples


class ShardIndex(NamedTuple):
    """The samples of one tar, and their names, joined by zero bytes and compressed; empty if their numbers are."""

    entries: IndexEntries
    keys: bytes = b""


class ShardDataset(ImageDataset):
    """The images of several tars, one tar after another.

    Args:
        spec: What the user passed.
        image_spec: Channels and dtype that images are converted to.
        names: Paths or URLs of the tars, for messages.
        store: Reads the tars.
        indexes: The samples of each tar.
        classes: Names of the classes; empty if there are no labels.
        raw: Whether samples are pixels (h w c), little-endian, instead of image files.
        kind: What the tars are, and `left_out` what is not read of them, for the user.
    """

    def __init__(
        self,
        spec: str,
        image_spec: ImageSpec,
        names: Sequence[str],
        store: ShardStore,
        indexes: Sequence[ShardIndex],
        *,
        classes: Sequence[str] = (),
        raw: bool = False,
        kind: str = "shards",
        left_out: str = "",
    ) -> None:
        entries = np.concatenate([index.entries for index in indexes])
        counts = np.asarray([len(index.entries) for index in indexes], np.int64)
        super().__init__(
            spec,
            image_spec,
            classes=classes,
            description="; ".join(filter(None, [f"read from {kind} {store.description}", left_out])),
            sizes=np.stack([entries["h"], entries["w"]], axis=1) if entries["h"].all() else None,
            shard_sizes=counts if store.is_remote else None,
        )
        self.left_out = left_out
        # A cache was stretched when it was made.
        self._stored = image_spec if kind == "shards" else replace(image_spec, stretch="")
        self.raw, self._names, self._store, self._entries = raw, names, store, entries
        self._starts: list[int] = [0, *np.cumsum(counts)[:-1].tolist()]
        keys = [index.keys for index in indexes]  # without the entries, which are kept once
        self._keys = lru_cache(maxsize=2)(lambda shard: _unpack_keys(keys[shard], int(counts[shard])))

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        return self._entries["label"].astype(np.int64) if self.classes else None

    def prefetch(self, shards: Sequence[int]) -> None:
        self._store.prefetch(shards)

    def __len__(self) -> int:
        return len(self._entries)

    def path_of(self, index: int) -> str:
        shard = self._shard(index)
        keys = self._keys(shard)
        key = keys[index - self._starts[shard]] if keys else f"{self._entries[index]['image']:09d}".encode()
        return f"{self._names[shard]}:{key.decode('utf-8', 'surrogateescape')}"

    def extents(self, index: int) -> list[Extent]:
        """Return the path or URL, the offset and the number of an image's bytes."""
        entry = self._entries[index]
        return [(self._names[self._shard(index)], int(entry["offset"]), int(entry["length"]))]

    def read(self, index: int) -> bytes:
        """Return the file of one image; for raw pixels, an .npy file. Raises BadImage, and UserError as `open`."""
        data = self._read_sample(index)
        if not self.raw:
            return data
        file = io.BytesIO()
        np.save(file, self._raw_pixels(index, data))
        return file.getvalue()

    def read_array(self, index: int) -> Shaped[Array, "h w c"]:
        data = self._read_sample(index)
        if self.raw:
            return self._raw_pixels(index, data)
        pixels = decode(data, self._stored)
        if self.sizes is not None and pixels.shape[:2] != self._entries.item(index)[-2:]:
            raise BadImage("size differs from the index")
        return pixels

    def _read_sample(self, index: int) -> bytes:
        _, offset, length, *_ = self._entries.item(index)  # Python numbers: faster than one field at a time
        check_bytes(length)
        try:
            data = self._store.read(self._shard(index), length, offset)
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from None
        if len(data) != length:
            raise BadImage("truncated")
        return data

    def _raw_pixels(self, index: int, data: bytes) -> npt.NDArray[Any]:
        """Return pixels (h w c)."""
        shape = (*self._entries.item(index)[-2:], self.image_spec.channels)
        if len(data) != int(np.prod(shape)) * self.image_spec.itemsize:
            raise BadImage("size differs from the index")
        stored = np.dtype(self.image_spec.dtype).newbyteorder("<")
        return np.frombuffer(data, stored).reshape(shape).astype(self.image_spec.dtype)

    def _shard(self, index: int) -> int:
        return bisect_right(self._starts, index) - 1


def _unpack_keys(keys: bytes, count: int) -> list[bytes]:
    """Decompress the names of `count` samples; empty, so that numbers serve as names, if there are others."""
    try:
        names = zlib.decompressobj().decompress(keys, _MAX_KEY_BYTES).split(b"\0") if keys else []
    except zlib.error:
        return []
    return names if len(names) == count else []
