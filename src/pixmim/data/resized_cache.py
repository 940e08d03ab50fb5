"""A cache of images resized once, in plain tars with an index that gives random access.

    settings.json         what it was made of, and how; written first
    shard-000000.tar      WebDataset: KEY.jpg (or KEY.raw: h w c, little-endian), KEY.cls if there are labels,
                          KEY.json (path, size)
    shard-000000.index    records of INDEX_DTYPE, one per sample, and one for the tar: its size as `offset`, and the
                          CRC-32 of the other records as `length`. A shard is complete once this file exists
    index.json            written last, when all shards exist

Shard s holds those of the images s*n to (s+1)*n - 1 that could be read, so shards can be written in any order, by any
number of processes, and again. A cache is written locally, and read locally or from a URL.
"""

import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from pixmim.data.dataset import RGB, BadImage, DType, ImageSpec, TiffPages
from pixmim.data.decode.limits import check_size
from pixmim.data.shards.dataset import INDEX_DTYPE, IndexEntries, ShardDataset, ShardIndex, find_invalid_entry
from pixmim.data.shards.fsspec_io import file_version, is_url, read_small_file
from pixmim.data.shards.local import FileVersion
from pixmim.data.shards.remote import open_shards
from pixmim.transforms.crops import Interpolation
from pixmim.utils.errors import UserError
from pixmim.utils.files import parse_json
from pixmim.utils.threads import parallel_map

Kind = Literal["jpeg", "raw"]
Chroma = Literal["444", "420"]

_MAX_INDEX_BYTES = 2**30  # 32 million images in a shard
_MAX_VALUE = {"images": 10**11, "per_shard": 10**11, "channels": 2**16, "quality": 100}
_CHOICES = {
    "kind": get_args(Kind),
    "chroma": (*get_args(Chroma), ""),
    "interpolation": get_args(Interpolation),
    "dtype": get_args(DType),
    "tiff_pages": get_args(TiffPages),
}


@dataclass(frozen=True)
class CacheSettings:
    """What a cache was made of, and how. All processes that write one cache must agree."""

    data: str
    fingerprint: str
    images: int
    classes: list[str]
    size: list[int]
    interpolation: Interpolation
    kind: Kind
    quality: int
    chroma: str
    channels: int
    per_shard: int
    dtype: DType = "uint8"
    tiff_pages: TiffPages = "first"

    @property
    def num_shards(self) -> int:
        return -(-self.images // self.per_shard)

    @property
    def image_spec(self) -> ImageSpec:
        """Channels and dtype of the images."""
        return ImageSpec(self.channels, self.dtype, self.tiff_pages)

    def images_of(self, shard: int) -> range:
        """Return the numbers of the images that a shard is made of."""
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.images))


def shard_name(shard: int, suffix: str) -> str:
    """Return the file name of a shard's "tar" or "index"."""
    return f"shard-{shard:06d}.{suffix}"


def checksum(entries: bytes) -> int:
    """Return the CRC-32 of an index, as a positive int32."""
    return zlib.crc32(entries) & 0x7FFFFFFF


def read_settings(folder: str | Path) -> CacheSettings | None:
    """Read the settings of the cache in a folder or at a URL, or return None if there is no cache.

    Raises:
        UserError: If the file cannot be read or its values are invalid.
    """
    name = f"{folder}/settings.json"
    text = read_small_file(name)
    if text is None:
        return None
    content = parse_json(text.decode("utf-8", "surrogateescape"), name)
    damage = _find_invalid_setting(content)
    if damage:
        raise UserError(f"{name} is damaged ({damage}): remove the cache and create it again")
    return CacheSettings(**content)


def read_index(folder: str | Path, shard: int) -> IndexEntries | None:
    """Read a shard's index, or return None if it is missing or damaged, or the tar has another size.

    The size of a remote tar is compared when it is first read.
    """
    data = read_small_file(f"{folder}/{shard_name(shard, 'index')}", _MAX_INDEX_BYTES)
    if not data or len(data) % INDEX_DTYPE.itemsize:
        return None
    entries = np.frombuffer(data, INDEX_DTYPE)
    if entries[-1]["length"] != checksum(data[: -INDEX_DTYPE.itemsize]):
        return None
    if not is_url(str(folder)):
        tar = file_version(f"{folder}/{shard_name(shard, 'tar')}")
        if tar is None or tar.size != entries[-1]["offset"]:
            return None
    return entries


