"""The files of a cache: pictures resized once, in plain tars that any tool reads, with indexes that give random access.

    settings.json         of what it was made, and how; written first
    shard-000000.tar      WebDataset: KEY.jpg (or KEY.raw: values h w c, the lowest byte first), KEY.cls where there
                          are labels, KEY.json (path, size)
    shard-000000.index    the places in that shard, as records of ENTRY; a shard counts once this is there
    index.json            written last, when every shard is there

Shard s holds the images s*n to (s+1)*n - 1 of the data set, those that could be read, so shards can be made in any
order, by any number of processes, and made again. A cache is read where it lies, near or far; it is made near.
"""

import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import numpy as np

from pixmim.data.parallel import parallel
from pixmim.data.source import COLOUR, Form, Pages, Pixels
from pixmim.data.tars import anywhere
from pixmim.data.tars.remote import is_far
from pixmim.data.tars.shards import ENTRY, Contents, Entries, Shards
from pixmim.data.tars.shelf import Version
from pixmim.disk import write_whole
from pixmim.errors import UserError


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
    return folder / _shard_name(shard, suffix)


def read_index(folder: str | Path, shard: int) -> Entries | None:
    """A shard's index, or None if the shard is not whole: no index, a damaged one, or a tar of another length.

    The last entry stands for the tar itself: its offset is the tar's length, its length the check sum of the others.
    The length of a tar far away is left to be looked at when it is fetched.
    """
    data = anywhere.read(f"{folder}/{_shard_name(shard, 'index')}")
    if not data or len(data) % ENTRY.itemsize:
        return None
    entries = np.frombuffer(data, ENTRY)
    if int(entries[-1]["length"]) != _check_sum(data[: -ENTRY.itemsize]):
        return None
    if is_far(str(folder)):
        return entries
    tar = anywhere.version(f"{folder}/{_shard_name(shard, 'tar')}")
    return entries if tar is not None and tar.size == entries[-1]["offset"] else None


def _check_sum(data: bytes) -> int:
    return zlib.crc32(data) & 0x7FFFFFFF


def _shard_name(shard: int, suffix: str) -> str:
    return f"shard-{shard:06d}.{suffix}"


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
    write_whole(path, json.dumps(content, indent=2) + "\n")


def read_settings(folder: str | Path) -> Settings | None:
    """The settings of the cache in a folder or at a URL, or None if there is no cache. Raises UserError if damaged."""
    name = f"{folder}/settings.json"
    text = anywhere.read(name)
    if text is None:
        return None
    try:
        settings = Settings(**json.loads(text))
        if not (settings.images > 0 and settings.per_shard > 0):
            raise ValueError("no images")
        if settings.pixels not in get_args(Pixels) or settings.pages not in get_args(Pages):
            raise ValueError("no known form")
        return settings
    except (ValueError, TypeError) as error:
        raise UserError(f"{name} is damaged: make the cache anew") from error


def write_settings(folder: Path, settings: Settings) -> None:
    """Write settings.json."""
    write_json(folder / "settings.json", asdict(settings))


def open_cache(folder: str | Path, form: Form = COLOUR, local_copy: float = 50.0) -> Shards:
    """The images of a cache that is whole, in a folder or at a URL.

    local_copy  GiB that the copies of far shards may take on this machine

    Raises UserError for a folder without a cache, an unfinished cache, and an index that does not fit its tar.
    """
    where = str(folder)
    settings = read_settings(where)
    if settings is None:
        raise UserError(f"{where} holds no cache: it has no settings.json")
    if settings.form != form:
        raise UserError(f"the cache {where} has images of {settings.form}, and not of {form}: {settings.form.flags}")
    if anywhere.read(f"{where}/index.json") is None:
        raise UserError(f"the cache {where} is not finished: run the same `pixmim cache` again")

    names = [f"{where}/{_shard_name(shard, 'tar')}" for shard in range(settings.shards)]

    def index(shard: int) -> Entries:
        entries = read_index(where, shard)
        if entries is None:
            raise UserError(f"{names[shard]} is missing, cut off or does not fit its index: run `pixmim cache` again")
        return entries

    indexes = parallel("reading indexes", index, settings.shards)
    versions = [Version(int(entries[-1]["offset"])) for entries in indexes]
    if not any(len(entries) > 1 for entries in indexes):
        raise UserError(f"the cache {where} holds no image")
    return Shards(
        where,
        form,
        names,
        anywhere.shelf(names, versions, local_copy),
        [Contents(entries[:-1]) for entries in indexes],
        classes=settings.classes,
        raw=settings.kind == "raw",
        what="a cache",
    )
