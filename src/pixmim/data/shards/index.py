"""The sample index of a WebDataset tar: files whose names differ only in their extension are one sample.

A tar has no table of contents, so it is scanned once, header by header. The result is cached in the user's cache
directory, and is valid while the tar has the same size and modification time (remote: ETag).
"""

import json
import os
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pixmim.data.shards.dataset import INDEX_DTYPE, ShardIndex, find_invalid_entry
from pixmim.data.shards.fsspec_io import is_url
from pixmim.data.shards.local import FileVersion, OpenFile, ShardStore
from pixmim.data.shards.tar_reader import iter_members
from pixmim.utils.files import cache_path, read_file, write_text_atomically

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif", "ppm", "pgm", "jpe", "jfif", "npy")
"""Of several images in one sample, the first in this order is used."""

_FORMAT = 3  # of the cached index

_MAX_CACHED_BYTES = 2**30  # of one tar's index

_MAX_LENGTH = int(np.iinfo(np.int32).max)  # of an image in the index; longer ones are not read anyway

MAX_CLASSES = 1_000_000
"""A larger number in a .cls file is an identifier."""

_MAX_CLASS_BYTES = 100  # a longer .cls file is a caption


@dataclass(frozen=True)
class ScanResult:
    """Samples of one tar, and what was left out.

    Args:
        index: Samples with an image.
        extra_images: Images left out because their sample has another one.
        links: Links left out whose names are an image's.
        without_image: Samples left out.
        unlabeled: Samples with an image and no class.
        class_names: Sorted contents of .cls files, words or numbers. Labels are positions in this list.
        extensions: Of files in samples without an image, with their counts.
    """

    index: ShardIndex
    extra_images: int = 0
    links: int = 0
    without_image: int = 0
    unlabeled: int = 0
    class_names: list[str] = field(default_factory=list)
    extensions: dict[str, int] = field(default_factory=dict)


def load_or_scan(name: str, version: FileVersion, store: ShardStore, shard: int, last_dot: bool = False) -> ScanResult:
    """Return the index of a tar from the cache, or scan it and cache the result.

    Raises:
        UserError: As `iter_members`, and as opening the shard does.
    """
    path = cache_path("tars", (name if is_url(name) else os.path.abspath(name)) + "\0last" * last_dot)
    result = _load_index(path, name, version)
    if result is None:
        result = scan(store.open(shard), name, last_dot)
        _save_index(path, name, version, result)
    return result


def scan(tar: OpenFile, name: str, last_dot: bool = False) -> ScanResult:
    """Group the files of a tar into samples, ordered by each sample's first file.

    The key of a sample is its folder and the file name up to the first dot. Files of one key need not be adjacent; a
    repeated extension starts a new sample. Names that begin with a dot are left out.

    Args:
        tar: The open tar.
        name: Its path or URL, for messages.
        last_dot: Whether keys end at the last dot of a file name instead of the first.

    Raises:
        UserError: As `iter_members`.
    """
    samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
    latest: dict[str, dict[str, tuple[int, int]]] = {}
    links: list[str] = []
    for member in iter_members(tar, name, links.append):
        folder, slash, file = member.name.rpartition("/")
        stem, dot, extension = file.rpartition(".") if last_dot else file.partition(".")
        if not stem or not dot or stem.startswith("."):
            continue
        key, extension = folder + slash + stem, extension.lower()
        sample = latest.get(key)
        if sample is None or extension in sample:
            sample = latest[key] = {}
            samples.append((key, sample))
        sample[extension] = member.offset, member.length

    entries, keys, class_of, extra_images, extensions = [], [], list[str](), 0, Counter[str]()
    for number, (key, sample) in enumerate(samples):
        images = [extension for extension in sample if extension.rpartition(".")[2] in IMAGE_EXTENSIONS]
        if not images:
            extensions.update(sample.keys())
            continue
        offset, length = sample[min(images, key=_image_priority)]
        entries.append((number, offset, min(length, _MAX_LENGTH), -1, 0, 0))
        keys.append(key)
        extra_images += len(images) - 1
        class_of.append(_read_class(tar, *sample["cls"]) if "cls" in sample else "")
    classes = sorted(set(class_of) - {""})
    label_of = {"": -1} | {name: label for label, name in enumerate(classes)}
    packed = zlib.compress("\0".join(keys).encode("utf-8", "surrogateescape"), 1)
    index = ShardIndex(np.asarray(entries, INDEX_DTYPE), packed)
    index.entries["label"] = [label_of[name] for name in class_of]
    return ScanResult(
        index,
        extra_images=extra_images,
        links=sum(link.rpartition(".")[2].lower() in IMAGE_EXTENSIONS for link in links),
        without_image=len(samples) - len(entries),
        unlabeled=class_of.count(""),
        class_names=classes,
        extensions=dict(extensions),
    )


def _image_priority(extension: str) -> tuple[int, int, str]:
    """Order jpg before png, and png before mask.png."""
    return extension.count("."), IMAGE_EXTENSIONS.index(extension.rpartition(".")[2]), extension


def _read_class(tar: OpenFile, offset: int, length: int) -> str:
    """Return the number or word in a .cls file; "" for a caption, an identifier, or a number that is not a class."""
    text = tar.read(length, offset).strip() if length <= _MAX_CLASS_BYTES else b""
    if text.isdigit():
        return str(int(text)) if int(text) < MAX_CLASSES else ""
    return text.decode("utf-8", "replace") if re.search(rb"[^\d+.-]", text) else ""


def _load_index(path: Path, name: str, version: FileVersion) -> ScanResult | None:
    """Read a cached index, or return None if it is damaged, of another version, or does not fit the tar."""
    try:
        data = read_file(path, _MAX_CACHED_BYTES)
        header, _, body = data[:-4].partition(b"\n")
        if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
            return None
        cached: dict[str, Any] = json.loads(header)
        count, facts = cached["samples"], cached["facts"]
        names, extensions = facts["class_names"], facts.pop("extensions")
        valid = (
            cached["version"] == [_FORMAT, name, *version]
            and all(type(value) is int for value in [count, *extensions.values()])
            and all(type(value) is int for key, value in facts.items() if key != "class_names")
            and type(names) is list
            and all(type(word) is str for word in names)
        )
        entries = np.frombuffer(body[: count * INDEX_DTYPE.itemsize], INDEX_DTYPE)
        if not valid or len(entries) != count or find_invalid_entry(entries, version.size, len(names)):
            return None
        return ScanResult(ShardIndex(entries, body[entries.nbytes :]), extensions=extensions, **facts)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _save_index(path: Path, name: str, version: FileVersion, result: ScanResult) -> None:
    """Cache an index, unless the cache directory is not writable."""
    facts = {key: value for key, value in vars(result).items() if key != "index"}
    header = {"version": [_FORMAT, name, *version], "samples": len(result.index.entries), "facts": facts}
    data = json.dumps(header).encode() + b"\n" + result.index.entries.tobytes() + result.index.keys
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, data + zlib.crc32(data).to_bytes(4, "little"))
    except OSError:  # the next run scans again
        return
