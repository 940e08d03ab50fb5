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
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any, get_args

import numpy as np

from pixmim.data.dataset import COLOUR, BadImage, Form, Pages, Pixels
from pixmim.data.decode.limits import check_size
from pixmim.data.shards import anywhere
from pixmim.data.shards.dataset import ENTRY, Contents, Entries, Shards, outside
from pixmim.data.shards.fsspec_io import is_far
from pixmim.data.shards.local import Version
from pixmim.transforms.crops import Interpolation
from pixmim.utils.errors import UserError
from pixmim.utils.files import atomic_write, parse_json, write_whole
from pixmim.utils.progress import parallel_map

_MOST_INDEX = 2**30  # bytes of a shard's index: 32 million images

_MOST = {"images": 10**11, "per_shard": 10**11, "channels": 2**16, "quality": 100}
"""Numbers in settings that are larger are a mistake, or an attack."""

_CHOICES = {
    "kind": ("jpeg", "raw"),
    "chroma": ("444", "420", ""),
    "interpolation": get_args(Interpolation),
    "pixels": get_args(Pixels),
    "pages": get_args(Pages),
}


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
    """Read a shard's index, or return None if the shard is not complete: no index, a damaged one, or another tar.

    The last entry stands for the tar itself: its offset is the tar's length, its length the check sum of the others.
    The length of a tar far away is left to be looked at when it is fetched.
    """
    data = anywhere.read(f"{folder}/{_shard_name(shard, 'index')}", _MOST_INDEX)
    if not data or len(data) % ENTRY.itemsize:
        return None
    entries = np.frombuffer(data, ENTRY)
    if int(entries[-1]["length"]) != _check_sum(data[: -ENTRY.itemsize]):
        return None
    if is_far(str(folder)):
        return entries
    tar = anywhere.version(f"{folder}/{_shard_name(shard, 'tar')}")
    return entries if tar is not None and tar.size == entries[-1]["offset"] else None


def _wrong(entries: Entries, shard: int, settings: Settings) -> str:
    """Describe what the entries of a shard's index cannot be in a cache of these settings; empty if all is right."""
    images, size = entries[:-1], int(entries[-1]["offset"])
    found = outside(images, size, len(settings.classes))
    numbers, (h, w) = images["image"], (images["h"].astype(np.int64), images["w"].astype(np.int64))
    first, last = shard * settings.per_shard, min((shard + 1) * settings.per_shard, settings.images)
    if found or not len(images):
        return found
    if numbers[0] < first or numbers[-1] >= last or (numbers[1:] <= numbers[:-1]).any():
        return f"images other than {first:,} to {last - 1:,} in their order"
    try:
        height, width = images[["h", "w"]][int((h * w).argmax())].item()
        check_size(width, height)
        check_size(*images[["w", "h"]][int((h * w).argmin())].item())
    except BadImage as error:
        return str(error)
    if settings.kind == "raw" and (h * w * (settings.channels * settings.form.bytes) != images["length"]).any():
        return "pixels of other lengths than their sizes say"
    return ""


def _check_sum(data: bytes) -> int:
    return zlib.crc32(data) & 0x7FFFFFFF


def _shard_name(shard: int, suffix: str) -> str:
    return f"shard-{shard:06d}.{suffix}"


Sample = tuple[int, dict[str, bytes], int, tuple[int, int]]
"""Number in the data set; files by extension, the picture first; class, or -1; (h, w) of the picture."""


def write_shard(folder: Path, shard: int, samples: Iterable[Sample]) -> tuple[int, int]:
    """Write a shard and then its index, each whole or not at all; gives the number of samples and the tar's bytes."""
    tar, index = shard_path(folder, shard, "tar"), shard_path(folder, shard, "index")
    entries: list[tuple[int, ...]] = []
    size = 0

    def write(file: IO[bytes]) -> None:
        nonlocal size
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for number, files, label, (h, w) in samples:
                for position, (extension, content) in enumerate(files.items()):
                    member = tarfile.TarInfo(f"{number:09d}.{extension}")
                    member.size = len(content)
                    if position == 0:
                        entries.append((number, archive.offset + tarfile.BLOCKSIZE, len(content), label, h, w))
                    archive.addfile(member, io.BytesIO(content))
        size = file.tell()

    atomic_write(tar, write)
    content = np.asarray(entries, ENTRY).tobytes()
    write_whole(index, content + np.asarray((-1, size, _check_sum(content), -1, 0, 0), ENTRY).tobytes())
    return len(entries), size


def write_json(path: Path, content: object) -> None:
    """Write JSON whole or not at all."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def read_settings(folder: str | Path) -> Settings | None:
    """Read the settings of the cache in a folder or at a URL, or return None if there is no cache.

    Raises:
        UserError: If the file cannot be read, or holds anything but settings that a cache can have.
    """
    name = f"{folder}/settings.json"
    text = anywhere.read(name)
    if text is None:
        return None
    content = parse_json(text.decode("utf-8", "surrogateescape"), name)
    wrong = _wrong_settings(content)
    if wrong:
        raise UserError(f"{name} is damaged ({wrong}): make the cache anew")
    return Settings(**content)


def _wrong_settings(content: Any) -> str:
    """Describe what is wrong in the content of a settings.json; empty if it is right."""
    if not isinstance(content, dict):
        return "no object"
    known = {field.name: field for field in fields(Settings)}
    for name in content:
        if name not in known:
            return f"unknown: {name!r}"
    for name in known:
        value = content.get(name, getattr(Settings, name, None))
        if name in _MOST:
            right = type(value) is int and (name == "quality" or value > 0) and 0 <= value <= _MOST[name]
        elif name in _CHOICES:
            right = isinstance(value, str) and value in _CHOICES[name]
        elif name == "size":
            right = isinstance(value, list) and len(value) == 2 and all(type(n) is int and 0 < n < 2**16 for n in value)
        elif name == "classes":
            right = isinstance(value, list) and all(isinstance(each, str) for each in value)
        else:
            right = isinstance(value, str)
        if not right:
            return f"{name} is {repr(value)[:50]}"
    return ""


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
    listed = anywhere.read(f"{where}/index.json")
    if listed is None:
        raise UserError(f"the cache {where} is not finished: run the same `pixmim cache` again")
    _check_list(parse_json(listed.decode("utf-8", "surrogateescape"), f"{where}/index.json"), settings, where)

    names = [f"{where}/{_shard_name(shard, 'tar')}" for shard in range(settings.shards)]

    def index(shard: int) -> Entries:
        entries = read_index(where, shard)
        if entries is None:
            raise UserError(f"{names[shard]} is missing, cut off or does not fit its index: run `pixmim cache` again")
        wrong = _wrong(entries, shard, settings)
        if wrong:
            raise UserError(f"{where}/{_shard_name(shard, 'index')} is damaged ({wrong}): make the cache anew")
        return entries

    indexes = parallel_map("reading indexes", index, settings.shards)
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


def _check_list(content: Any, settings: Settings, where: str) -> None:
    """Raise UserError if an index.json lists other shards than the settings promise, before any is looked for."""
    shards = content.get("shards") if isinstance(content, dict) else None
    if not isinstance(shards, list) or len(shards) != settings.shards:
        found = f"lists {len(shards):,} shards" if isinstance(shards, list) else "lists no shards"
        raise UserError(
            f"{where}/index.json {found}, and settings.json promises {settings.images:,} images in "
            f"{settings.shards:,}: make the cache anew"
        )
