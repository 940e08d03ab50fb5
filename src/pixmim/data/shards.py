"""A cache: pictures resized once, in plain tar files that any tool reads, with an index that gives random access.

    settings.json         of what it was made, and how; written first
    shard-000000.tar      WebDataset: KEY.jpg (or KEY.raw: values h w c, the lowest byte first), KEY.cls where there
                          are labels, KEY.json (path, size)
    shard-000000.index    the places in that shard, as records of ENTRY; a shard counts once this is there
    index.json            written last, when every shard is there

Shard s holds the images s*n to (s+1)*n - 1 of the data set, those that could be read, so shards can be made in any
order, by any number of processes, and made again.
"""

import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Shaped
from torch import Tensor

from pixmim.data.decode import decode
from pixmim.data.source import COLOUR, BadImage, Form, Pages, Pixels, Source, of_places
from pixmim.errors import UserError

ENTRY = np.dtype([("image", "<i8"), ("offset", "<i8"), ("length", "<i4"), ("label", "<i4"), ("h", "<i4"), ("w", "<i4")])
"""A sample in a shard's index: number in the data set, place and length in the tar, class (-1: none), pixels."""


Entries = npt.NDArray[Any]
"""Samples of dtype ENTRY."""


@dataclass(frozen=True)
class Settings:
    """What a cache was made of, and how; two makers of one cache must agree."""

    data: str
    fingerprint: str
    images: int
    classes: list[str]
    size: list[int]
    interpolation: str
    kind: str
    quality: int
    chroma: str
    channels: int
    per_shard: int
    pixels: Pixels = "uint8"
    pages: Pages = "first"

    @property
    def shards(self) -> int:
        return -(-self.images // self.per_shard)

    @property
    def form(self) -> Form:
        """Of the images in it."""
        return Form(self.channels, self.pixels, self.pages)


def shard_path(folder: Path, shard: int, suffix: str) -> Path:
    """Where shard number `shard` lies; suffix: tar or index."""
    return folder / f"shard-{shard:06d}.{suffix}"


def read_index(folder: Path, shard: int) -> Entries | None:
    """A shard's index, or None if the shard is not whole: no index, a damaged one, or a tar of another length.

    The last entry stands for the tar itself: its offset is the tar's length, its length the check sum of the others.
    """
    try:
        data = shard_path(folder, shard, "index").read_bytes()
        size = shard_path(folder, shard, "tar").stat().st_size
    except OSError:
        return None
    if not data or len(data) % ENTRY.itemsize:
        return None
    entries = np.frombuffer(data, ENTRY)
    last = entries[-1]
    whole = int(last["offset"]) == size and int(last["length"]) == _check_sum(data[: -ENTRY.itemsize])
    return entries if whole else None


def _check_sum(data: bytes) -> int:
    return zlib.crc32(data) & 0x7FFFFFFF


Sample = tuple[int, dict[str, bytes], int, tuple[int, int]]
"""Number in the data set; files by extension, the picture first; class, or -1; (h, w) of the picture."""


def write_shard(folder: Path, shard: int, samples: Iterable[Sample]) -> tuple[int, int]:
    """Write a shard and then its index, each whole or not at all; gives the number of samples and the tar's bytes."""
    tar, index = shard_path(folder, shard, "tar"), shard_path(folder, shard, "index")
    beside = folder / f"{tar.name}.{os.getpid()}.tmp"
    entries: list[tuple[int, ...]] = []
    with beside.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for number, files, label, (h, w) in samples:
                for position, (extension, content) in enumerate(files.items()):
                    member = tarfile.TarInfo(f"{number:09d}.{extension}")
                    member.size = len(content)
                    if position == 0:
                        entries.append((number, archive.offset + tarfile.BLOCKSIZE, len(content), label, h, w))
                    archive.addfile(member, io.BytesIO(content))
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    os.replace(beside, tar)
    with beside.open("wb") as file:
        content = np.asarray(entries, ENTRY).tobytes()
        file.write(content + np.asarray((-1, size, _check_sum(content), -1, 0, 0), ENTRY).tobytes())
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, index)
    return len(entries), size


