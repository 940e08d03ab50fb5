"""What is in a tar of WebDataset's format: files whose names differ only in extension are one sample.

A tar has no list of what is in it, so each is searched through once, header by header. What was found is kept below
the user's cache directory for next time, and holds as long as the tar is of the same size and time (far away: tag).
"""

import json
import os
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pixmim.data.shards.dataset import ENTRY, Contents, outside
from pixmim.data.shards.fsspec_io import is_far
from pixmim.data.shards.local import Descriptor, Shelf, Version
from pixmim.data.shards.tar_reader import members
from pixmim.utils.files import cache_path, read_file, write_whole

PICTURES = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif", "ppm", "pgm", "jpe", "jfif", "npy")
"""Extensions of pictures. Of several in one sample, the first in this order is its image."""

_FORMAT = 2  # of what is remembered

_MOST_REMEMBERED = 2**30  # bytes of what is remembered of one tar

_MOST_BYTES = int(np.iinfo(np.int32).max)  # of a picture that an entry tells; so many are not read anyway

_MOST_CLASSES = 1_000_000  # a larger number in a .cls is an identifier

_LONGEST_WORD = 100  # bytes of a class's name in a .cls; more is a caption


@dataclass(frozen=True)
class Found:
    """What the search through one tar found: samples, and what was left out.

    several     samples with more than one picture
    lost        pictures of these beyond the first
    links       links whose names are pictures'
    without     samples with none
    unlabelled  samples with a picture and no class
    words       the classes' names, where every .cls holds words instead of a number; labels are their places
    extensions  of the files of samples without a picture, with how often each came
    """

    contents: Contents
    several: int = 0
    lost: int = 0
    links: int = 0
    without: int = 0
    unlabelled: int = 0
    words: list[str] = field(default_factory=list)
    extensions: dict[str, int] = field(default_factory=dict)


def contents(name: str, version: Version, shelf: Shelf, shard: int, last_dot: bool = False) -> Found:
    """What is in a tar of a shelf: remembered, or else searched for and remembered. Raises UserError."""
    memory = cache_path("tars", (name if is_far(name) else os.path.abspath(name)) + "\0last" * last_dot)
    found = _recall(memory, name, version)
    if found is None:
        found = search(shelf.open(shard), name, last_dot)
        _remember(memory, name, version, found)
    return found


def search(tar: Descriptor, name: str, last_dot: bool = False) -> Found:
    """Group the files of a tar into samples, in the order in which each sample's first file comes.

    A key is all of a name up to the first dot (or the last) behind the last slash, the folder included. Files of one
    key need not stand together; one whose extension its key has had already begins another sample. Names that begin
    with a dot are left out. Raises UserError as `members` does.
    """
    samples: list[dict[str, tuple[int, int]]] = []
    keys: list[str] = []
    latest: dict[str, dict[str, tuple[int, int]]] = {}
    links: list[str] = []
    for member in members(tar, name, links.append):
        folder, slash, file = member.name.rpartition("/")
        stem, dot, extension = file.rpartition(".") if last_dot else file.partition(".")
        if not stem or not dot or stem.startswith("."):
            continue
        key, extension = folder + slash + stem, extension.lower()
        sample = latest.get(key)
        if sample is None or extension in sample:
            sample = latest[key] = {}
            samples.append(sample)
            keys.append(key)
        sample[extension] = member.offset, member.length

    entries, kept, texts, several, lost, extensions = [], [], list[bytes](), 0, 0, Counter[str]()
    for number, (key, sample) in enumerate(zip(keys, samples, strict=True)):
        pictures = _pictures(sample)
        if not pictures:
            extensions.update(sample.keys())
            continue
        offset, length = sample[pictures[0]]
        texts.append(_text(tar, *sample["cls"]) if "cls" in sample else b"")
        entries.append((number, offset, min(length, _MOST_BYTES), -1, 0, 0))
        kept.append(key)
        several += len(pictures) > 1
        lost += len(pictures) - 1
    names = zlib.compress("\0".join(kept).encode("utf-8", "surrogateescape"), 1)
    contents = Contents(np.asarray(entries, ENTRY), names)
    labels, words = _labels(texts)
    contents.entries["label"] = labels
    linked = sum(link.rpartition(".")[2].lower() in PICTURES for link in links)
    without, unlabelled = len(samples) - len(entries), labels.count(-1)
    return Found(contents, several, lost, linked, without, unlabelled, words, dict(extensions))


def _pictures(sample: dict[str, tuple[int, int]]) -> list[str]:
    """The extensions of a sample's pictures, the one to take first: jpg before png, and png before mask.png."""
    known = [extension for extension in sample if extension.rpartition(".")[2] in PICTURES]
    return sorted(known, key=lambda e: (e.count("."), PICTURES.index(e.rpartition(".")[2]), e))


def _text(tar: Descriptor, offset: int, length: int) -> bytes:
    """What a .cls holds; nothing if that is too long for a class."""
    return tar.read(length, offset).strip() if length <= _LONGEST_WORD else b""


def _labels(texts: list[bytes]) -> tuple[list[int], list[str]]:
    """The class of each sample, -1 for none, from what its .cls holds; and the classes' names, if those are words.

    They are words if every sample has one and not all are numbers.
    """
    numbers = [int(text) if text.isdigit() and int(text) < _MOST_CLASSES else -1 for text in texts]
    if -1 not in numbers or not all(
        re.search(rb"[^\d+.-]", text) for text, n in zip(texts, numbers, strict=True) if n < 0
    ):
        return numbers, []
    words = [text.decode("utf-8", "replace") for text in texts]
    classes = sorted(set(words))
    place = {word: i for i, word in enumerate(classes)}
    return [place[word] for word in words], classes


def _recall(memory: Path, name: str, version: Version) -> Found | None:
    """Return what was remembered of a tar, or None if that is damaged, of another version, or does not fit the tar."""
    try:
        data = read_file(memory, _MOST_REMEMBERED)
        head, _, body = data[:-4].partition(b"\n")
        if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
            return None
        about = json.loads(head)
        if about["of"] != [_FORMAT, name, *version]:
            return None
        size, counts = about["samples"] * ENTRY.itemsize, about["found"]
        entries = np.frombuffer(body[:size], ENTRY)
        if (
            type(about["samples"]) is not int
            or len(entries) != about["samples"]
            or outside(entries, version.size, len(counts["words"]) or _MOST_CLASSES)
        ):
            return None
        if any(type(n) is not int for key, n in counts.items() if key not in ("extensions", "words")):
            return None
        if type(counts["words"]) is not list or any(type(word) is not str for word in counts["words"]):
            return None
        return Found(Contents(entries, body[size:]), **counts | {"extensions": Counter[str](counts["extensions"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _remember(memory: Path, name: str, version: Version, found: Found) -> None:
    """Keep what was found, where there is a place to keep it."""
    counts = {key: value for key, value in vars(found).items() if key != "contents"}
    about = {"of": [_FORMAT, name, *version], "samples": len(found.contents.entries), "found": counts}
    data = json.dumps(about).encode() + b"\n" + found.contents.entries.tobytes() + found.contents.keys
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_whole(memory, data + zlib.crc32(data).to_bytes(4, "little"))
    except OSError:  # a home that cannot be written to: the next run searches again
        return
