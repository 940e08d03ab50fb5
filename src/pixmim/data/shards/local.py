"""Random access to a dataset's tar shards by shard index and byte offset."""

import math
import os
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from pixmim.utils.errors import UserError
from pixmim.utils.files import open_regular

MAX_OPEN_FILES = 256
"""Shards a store keeps open; most systems allow a process 1024 files."""

RECHECK_SECONDS = 1.0
"""An open shard is checked for changes this often: `fstat` takes longer than the read itself."""

_HAS_PREAD = hasattr(os, "pread")  # not on Windows


class FileVersion(NamedTuple):
    """Size of a file, with its modification time or the server's ETag ("" if unknown)."""

    size: int
    tag: str = ""

    def matches(self, current: "FileVersion") -> bool:
        """Return True if `current` has the same size, and the same tag unless this one is unknown."""
        return self.size == current.size and self.tag in ("", current.tag)


class OpenFile:
    """A regular file, open for reading until the last reference is dropped: one thread may evict it, another read."""

    def __init__(self, path: Path) -> None:
        self._path, self._descriptor, self._lock = path, open_regular(path), Lock()
        weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size
        self.checked_at = -math.inf

    def read(self, length: int, offset: int) -> bytes:
        """Read `length` bytes at `offset`; fewer at the end of the file. Thread-safe."""
        if _HAS_PREAD:
            return os.pread(self._descriptor, length, offset)
        with self._lock:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            return os.read(self._descriptor, length)

    def duplicate(self) -> int:
        """Return another descriptor of the file."""
        return os.dup(self._descriptor)

    @property
    def version(self) -> FileVersion:
        """The current size and modification time."""
        status = os.fstat(self._descriptor)
        return FileVersion(status.st_size, str(status.st_mtime_ns))

    @property
    def is_deleted(self) -> bool:
        """True once the file was unlinked; closing it frees its disk space."""
        return os.fstat(self._descriptor).st_nlink == 0

    def touch(self) -> None:
        """Set the modification time to now. Files of other users stay as they are."""
        now = time.time_ns()  # finer than the kernel's own timestamps, so that the order of two uses is recorded
        with suppress(OSError):
            os.utime(self._descriptor if os.utime in os.supports_fd else self._path, ns=(now, now))


class ShardStore(ABC):
    """Random access to shards by index. Thread-safe."""

    is_remote: bool
    """True if shards are downloaded before they are read, so that images of one shard are best read together."""

    description: str
    """Location of the shards, for the summary of a run."""

    @abstractmethod
    def open(self, shard: int) -> OpenFile:
        """Open a shard, downloading it first if necessary. Raises UserError if that fails or its version differs."""

    @abstractmethod
    def read(self, shard: int, length: int, offset: int) -> bytes:
        """Read `length` bytes of a shard at `offset`; fewer at its end. Raises OSError, and UserError as `open`."""

    def prefetch(self, shards: Sequence[int]) -> None:  # noqa: B027 (local shards have nothing to download)
        """Download shards in the background, in this order. Replaces the previous list."""


class LocalShards(ShardStore):
    """Shards in the file system, each of the version given."""

    is_remote, description = False, "on disk"

    def __init__(self, paths: Sequence[str], versions: Sequence[FileVersion]) -> None:
        self._paths, self._versions = paths, versions
        self._open = lru_cache(maxsize=MAX_OPEN_FILES)(self._open_uncached)

    def open(self, shard: int) -> OpenFile:
        file, now = self._open(shard), time.monotonic()
        if now - file.checked_at > RECHECK_SECONDS:
            if not self._versions[shard].matches(file.version):
                raise UserError(f"{self._paths[shard]} changed while in use: restart the command to index it again")
            file.checked_at = now
        return file

    def read(self, shard: int, length: int, offset: int) -> bytes:
        return self.open(shard).read(length, offset)

    def _open_uncached(self, shard: int) -> OpenFile:
        try:
            return OpenFile(Path(self._paths[shard]))
        except OSError as error:
            raise UserError(f"{self._paths[shard]} cannot be opened: {error.strerror}") from error
