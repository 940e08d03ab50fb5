"""A bounded LRU disk cache of complete remote files, shared by the processes of a machine.

A file is downloaded under a temporary name and renamed once it has the expected size. Its modification time is the time
of its last use.
"""

import atexit
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Condition

from filelock import FileLock

from pixmim.data.shards.local import OpenFile

_STALE_SECONDS = 600.0
"""A partial download that has not grown for so long was left behind by a process that was killed."""

_PARTS: set[Path] = set()  # partial downloads of this process


@atexit.register
def _remove_parts() -> None:
    """Remove partial downloads: daemon threads may still be writing them when the process exits."""
    for part in list(_PARTS):
        part.unlink(missing_ok=True)


class DiskCache:
    """A folder of at most `max_bytes` bytes, or of one larger file. Thread-safe.

    Downloads in progress in other processes are not counted.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._changed = Condition()
        self._downloading: dict[str, int] = {}  # sizes of this process's downloads in progress

    def lookup(self, name: str, size: int) -> OpenFile | None:
        """Open a cached file and mark it as used, or return None if it is missing or of another size."""
        try:
            file = OpenFile(self.folder / name)
        except OSError:
            return None
        if file.size != size:
            return None
        file.touch()
        return file

    def fetch(self, name: str, size: int, download: Callable[[Path], None], keep: Sequence[str] = ()) -> OpenFile:
        """Open a cached file, calling `download(path)` first if it is missing.

        Args:
            name: Name in the cache.
            size: Expected size in bytes.
            download: Writes the file to the given path.
            keep: Names needed soon, in order of need. Other files are evicted before them, the last of them first.

        Raises:
            OSError: If the file cannot be written or has another size; and whatever `download` raises.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock(name):
            for _ in range(3):  # another process may evict the file as soon as it is there
                file = self.lookup(name, size) or self._download(name, size, download, keep)
                if file is not None:
                    return file
            return OpenFile(self.folder / name)

    def _download(self, name: str, size: int, download: Callable[[Path], None], keep: Sequence[str]) -> OpenFile | None:
        part = self.folder / f"{name}.{uuid.uuid4().hex}.part"  # unguessable: no link can be waiting there
        _PARTS.add(part)
        with self._changed:
            self._changed.wait_for(
                lambda: not self._downloading or sum(self._downloading.values()) + size <= self.max_bytes
            )
            self._downloading[name] = size
        try:
            with self._changed:
                self._evict(keep)
            download(part)
            with part.open("rb+") as file:
                os.fsync(file.fileno())
                if os.fstat(file.fileno()).st_size != size:
                    raise OSError(f"{part.name} does not have the {size:,} bytes expected")
            with self._changed:  # one step: never counted twice, nor evicted by this process before it is open
                os.replace(part, self.folder / name)
                del self._downloading[name]
                return self.lookup(name, size)
        finally:
            part.unlink(missing_ok=True)
            _PARTS.discard(part)
            with self._changed:
                self._downloading.pop(name, None)
                self._changed.notify_all()

    def _evict(self, keep: Sequence[str]) -> None:
        """Delete files until the rest and the downloads in progress are within the bound."""
        rank = {name: position for position, name in enumerate(keep)}
        cached: list[tuple[int, float, Path, int]] = []
        for entry in os.scandir(self.folder):
            with suppress(FileNotFoundError):
                status = entry.stat()
                if entry.name.endswith(".part"):
                    if time.time() - status.st_mtime > _STALE_SECONDS:
                        os.unlink(entry.path)
                elif "." not in entry.name:  # neither a lock nor a hidden file of the file system
                    need = -rank.get(entry.name, len(rank))
                    cached.append((need, status.st_mtime, Path(entry.path), status.st_size))
        total = sum(size for *_, size in cached) + sum(self._downloading.values())
        for _, _, path, size in sorted(cached):
            if total <= self.max_bytes:
                break
            with suppress(PermissionError):  # Windows keeps files that are open
                path.unlink(missing_ok=True)
                path.with_name(f"{path.name}.lock").unlink(missing_ok=True)
                total -= size

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        """Let one process at a time download a file; on file systems without locks each downloads its own copy."""
        with ExitStack() as stack:
            with suppress(OSError, NotImplementedError):
                stack.enter_context(FileLock(self.folder / f"{name}.lock"))
            yield
