"""Where the tars of a data set stand: each is opened by its number, and read at any place."""

import math
import os
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from pixmim.utils.errors import UserError
from pixmim.utils.files import open_regular

OPEN = 256
"""Files that are open at a time; most systems allow a process 1024."""

LOOK = 1.0
"""Seconds for which an open tar is trusted to be the one that was listed. To ask takes longer than to read."""


class Version(NamedTuple):
    """What tells one content of a file from another: bytes, and its time or the server's tag (empty: not known)."""

    size: int
    tag: str = ""

    def fits(self, found: "Version") -> bool:
        """Whether a file found is of this version, so far as is known."""
        return self.size == found.size and self.tag in ("", found.tag)


class Descriptor:
    """A read-only descriptor of a regular file, closed when the last reference is dropped.

    So one thread may evict it while another one still reads.

    Raises:
        OSError: If the file cannot be opened or is not a regular one. Nothing is waited for.
    """

    def __init__(self, path: Path) -> None:
        self._number = open_regular(path)
        weakref.finalize(self, os.close, self._number)
        self.size = os.fstat(self._number).st_size
        self.looked = -math.inf  # when its version was last looked at, for those who look

    def read(self, length: int, offset: int) -> bytes:
        """Bytes at a place; fewer where the file ends."""
        return os.pread(self._number, length, offset)

    @property
    def version(self) -> Version:
        """Its size and the time of its last change."""
        status = os.fstat(self._number)
        return Version(status.st_size, str(status.st_mtime_ns))

    @property
    def deleted(self) -> bool:
        """Whether no name leads to the file any more. Its space is free once it is closed."""
        return os.fstat(self._number).st_nlink == 0

    def touch(self) -> None:
        """Note that it is in use now, if it is this user's file."""
        now = time.time_ns()  # finer than the system's own stamp, so that the order of two uses shows
        with suppress(PermissionError):
            os.utime(self._number, ns=(now, now))


class Shelf(ABC):
    """Tars, by number. Safe to use from several threads."""

    @property
    @abstractmethod
    def about(self) -> str:
        """Where they are read, in a few words."""

    @property
    @abstractmethod
    def far(self) -> bool:
        """Whether a tar is fetched whole before it is read, so that its images are best read together."""

    @abstractmethod
    def open(self, shard: int) -> Descriptor:
        """A tar, fetched first if it must be. Raises UserError if it is not there, or not of the version expected."""

    @abstractmethod
    def read(self, shard: int, length: int, offset: int) -> bytes:
        """Bytes of a tar at a place; fewer where it ends. Raises UserError as `open` does, and OSError."""

    @abstractmethod
    def soon(self, shards: Sequence[int]) -> None:
        """Take notice of the tars that will be read next, in order of need, those in use included."""


class Near(Shelf):
    """Tars in this machine's file system, of the versions given. Raises UserError for one that is not, or no longer."""

    def __init__(self, names: Sequence[str], versions: Sequence[Version]) -> None:
        self._names, self._versions = names, versions
        self._open = lru_cache(maxsize=OPEN)(self._opened)

    @property
    def about(self) -> str:
        return "on disk"

    @property
    def far(self) -> bool:
        return False

    def open(self, shard: int) -> Descriptor:
        found, now = self._open(shard), time.monotonic()
        if now - found.looked > LOOK:
            if not self._versions[shard].fits(found.version):
                raise UserError(f"{self._names[shard]} has changed since the places in it were listed: start again")
            found.looked = now
        return found

    def read(self, shard: int, length: int, offset: int) -> bytes:
        return self.open(shard).read(length, offset)

    def soon(self, shards: Sequence[int]) -> None:
        """Nothing is fetched ahead: the system's own file cache serves."""

    def _opened(self, shard: int) -> Descriptor:
        try:
            return Descriptor(Path(self._names[shard]))
        except OSError as error:
            raise UserError(f"{self._names[shard]} cannot be opened: {error.strerror}") from error
