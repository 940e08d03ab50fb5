"""Which pictures lie below a folder, found quickly a second time: what each folder held is kept for next time.

A folder's own times and inode say whether anything came, went or was renamed in it, so next time one `stat` for each
folder is enough, and only what changed is listed anew. What is kept is never trusted beyond that:
- a folder that had changed less than SETTLED before it was listed, or changed meanwhile, or lies in the future of this
  machine's clock, is not kept: its next change could leave the same time behind;
- nor is one on a file system whose folders' times say little (`filesystem.py`);
- the change time is compared too, since programs that unpack or copy put modification times back;
- where links lead is looked up each time, for that can change without a trace in the folder that holds the link;
- a kept file that is damaged, of another version, or made for other extensions is as good as none, and so is a cache
  directory that cannot be read or written.
"""

import os
import time
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path

import numpy as np

from pixmim.data.folders.filesystem import folder_times_are_true
from pixmim.data.folders.paths import END, Paths
from pixmim.utils.files import cache_path, read_file, write_whole
from pixmim.utils.progress import patience

SETTLED = 60.0
"""Seconds without a change before a folder is trusted: more than any file system's grain, and clocks that differ."""

WORTH_KEEPING = 10_000
"""Pictures; fewer are listed in a moment, and leave nothing in the cache directory."""

_MAX_BYTES = 2**32  # of a kept listing

_RECORD = np.dtype([("state", "<i8", 4), ("others", "<i8"), ("lengths", "<i8", 4)])

State = tuple[int, int, int, int]
"""Of a folder: modification and change time in nanoseconds, inode, size as the file system gives it."""


@dataclass(frozen=True, slots=True)
class Folder:
    """What one folder holds itself. Names are bytes in order, END after each.

    state     when it was like this; None: not to be trusted next time
    pictures  whatever has a picture's extension and is no folder: links wherever they lead, and FIFOs and the like,
              which reading refuses, so that they are accounted for
    folders   names of subfolders
    links     names of all other links; they may lead to folders
    others    other files
    """

    state: State | None
    pictures: bytes
    folders: bytes
    links: bytes
    others: int


@dataclass(frozen=True)
class Listing:
    """Pictures below a folder.

    paths   from the folder on, in the order of their bytes (for names in proper UTF-8, the order of Python's str)
    others  files that are no pictures
    closed  folders that could not be read
    """

    paths: Paths
    others: int
    closed: list[str]


def list_pictures(root: Path, extensions: frozenset[str]) -> Listing:
    """All files below `root` with one of `extensions` (in small letters, with their dot), in any case.

    Hidden files and folders are left out; links are followed, each folder once, under the first path on which a walk
    in alphabetical order meets it. Raises OSError if `root` itself cannot be read.
    """
    endings = tuple(sorted(os.fsencode(extension) for extension in extensions))
    header = b"pixmim listing 2 " + b" ".join(endings) + b"\n"
    file = cache_path("listings", os.path.abspath(root))
    known = _read(file, header)
    with patience(f"listing {root}", "pictures") as add:
        found, closed, others = _walk(os.path.join(os.fsencode(root), b""), known, endings, add)
    paths = Paths((folder, names) for _, folder, names in sorted(_runs(found)))
    settled = {path: folder for path, folder in found.items() if folder.state is not None}
    if len(paths) >= WORTH_KEEPING and settled and settled != known:
        _write(file, header, settled)
    return Listing(paths, others, [os.fsdecode(path) for path in closed])


def _walk(
    root: bytes, known: dict[bytes, Folder], endings: tuple[bytes, ...], add: Callable[[int], None]
) -> tuple[dict[bytes, Folder], list[bytes], int]:
    """Folders by their path from `root` on (empty, or with a slash at its end), those that are closed, other files."""
    found: dict[bytes, Folder] = {}
    closed: list[bytes] = []
    seen: set[tuple[int, int]] = set()
    true: dict[int, bool] = {}
    others = 0
    waiting = [b""]
    while waiting:
        path = waiting.pop()
        try:
            now, status = time.time(), os.stat(root + path)
            if (status.st_dev, status.st_ino) in seen:  # a link that leads back up, or to a folder met before
                continue
            seen.add((status.st_dev, status.st_ino))
            folder = known.get(path)
            if folder is not None and folder.state == _state(status):
                add(folder.pictures.count(END))
            else:
                folder = _look(root + path, status, now, endings, add)
                if status.st_dev not in true:
                    true[status.st_dev] = folder_times_are_true(root + path)
                if not true[status.st_dev]:
                    folder = replace(folder, state=None)
        except OSError as error:
            if not path:
                raise
            if not isinstance(error, FileNotFoundError | NotADirectoryError):  # then it has gone since
                closed.append(path)
            continue
        found[path] = folder
        links = _names(folder.links)
        leading = [name for name in links if os.path.isdir(root + path + name)]
        others += folder.others + len(links) - len(leading)
        inside = sorted(_names(folder.folders) + leading, reverse=True)
        waiting += [path + name + b"/" for name in inside]
    return found, closed, others


