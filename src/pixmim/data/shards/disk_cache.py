"""Whole copies of far files, in a folder that processes may share; the least recently used make room for new ones.

A copy is written beside and renamed, and of the size expected, or it is none. Time of last use is the file's own time.
"""

import atexit
import fcntl
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Condition

from pixmim.data.shards.local import Descriptor

_DEAD = 600.0  # seconds without a byte, after which nobody writes a part any more

_PARTS: set[Path] = set()  # that this process is writing


@atexit.register
def _remove_parts() -> None:
    """A process that ends does not wait for what it was fetching ahead."""
    for part in list(_PARTS):
        part.unlink(missing_ok=True)


class Copies:
    """A folder of copies that holds at most `bound` bytes, or a single larger copy.

    What other processes are just fetching comes on top. Safe to use from several threads.
    """

    def __init__(self, folder: Path, bound: int) -> None:
        self.folder, self.bound = folder, bound
        self._change = Condition()
        self._coming: dict[str, int] = {}  # bytes of the copies that this process is fetching

    def find(self, name: str, size: int) -> Descriptor | None:
        """A whole copy, opened and marked as used now; None if there is none."""
        try:
            found = Descriptor(self.folder / name)
            if found.size != size:
                return None
            found.touch()
            return found
        except OSError:
            return None

    def get(self, name: str, size: int, fetch: Callable[[Path], None], keep: Sequence[str] = ()) -> Descriptor:
        """A copy, opened; `fetch` writes it to a path if there is none yet.

        keep  copies that will be needed, the first first: others make room before them, and of them the last
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone(name):
            found = self.find(name, size)
            if found is not None:
                return found
            part = self.folder / f"{name}.{uuid.uuid4().hex}.part"  # a name that nobody can have guessed
            _PARTS.add(part)
            with self._change:
                self._change.wait_for(lambda: not self._coming or sum(self._coming.values()) + size <= self.bound)
                self._coming[name] = size
            try:
                with self._change:
                    self._make_room(keep)
                fetch(part)
                with part.open("rb+") as file:
                    os.fsync(file.fileno())
                found = Descriptor(part)  # open before others can see it, and delete it
                found.touch()
                with self._change:  # at no time counted both as coming and as there
                    os.replace(part, self.folder / name)
                    del self._coming[name]
            finally:
                part.unlink(missing_ok=True)
                _PARTS.discard(part)
                with self._change:
                    self._coming.pop(name, None)
                    self._change.notify_all()
            return found

    def _make_room(self, keep: Sequence[str]) -> None:
        """Delete copies until those left and those coming are within the bound."""
        need = {name: place for place, name in enumerate(keep)}
        there: list[tuple[int, float, Path, int]] = []
        for entry in os.scandir(self.folder):
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue
            if entry.name.endswith(".part"):
                if time.time() - status.st_mtime > _DEAD:
                    Path(entry.path).unlink(missing_ok=True)
            elif "." not in entry.name:  # no lock, and nothing that a file system keeps here for itself
                there.append((-need.get(entry.name, len(need)), status.st_mtime, Path(entry.path), status.st_size))
        there.sort()
        total = sum(size for *_, size in there) + sum(self._coming.values())
        for _, _, path, size in there:
            if total <= self.bound:
                break
            path.unlink(missing_ok=True)
            path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
            total -= size

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """While one fetches a copy, others wait for it. Where the file system has no locks, each fetches its own."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        lock = os.open(self.folder / f"{name}.lock", flags, 0o644)
        try:
            with suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)
