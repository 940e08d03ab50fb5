"""WebDataset tars: find them, index their samples, and read their classes.

Files whose names differ only in their extension are one sample. A tar has no table of contents, so it is scanned once,
header by header. The result is cached in the user's cache directory, and is valid while the tar has the same size and
modification time (remote: ETag).
"""

import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from posixpath import dirname
from typing import Any

import numpy as np
from rich.console import Console

from pixmim.data.dataset import RGB, ImageSpec
from pixmim.data.image_folder import IMAGE_EXTENSIONS
from pixmim.data.shards import fsspec_io
from pixmim.data.shards.dataset import INDEX_DTYPE, ShardDataset, ShardIndex
from pixmim.data.shards.fsspec_io import NoAccessError, is_url
from pixmim.data.shards.local import FileVersion, OpenFile, ShardStore
from pixmim.data.shards.remote import open_shards
from pixmim.data.shards.tar_reader import iter_members
from pixmim.data.uri import expand_braces
from pixmim.utils.console import print_plain
from pixmim.utils.errors import UserError
from pixmim.utils.files import cache_path, read_file, write_text_atomically
from pixmim.utils.threads import parallel_map

MAX_CLASSES = 1_000_000
"""A larger number in a .cls file is an identifier."""

_MAX_CLASS_BYTES = 100  # a longer .cls file is a caption
_MAX_LENGTH = int(np.iinfo(np.int32).max)  # of an image in the index; longer ones are not read anyway
_MAX_CACHED_BYTES = 2**30  # of one tar's index
_FORMAT = 4  # of the cached index
_HIDDEN = re.compile(r"(?:^|/)\.(?!\.?(?:/|$))")  # a name that starts with a point, unlike "./" and "../"
_TAR = re.compile(r"\.(tar(\.\w+)?|tgz|tbz2?|txz)\}*$", re.IGNORECASE)

_warned: set[str] = set()  # datasets whose ignored images were reported


def is_tar(spec: str) -> bool:
    """Return True if a name or pattern ends like a tar's, compressed or not."""
    name = spec.split("?", 1)[0] if is_url(spec) else spec  # a URL may be signed
    return _TAR.search(name) is not None


def find_tars(spec: str) -> dict[str, FileVersion | None] | None:
    """Find the tars of a path, a URL, a pattern, or a folder (a local one must contain only tars).

    Returns their names, with their versions where those are known; None if `spec` is something else. Raises UserError
    if nothing matches a pattern, or a URL leads to no tars.
    """
    if is_url(spec):
        return _expand(spec if is_tar(spec) else f"{spec}/*.tar")
    if os.path.isdir(spec):
        names = sorted(name for name in os.listdir(spec) if not name.startswith("."))
        tars = [name for name in names if is_tar(name)]
        others = set(names) - {*tars, "classes.txt"}
        return dict.fromkeys(f"{spec}/{name}" for name in tars) if tars and not others else None
    if not is_tar(spec):
        return None
    return {spec: None} if os.path.isfile(spec) else _expand(spec)


def _expand(pattern: str) -> dict[str, FileVersion | None]:
    versions: dict[str, FileVersion | None] = {}
    for name in expand_braces(pattern):
        if any(character in name for character in ("*" if is_url(name) else "*?[")):
            matching = fsspec_io.find_matching(name)
            if not matching:
                raise UserError(f"nothing matches {name}" + ", or the server does not list files" * is_url(name))
            versions |= matching
        else:
            versions[name] = None
    return versions


@dataclass(frozen=True)
class ScanResult:
    """Samples of one tar that have an image, and what was left out."""

    index: ShardIndex
    extra_images: int = 0  # left out because their sample has another one
    links: int = 0  # left out, with the name of an image
    without_image: int = 0  # samples left out
    unlabeled: int = 0  # samples with an image and no class
    class_names: list[str] = field(default_factory=list)
    """Sorted contents of .cls files, words or numbers. Labels are positions in this list."""
    extensions: dict[str, int] = field(default_factory=dict)
    """Extensions of files in samples without an image, with their counts."""


def load_or_scan(name: str, version: FileVersion, store: ShardStore, shard: int, last_dot: bool = False) -> ScanResult:
    """Return the index of a tar from the cache, or scan it and cache the result. Raises UserError."""
    path = cache_path("tars", (name if is_url(name) else os.path.abspath(name)) + "\0last" * last_dot)
    result = _load_index(path, name, version)
    if result is None:
        result = scan(store.open(shard), name, last_dot)
        _save_index(path, name, version, result)
    return result