def _look(
    path: bytes, before: os.stat_result, now: float, endings: tuple[bytes, ...], add: Callable[[int], None]
) -> Folder:
    """List one folder, whose `before` was read at `now`."""
    pictures: list[bytes] = []
    folders: list[bytes] = []
    links: list[bytes] = []
    others = told = 0
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith(b"."):
                continue
            link = entry.is_symlink()
            if name.lower().endswith(endings) and (link or not entry.is_dir(follow_symlinks=False)):
                pictures.append(name)
            elif link:
                links.append(name)
            elif entry.is_dir(follow_symlinks=False):
                folders.append(name)
            else:
                others += 1
            if len(pictures) - told == 4096:
                add(4096)
                told += 4096
    add(len(pictures) - told)
    changed = max(before.st_mtime, before.st_ctime)
    settled = now - changed > SETTLED and _state(os.stat(path)) == _state(before)
    return Folder(_state(before) if settled else None, _joined(pictures), _joined(folders), _joined(links), others)


def _runs(found: dict[bytes, Folder]) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Pictures that follow one another in the order of all paths, as (first path, folder, names).

    In that order a subfolder comes where its name with a slash would: so it may part its folder's own pictures.
    """
    for path, folder in found.items():
        inside = [name + b"/" for name in _names(folder.folders + folder.links)]
        inside = sorted(name for name in inside if path + name in found)
        names = _names(folder.pictures) if inside else []
        places = [0, *(bisect_left(names, name) for name in inside), len(names)]
        for start, stop in pairwise(places):
            if start < stop:
                yield path + names[start], path, _joined(names[start:stop])
        if folder.pictures and not inside:
            yield path + folder.pictures.split(END, 1)[0], path, folder.pictures


def _state(status: os.stat_result) -> State:
    inode = status.st_ino % 2**63  # some file systems use all 64 bits
    return status.st_mtime_ns, status.st_ctime_ns, inode, status.st_size


def _joined(names: list[bytes]) -> bytes:
    return b"".join(name + END for name in sorted(names))


def _names(joined: bytes) -> list[bytes]:
    return joined.split(END)[:-1]


def _read(file: Path, header: bytes) -> dict[bytes, Folder]:
    """Folders as they were kept; none if there is nothing to rely on."""
    try:
        data = memoryview(read_file(file, _MAX_BYTES))
    except OSError:
        return {}
    body = data[len(header) + 4 :]
    if data[: len(header) + 4] != header + zlib.crc32(body).to_bytes(4, "little"):
        return {}
    count = int.from_bytes(body[:8], "little")
    records = np.frombuffer(body[8:], _RECORD, count)
    lengths = records["lengths"].ravel()
    ends = (8 + records.nbytes + np.cumsum(lengths)).tolist()
    texts = [bytes(body[end - length : end]) for end, length in zip(ends, lengths.tolist(), strict=True)]
    known: dict[bytes, Folder] = {}
    for i, (state, others) in enumerate(zip(records["state"].tolist(), records["others"].tolist(), strict=True)):
        path, pictures, folders, links = texts[4 * i : 4 * i + 4]
        known[path] = Folder(tuple(state), pictures, folders, links, others)
    return known


def _write(file: Path, header: bytes, folders: dict[bytes, Folder]) -> None:
    """Keep folders for next time: whole or not at all, and without a word where the cache directory takes nothing."""
    texts = [[path, folder.pictures, folder.folders, folder.links] for path, folder in folders.items()]
    records = np.zeros(len(folders), _RECORD)
    records["state"] = [folder.state for folder in folders.values()]
    records["others"] = [folder.others for folder in folders.values()]
    records["lengths"] = [[len(text) for text in of_one] for of_one in texts]
    body = b"".join([len(folders).to_bytes(8, "little"), records.tobytes(), *chain(*texts)])
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, header + zlib.crc32(body).to_bytes(4, "little") + body)
