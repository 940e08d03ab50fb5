"""Images in tars: each is one `pread` and one decoding away, by the tar's number, its place in there and its length.

How places are known is another matter: a cache has them beside its tars (`cacheformat.py`), and the tars of others are
searched through once (`webdataset.py`).
"""

import io
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Shaped

from pixmim.data.dataset import BadImage, Form, Source
from pixmim.data.decode.image import decode
from pixmim.data.decode.limits import check_bytes
from pixmim.data.shards.local import Shelf
from pixmim.transforms.crops import Array

ENTRY = np.dtype([("image", "<i8"), ("offset", "<i8"), ("length", "<i4"), ("label", "<i4"), ("h", "<i4"), ("w", "<i4")])
"""A sample in a tar's index: its number, place and length in the tar, class (-1: none), pixels (0: not known)."""

Entries = npt.NDArray[Any]
"""Samples of dtype ENTRY."""


_MOST_NAMES = 2**30  # bytes of the names of one tar's samples


def outside(entries: Entries, size: int, classes: int) -> str:
    """Describe the first entry that no tar of `size` bytes with `classes` classes can have; empty if there is none."""
    first, length, label = entries["offset"], entries["length"].astype(np.int64), entries["label"]
    h, w = entries["h"], entries["w"]
    for text, wrong in (
        (
            "{length:,} bytes at byte {offset:,} of a tar of {size:,} bytes",
            (first < 0) | (length < 0) | (first > size - length),
        ),
        ("class {label} of {classes:,} classes", (label < -1) | (label >= classes)),
        ("a size of {h}x{w} pixels", (h < 0) | (w < 0) | ((h == 0) != (w == 0))),
    ):
        if wrong.any():
            values = zip(ENTRY.names or (), entries[int(wrong.argmax())].item(), strict=True)
            return f"image {{image}} has {text}".format(size=size, classes=classes, **dict(values))
    return ""


@dataclass(frozen=True)
class Contents:
    """The samples of one tar.

    entries  places, in order
    keys     the samples' names, each ended by a zero byte, compressed; empty where the number of an entry is its name
    """

    entries: Entries
    keys: bytes = b""


class Shards(Source):
    """The images of several tars, one tar after the other.

    names     of the tars, for messages
    shelf     where they stand
    contents  the samples of each
    classes   their names; none if entries hold no classes
    raw       the bytes of a sample are pixels (h w c), the lowest byte first, instead of a picture file
    what      the tars are called in messages
    note      what a user should know of what was left out
    """

    def __init__(
        self,
        spec: str,
        form: Form,
        names: Sequence[str],
        shelf: Shelf,
        contents: Sequence[Contents],
        *,
        classes: Sequence[str] = (),
        raw: bool = False,
        what: str = "shards",
        note: str = "",
    ) -> None:
        entries = np.concatenate([one.entries for one in contents])
        pieces = np.asarray([len(one.entries) for one in contents], np.int64)
        super().__init__(
            spec,
            form,
            classes=classes,
            about=f"read from {what} {shelf.about}{note}",
            sizes=np.stack([entries["h"], entries["w"]], axis=1) if entries["h"].all() else None,
            pieces=pieces if shelf.far else None,
        )
        self.raw, self._names, self._shelf, self._entries = raw, names, shelf, entries
        self._starts: list[int] = [0, *np.cumsum(pieces)[:-1].tolist()]
        keys = [one.keys for one in contents]
        self._keys = lru_cache(maxsize=2)(lambda shard: _names(keys[shard], len(contents[shard].entries)))

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        return self._entries["label"].astype(np.int64) if self.classes else None

    def soon(self, pieces: Sequence[int]) -> None:
        self._shelf.soon(pieces)

    def __len__(self) -> int:
        return len(self._entries)

    def locate(self, index: int) -> str:
        shard = self._shard(index)
        keys = self._keys(shard)
        key = keys[index - self._starts[shard]] if keys else f"{self._entries[index]['image']:09d}".encode()
        return f"{self._names[shard]}:{key.decode('utf-8', 'surrogateescape')}"

    def extent(self, index: int) -> tuple[str, int, int]:
        """Where an image's bytes lie: file or URL, first byte, number of bytes."""
        entry = self._entries[index]
        return self._names[self._shard(index)], int(entry["offset"]), int(entry["length"])

    def read(self, index: int) -> bytes:
        """The picture file of one image; of raw pixels, an .npy of them. Raises as `image` does."""
        data = self._bytes(index)
        if not self.raw:
            return data
        file = io.BytesIO()
        np.save(file, self._pixels(index, data))
        return file.getvalue()

    def array(self, index: int) -> Shaped[Array, "h w c"]:
        """Read and decode one image. Raises BadImage; and UserError if its whole tar is not to be had."""
        data = self._bytes(index)
        if self.raw:
            return self._pixels(index, data)
        pixels = decode(data, self.form)
        if self.sizes is not None and pixels.shape[:2] != self._entries.item(index)[-2:]:
            raise BadImage("of another size than its index says")
        return pixels

    def _bytes(self, index: int) -> bytes:
        _, offset, length, *_ = self._entries.item(index)  # as Python's numbers, at once
        check_bytes(length)
        try:
            data = self._shelf.read(self._shard(index), length, offset)
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from None
        if len(data) != length:
            raise BadImage("cut off")
        return data

    def _pixels(self, index: int, data: bytes) -> npt.NDArray[Any]:
        """Raw pixels (h w c)."""
        entry = self._entries[index]
        shape = (int(entry["h"]), int(entry["w"]), self.form.channels)
        if len(data) != int(np.prod(shape)) * self.form.bytes:
            raise BadImage("of another size than its index says")
        stored = np.dtype(self.form.pixels).newbyteorder("<")
        return np.frombuffer(data, stored).reshape(shape).astype(self.form.pixels)

    def _shard(self, index: int) -> int:
        return bisect_right(self._starts, index) - 1


def _names(keys: bytes, count: int) -> list[bytes]:
    """Unpack the names of `count` samples; empty, so that numbers serve as names, if there are others."""
    unpack = zlib.decompressobj()
    try:
        names = unpack.decompress(keys, _MOST_NAMES).split(b"\0") if keys else []
    except zlib.error:
        return []
    return names if len(names) == count else []