def scan(tar: OpenFile, name: str, last_dot: bool = False) -> ScanResult:
    """Group the files of a tar into samples, ordered by each sample's first file. Raises UserError as `iter_members`.

    The key of a sample is its folder and the file name up to the first dot, or the last one. Files of one key need not
    be adjacent; a repeated extension starts a new sample. Hidden files and folders are ignored.
    """
    samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
    latest: dict[str, dict[str, tuple[int, int]]] = {}
    links = 0
    for member in iter_members(tar, name):
        if _HIDDEN.search(member.name):
            continue
        folder, slash, file = member.name.rpartition("/")
        stem, dot, extension = file.rpartition(".") if last_dot else file.partition(".")
        if member.is_link:
            links += file.rpartition(".")[2].lower() in IMAGE_EXTENSIONS
        if member.is_link or not dot:
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
        links=links,
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
        if cached["version"] != [_FORMAT, name, *version]:
            return None
        entries = np.frombuffer(body[: cached["samples"] * INDEX_DTYPE.itemsize], INDEX_DTYPE)
        return ScanResult(ShardIndex(entries, body[entries.nbytes :]), **cached["facts"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
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


def open_webdataset(
    spec: str,
    tars: dict[str, FileVersion | None],
    image_spec: ImageSpec = RGB,
    shard_cache_gib: float = 50.0,
    last_dot: bool = False,
) -> ShardDataset:
    """Open the samples of the tars that `find_tars` returned, scanning those whose index is not cached.

    Raises:
        UserError: If a tar is missing, truncated or damaged (samples before the damage are not used either), or none
            contains an image.
    """
    names = list(tars)
    current = parallel_map("finding shards", lambda i: tars[names[i]] or fsspec_io.file_version(names[i]), len(names))
    missing = [name for name, version in zip(names, current, strict=True) if version is None]
    if missing:
        count = f" ({len(missing)} of {len(names)} are missing)" * (len(missing) > 1)
        raise UserError(f"{missing[0]} does not exist{count}")
    versions = [version for version in current if version is not None]
    store = open_shards(names, versions, shard_cache_gib)
    scans = parallel_map(
        "indexing shards", lambda i: load_or_scan(names[i], versions[i], store, i, last_dot), len(names), threads=8
    )
    if not any(len(scan.index.entries) for scan in scans):
        extensions = sum((Counter(scan.extensions) for scan in scans), Counter[str]())
        what = " ".join(f".{extension}" for extension, _ in extensions.most_common(8)) or "no files"
        known = " ".join(f".{extension}" for extension in IMAGE_EXTENSIONS)
        raise UserError(f"no images in {spec} (found {what}); supported: {known}")
    _warn_ignored(spec, scans)
    classes, indexes = _merge_labels(names, scans)
    dataset = ShardDataset(spec, image_spec, names, store, indexes, classes=classes, left_out=_left_out(scans))
    dataset.label_hint = "an evaluation needs a .cls file with a number or a word in each sample"
    if unlabeled := sum(scan.unlabeled for scan in scans):
        note = f"{unlabeled:,} of {len(dataset):,} samples have no class"
        dataset.label_hint += f", and {note}"
        dataset.description += f"; no labels: {note}" * (unlabeled < len(dataset))
    return dataset


def _warn_ignored(spec: str, scans: Sequence[ScanResult]) -> None:
    """Warn once, on rank 0, about images that are ignored, which is rarely intended."""
    extra, links = sum(scan.extra_images for scan in scans), sum(scan.links for scan in scans)
    if spec in _warned or os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        return
    _warned.add(spec)
    images = sum(len(scan.index.entries) for scan in scans) + extra
    warnings = {
        f"{extra:,} of {images:,} images are ignored. Files with the same name up to the first dot are one sample, of "
        f"which one image is used. If names contain dots, pass '{spec},key=last-dot'": extra,
        f"{links:,} images are links, which are ignored. Pack them with --dereference --hard-dereference": links,
    }
    for warning in [text for text, count in warnings.items() if count]:
        print_plain(Console(stderr=True), f"warning: {spec}: {warning}")


def _merge_labels(tars: Sequence[str], scans: Sequence[ScanResult]) -> tuple[list[str], list[ShardIndex]]:
    """Return the names of all classes, and each tar's samples with labels by them; no names if a class is missing."""
    indexes = [scan.index for scan in scans]
    if any(scan.unlabeled for scan in scans):
        return [], indexes
    names = sorted({name for scan in scans for name in scan.class_names})
    if all(name.isascii() and name.isdecimal() for name in names):
        label_of = {name: int(name) for name in names}
        classes = _read_class_names(tars, max(label_of.values()))
    else:
        label_of = {name: label for label, name in enumerate(names)}
        classes = names
    for i, scan in enumerate(scans):
        entries = scan.index.entries.copy()
        entries["label"] = np.asarray([label_of[name] for name in scan.class_names], np.int32)[entries["label"]]
        indexes[i] = scan.index._replace(entries=entries)
    return classes, indexes


def _read_class_names(tars: Sequence[str], highest: int) -> list[str]:
    """Return the lines of classes.txt in the tars' folder, or the numbers up to `highest`."""
    folders = {dirname(name) for name in tars}
    path = os.path.join(folders.pop(), "classes.txt") if len(folders) == 1 else ""
    try:
        text = fsspec_io.read_small_file(path) if path else None
    except NoAccessError:  # what some storages answer if there is no such file
        text = None
    if text is None:
        return [str(number) for number in range(highest + 1)]
    names = [line.strip() for line in text.decode("utf-8", "replace").rstrip().split("\n")]
    if highest >= len(names):
        raise UserError(f"{path} names {len(names)} classes, but a sample has class number {highest}")
    return names


def _left_out(scans: Sequence[ScanResult]) -> str:
    """Describe what is left out, for the user; empty if nothing is."""
    ignored = sum(scan.extra_images + scan.links for scan in scans)
    without_image = sum(scan.without_image for scan in scans)
    notes = {"images are ignored": ignored, "samples without an image are ignored": without_image}
    return "; ".join(f"{count:,} {note}" for note, count in notes.items() if count)
