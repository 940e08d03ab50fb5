"""Cache of resized images: plain tar shards, each with an index for random access.

    settings.json         source and settings of the cache; written first
    groups.json           name of the group of each image of the source, if it has groups
    shard-000000.tar      WebDataset: KEY.jpg (or KEY.raw: h w c, little-endian), KEY.cls if there are labels,
                          KEY.json (path, size)
    shard-000000.index    one INDEX_DTYPE record per image, and one for the tar, with its size as `offset` and the
                          CRC-32 of the other records as `length`. A shard is complete once its index exists
    index.json            list of shards; written last

Shard s holds the readable ones of images s*n to (s+1)*n - 1, so any process can write any shard, in any order. A cache
is written to a local folder, and read from there or from a URL.
"""

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from pixmim.data.dataset import RGB, BadImage, DType, ImageSpec, TiffPages
from pixmim.data.decode.limits import check_size
from pixmim.data.shards.dataset import INDEX_DTYPE, IndexEntries, ShardDataset, ShardIndex
from pixmim.data.shards.fsspec_io import file_version, is_url, read_small_file
from pixmim.data.shards.local import FileVersion
from pixmim.data.shards.remote import open_shards
from pixmim.data.shards.webdataset import is_tar
from pixmim.data.uri import read_parts, split_options
from pixmim.data.zip_archive import is_zip
from pixmim.transforms.crops import Interpolation
from pixmim.utils.errors import UserError, shown
from pixmim.utils.files import parse_json
from pixmim.utils.threads import parallel_map
from pixmim.utils.validation import Integer, Share, Stretch, check_value, hints_of

Kind = Literal["jpeg", "raw"]
Chroma = Literal["444", "420"]

GROUPS_FILE = "groups.json"

_MAX_INDEX_BYTES = 2**30  # 32 million images in a shard
_RECREATE = "remove the cache and create it again"


@dataclass(frozen=True)
class CacheSettings:
    """Source and settings of a cache. All processes that write one cache must agree on them."""

    data: str
    fingerprint: str
    images: Annotated[int, Integer(1, 10**11)]
    classes: list[str]
    size: list[int]
    interpolation: Interpolation
    kind: Kind
    quality: Annotated[int, Integer(0, 100)]
    chroma: Chroma | Literal[""]
    channels: Annotated[int, Integer(1, 2**16)]
    per_shard: Annotated[int, Integer(1, 10**11)]
    dtype: DType = "uint8"
    tiff_pages: TiffPages = "first"
    stretch: Stretch = ""
    max_no_data: Share = 1.0
    groups: str = ""  # checksum of groups.json; "" without groups

    @property
    def num_shards(self) -> int:
        return -(-self.images // self.per_shard)

    @property
    def image_spec(self) -> ImageSpec:
        return ImageSpec(self.channels, self.dtype, self.tiff_pages, self.stretch, self.max_no_data)

    def images_of(self, shard: int) -> range:
        """Return the dataset indices of the images in a shard."""
        return range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.images))


def shard_name(shard: int, suffix: str) -> str:
    """Return the file name of a shard's "tar" or "index"."""
    return f"shard-{shard:06d}.{suffix}"


def checksum(entries: bytes) -> int:
    """Return the CRC-32 of an index, as a positive int32."""
    return zlib.crc32(entries) & 0x7FFFFFFF


def encode_groups(names: Sequence[str]) -> tuple[bytes, str]:
    """Return the content of groups.json, given the name of the group of each image, and its checksum."""
    content = json.dumps(names).encode()
    return content, f"{zlib.crc32(content):08x}"


def read_settings(folder: str | Path) -> CacheSettings | None:
    """Read the settings of the cache in a folder or at a URL, or return None if there is no cache. Raises UserError.

    A local folder with a settings.json of another program, and without a shard, is not a cache. Of a URL that names a
    tar or a .zip, nothing is requested: a server may answer with the archive, or refuse.
    """
    if is_url(str(folder)) and (is_tar(str(folder)) or is_zip(str(folder))):
        return None
    try:
        return _parse_settings(f"{folder}/settings.json")
    except UserError:
        if is_url(str(folder)) or any(Path(folder).glob("shard-*")):
            raise
        return None


def find_settings(spec: str) -> CacheSettings | None:
    """Return the settings of the first cache among the parts of a dataset, or None without any. Raises UserError."""
    folders = (os.path.expanduser(split_options(part.source)[0]) for part in read_parts(spec))
    return next((settings for folder in folders if (settings := read_settings(folder)) is not None), None)


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