def open_cache(folder: str | Path, form: ImageSpec = RGB, shard_cache_gib: float = 50.0) -> ShardDataset:
    """Open a complete cache.

    Args:
        folder: A folder or a URL.
        form: Channels and dtype of the images, which must be those of the cache.
        shard_cache_gib: Bound of the disk cache for remote shards, in GiB.

    Raises:
        UserError: If there is no cache, it is incomplete or damaged, or has images of another form.
    """
    where = str(folder)
    settings = read_settings(where)
    if settings is None:
        raise UserError(f"{where} is not a cache: it has no settings.json")
    if settings.image_spec != form:
        raise UserError(
            f"the cache {where} has images of {settings.image_spec}, not {form}: pass {settings.image_spec.flags}"
        )
    _check_shard_list(where, settings)
    tars = [f"{where}/{shard_name(shard, 'tar')}" for shard in range(settings.num_shards)]

    def load_index(shard: int) -> IndexEntries:
        entries = read_index(where, shard)
        if entries is None:
            raise UserError(f"{tars[shard]} is missing, truncated or not that of its index: run `pixmim cache` again")
        damage = _find_damage(entries, shard, settings)
        if damage:
            name = f"{where}/{shard_name(shard, 'index')}"
            raise UserError(f"{name} is damaged ({damage}): remove the cache and create it again")
        return entries

    indexes = parallel_map("reading indexes", load_index, settings.num_shards)
    if not any(len(entries) > 1 for entries in indexes):
        raise UserError(f"the cache {where} is empty: none of its images could be read")
    return ShardDataset(
        where,
        form,
        tars,
        open_shards(tars, [FileVersion(int(entries[-1]["offset"])) for entries in indexes], shard_cache_gib),
        [ShardIndex(entries[:-1]) for entries in indexes],
        classes=settings.classes,
        raw=settings.kind == "raw",
        kind="a cache",
    )


def _check_shard_list(where: str, settings: CacheSettings) -> None:
    """Raise UserError unless index.json lists as many shards as the settings require, before any is opened."""
    name = f"{where}/index.json"
    text = read_small_file(name)
    if text is None:
        raise UserError(f"the cache {where} is not finished: run the same `pixmim cache` again")
    content = parse_json(text.decode("utf-8", "surrogateescape"), name)
    shards = content.get("shards") if isinstance(content, dict) else None
    if not isinstance(shards, list) or len(shards) != settings.num_shards:
        count = f"{len(shards):,}" if isinstance(shards, list) else "no"
        raise UserError(
            f"{name} lists {count} shards, but settings.json requires {settings.num_shards:,} for "
            f"{settings.images:,} images: remove the cache and create it again"
        )


def _find_damage(entries: IndexEntries, shard: int, settings: CacheSettings) -> str:
    """Describe why a shard's index does not fit the settings; "" if it does."""
    samples, tar_bytes = entries[:-1], int(entries[-1]["offset"])
    damage = find_invalid_entry(samples, tar_bytes, len(settings.classes))
    if damage or not len(samples):
        return damage
    numbers, expected = samples["image"], settings.images_of(shard)
    if numbers[0] < expected[0] or numbers[-1] > expected[-1] or (numbers[1:] <= numbers[:-1]).any():
        return f"images other than {expected[0]:,} to {expected[-1]:,} in order"
    pixels = samples["h"].astype(np.int64) * samples["w"]
    try:
        for extreme in (pixels.argmax(), pixels.argmin()):
            check_size(int(samples["w"][extreme]), int(samples["h"][extreme]))
    except BadImage as error:
        return str(error)
    if settings.kind == "raw" and (pixels * (settings.channels * settings.image_spec.bytes) != samples["length"]).any():
        return "byte counts that differ from the image sizes"
    return ""


def _find_invalid_setting(content: Any) -> str:
    """Describe what is wrong in the content of a settings.json; "" if nothing is."""
    if not isinstance(content, dict):
        return "not an object"
    known = {field.name for field in fields(CacheSettings)}
    unknown = [name for name in content if name not in known]
    if unknown:
        return f"unknown: {unknown[0]!r}"
    for name in known:
        value = content.get(name, getattr(CacheSettings, name, None))
        if name in _MAX_VALUE:
            valid = type(value) is int and int(name != "quality") <= value <= _MAX_VALUE[name]
        elif name in _CHOICES:
            valid = isinstance(value, str) and value in _CHOICES[name]
        elif name == "size":
            valid = isinstance(value, list) and len(value) == 2 and all(type(n) is int and 0 < n < 2**16 for n in value)
        elif name == "classes":
            valid = isinstance(value, list) and all(isinstance(each, str) for each in value)
        else:
            valid = isinstance(value, str)
        if not valid:
            return f"{name} is {repr(value)[:50]}"
    return ""