def write_json(path: Path, content: object) -> None:
    """Write JSON whole or not at all."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    beside.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(beside, path)


def read_settings(folder: Path) -> Settings | None:
    """The settings of the cache in a folder, or None if there is no cache. Raises UserError if they are damaged."""
    path = folder / "settings.json"
    if not path.is_file():
        return None
    try:
        settings = Settings(**json.loads(path.read_text()))
        if not (settings.images > 0 and settings.per_shard > 0):
            raise ValueError("no images")
        if settings.pixels not in get_args(Pixels) or settings.pages not in get_args(Pages):
            raise ValueError("no known form")
        return settings
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged: make the cache anew") from error


def write_settings(folder: Path, settings: Settings) -> None:
    """Write settings.json."""
    write_json(folder / "settings.json", asdict(settings))


class Shards(Source):
    """The images of a cache that is whole. Reading is one `pread` and one decoding.

    Raises UserError for a folder without a cache, an unfinished cache, and an index that does not fit its tar.
    """

    def __init__(self, folder: str | Path, form: Form = COLOUR) -> None:
        self._folder, self._form = Path(folder).expanduser(), form
        settings = read_settings(self._folder)
        if settings is None:
            raise UserError(f"{folder} holds no cache: it has no settings.json")
        if settings.form != form:
            raise UserError(
                f"the cache {folder} has images of {settings.form}, and not of {form}: {settings.form.flags}"
            )
        if not (self._folder / "index.json").is_file():
            raise UserError(f"the cache {folder} is not finished: run the same `pixmim cache` again")
        self.settings = settings
        parts, numbers = [], []
        for shard in range(settings.shards):
            entries = read_index(self._folder, shard)
            if entries is None:
                path = shard_path(self._folder, shard, "tar")
                raise UserError(f"{path} is missing, cut off or does not fit its index: run `pixmim cache` again")
            parts.append(entries[:-1])
            numbers.append(np.full(len(entries) - 1, shard, np.int32))
        self._entries, self._shard = np.concatenate(parts), np.concatenate(numbers)
        if not len(self._entries):
            raise UserError(f"the cache {folder} holds no image")
        self._open = lru_cache(maxsize=None)(self._descriptor)
        self._lock = Lock()

    @property
    def spec(self) -> str:
        return str(self._folder)

    @property
    def form(self) -> Form:
        return self._form

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        return self._entries["label"].astype(np.int64) if self.settings.classes else None

    @property
    def classes(self) -> list[str]:
        return self.settings.classes

    @property
    def about(self) -> str:
        return "read from a cache on disk"

    @property
    def sizes(self) -> npt.NDArray[np.int64] | None:
        return np.stack([self._entries["h"], self._entries["w"]], axis=1).astype(np.int64)

    @property
    def pieces(self) -> npt.NDArray[np.int64] | None:
        return None

    def soon(self, pieces: Sequence[int]) -> None:
        pass

    def __len__(self) -> int:
        return len(self._entries)

    def locate(self, index: int) -> str:
        shard = shard_path(self._folder, int(self._shard[index]), "tar")
        return f"{shard}:{int(self._entries[index]['image']):09d}"

    def fingerprint(self) -> str:
        return of_places(self)

    def extent(self, index: int) -> tuple[str, int, int]:
        """Where an image's bytes lie: file, first byte, number of bytes."""
        entry = self._entries[index]
        tar = shard_path(self._folder, int(self._shard[index]), "tar")
        return str(tar), int(entry["offset"]), int(entry["length"])

    def image(self, index: int) -> Shaped[Tensor, "c h w"]:
        entry = self._entries[index]
        try:
            with self._lock:
                descriptor = self._open(int(self._shard[index]))
            data = os.pread(descriptor, int(entry["length"]), int(entry["offset"]))
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from None
        if self.settings.kind == "raw":
            shape = (int(entry["h"]), int(entry["w"]), self._form.channels)
            if len(data) != int(np.prod(shape)) * self._form.bytes:
                raise BadImage("cut off")
            stored = np.dtype(self._form.pixels).newbyteorder("<")
            pixels = np.frombuffer(data, stored).reshape(shape).astype(self._form.pixels)
        else:
            pixels = decode(data, self._form)
        writable = pixels if pixels.flags.writeable else pixels.copy()
        return torch.from_numpy(writable).permute(2, 0, 1)

    def _descriptor(self, shard: int) -> int:
        return os.open(shard_path(self._folder, shard, "tar"), os.O_RDONLY)