def open_cache(folder: str | Path, image_spec: ImageSpec = RGB, shard_cache_gib: float = 50.0) -> ShardDataset:
    """Open a complete cache in a folder or at a URL.

    Raises:
        UserError: If there is no cache, it is incomplete or damaged, or its images have another specification.
    """
    cache = str(folder)
    settings = read_settings(cache)
    if settings is None:
        raise UserError(f"{cache} is not a cache: it has no settings.json")
    if settings.image_spec != image_spec:
        raise UserError(
            f"the cache {cache} has images of {settings.image_spec}, not {image_spec}: pass {settings.image_spec.flags}"
        )
    _check_shard_list(cache, settings)
    tars = [f"{cache}/{shard_name(shard, 'tar')}" for shard in range(settings.num_shards)]

    def load_index(shard: int) -> IndexEntries:
        entries = read_index(cache, shard)
        if entries is None:
            raise UserError(f"{tars[shard]} is missing, truncated or not that of its index: run `pixmim cache` again")
        damage = _find_damage(entries, shard, settings)
        if damage:
            raise UserError(f"{cache}/{shard_name(shard, 'index')} is damaged ({damage}): {_RECREATE}")
        return entries

    indexes = parallel_map("reading indexes", load_index, settings.num_shards)
    if not any(len(entries) > 1 for entries in indexes):
        raise UserError(f"the cache {cache} is empty: none of its images could be read")
    dataset = ShardDataset(
        cache,
        image_spec,
        tars,
        open_shards(tars, [FileVersion(int(entries[-1]["offset"])) for entries in indexes], shard_cache_gib),
        [ShardIndex(entries[:-1]) for entries in indexes],
        classes=settings.classes,
        raw=settings.kind == "raw",
        kind="a cache",
    )
    dataset.label_hint = "the images that the cache was made of have none"
    if settings.groups:
        groups = _read_groups(cache, settings)
        dataset.set_groups([groups[image] for entries in indexes for image in entries[:-1]["image"]])
    return dataset


def _read_groups(cache: str, settings: CacheSettings) -> list[str]:
    """Return the name of the group of each image of the source. Raises UserError."""
    name = f"{cache}/{GROUPS_FILE}"
    content = read_small_file(name, _MAX_INDEX_BYTES) or b""
    groups = parse_json(content.decode("utf-8", "replace"), name) if content else None
    if (
        not isinstance(groups, list)
        or not all(isinstance(group, str) for group in groups)
        or len(groups) != settings.images
        or encode_groups(groups)[1] != settings.groups
    ):
        raise UserError(f"{name} is missing, or not that of settings.json: {_RECREATE}")
    return groups


def _read_json(name: str) -> Any:
    """Return the content of a JSON file at a path or URL; an object without keys for null, and None without a file."""
    text = read_small_file(name)
    return None if text is None else parse_json(text.decode("utf-8", "surrogateescape"), name) or {}


def _parse_settings(name: str) -> CacheSettings | None:
    """Return the content of a settings.json at a path or URL, or None without a file. Raises UserError."""
    content = _read_json(name)
    if content is None:
        return None
    try:
        _check_settings(content)
    except UserError as error:
        raise UserError(f"{name} is damaged ({error}): {_RECREATE}") from None
    return CacheSettings(**content)


def _check_settings(content: Any) -> None:
    """Raise UserError unless the content of a settings.json has all settings, with valid values."""
    hints = hints_of(CacheSettings)
    content = content if isinstance(content, dict) else {}
    for name in {**content, **hints}:
        if name not in hints:
            raise UserError(f"unknown setting {shown(name)}")
        value = content.get(name, getattr(CacheSettings, name, None))
        check_value(name, value, hints[name])
        items = value if isinstance(value, list) else [None]
        if name == "size" and not (len(items) == 2 and all(type(n) is int and 0 < n < 2**16 for n in items)):
            raise UserError(f"size must be height and width in pixels, not {shown(value)}")
        if name == "classes" and not all(isinstance(item, str) for item in items):
            raise UserError(f"classes must be a list of names, not {shown(value)}")


def _check_shard_list(cache: str, settings: CacheSettings) -> None:
    """Raise UserError unless index.json lists as many shards as the settings require, before any is opened."""
    name = f"{cache}/index.json"
    content = _read_json(name)
    if content is None:
        raise UserError(f"the cache {cache} is not finished: run the same `pixmim cache` again")
    shards = content.get("shards") if isinstance(content, dict) else None
    count = len(shards) if isinstance(shards, list) else 0
    if count != settings.num_shards:
        raise UserError(
            f"{name} lists {count:,} shards, but settings.json requires {settings.num_shards:,} for "
            f"{settings.images:,} images: {_RECREATE}"
        )


def _find_damage(entries: IndexEntries, shard: int, settings: CacheSettings) -> str:
    """Describe why a shard's index does not fit the settings; "" if it does."""
    samples, tar_bytes, expected = entries[:-1], int(entries[-1]["offset"]), settings.images_of(shard)
    if not len(samples):
        return ""
    numbers, offset, length, label, h, w = (samples[name].astype(np.int64) for name in INDEX_DTYPE.names or ())
    if ((offset < 0) | (length < 0) | (offset > tar_bytes - length)).any():
        return f"an image outside of the {tar_bytes:,} bytes of its tar"
    if ((label < -1) | (label >= len(settings.classes))).any():
        return f"a class number from {label.min():,} to {label.max():,}, of {len(settings.classes):,} classes"
    if numbers[0] < expected[0] or numbers[-1] > expected[-1] or (numbers[1:] <= numbers[:-1]).any():
        return f"images other than {expected[0]:,} to {expected[-1]:,} in order"
    if min(h.min(), w.min()) < 1:
        return "an image without pixels"
    pixels = h * w
    try:
        for extreme in (pixels.argmax(), pixels.argmin()):
            check_size(int(w[extreme]), int(h[extreme]))
    except BadImage as error:
        return str(error)
    if settings.kind == "raw" and (pixels * settings.channels * settings.image_spec.itemsize != length).any():
        return "byte counts that differ from the image sizes"
    return ""
