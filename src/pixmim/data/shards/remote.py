"""Remote tar shards. Prefetched shards are downloaded and cached on disk; other images are read by range requests."""

import os
import sys
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from threading import Condition, Lock

from filelock import FileLock

from pixmim.data.shards import fsspec_io
from pixmim.data.shards.fsspec_io import is_url
from pixmim.data.shards.local import MAX_OPEN_FILES, FileVersion, LocalShards, OpenFile, ShardStore
from pixmim.utils.errors import UserError
from pixmim.utils.files import cache_path
from pixmim.utils.threads import ThreadPool

_PREFETCH_THREADS = 4

_STALE_SECONDS = 600.0
"""A partial download that has not grown for this long was left by a process that was killed."""


def open_shards(names: Sequence[str], versions: Sequence[FileVersion], cache_gib: float) -> ShardStore:
    """Return a store of shards that are all local or all at URLs; see `RemoteShards`. Raises UserError for a mix."""
    remote = sum(map(is_url, names))
    if remote not in (0, len(names)):
        raise UserError(f"{remote} of {len(names)} shards are remote and the others local: pass them as two datasets")
    return RemoteShards(names, versions, cache_gib) if remote else LocalShards(names, versions)


class RemoteShards(ShardStore):
    """Shards at URLs, each of the version given. Unknown tags are requested on first use.

    All datasets of the user share a disk cache of at most `cache_gib`.
    """

    is_remote = True

    def __init__(self, urls: Sequence[str], versions: Sequence[FileVersion], cache_gib: float) -> None:
        self._urls, self._versions, self._cache_gib = urls, list(versions), cache_gib
        self._cache = DiskCache(cache_path("copies", "").parent, int(cache_gib * 2**30))
        self._lock = Lock()
        self._open_files: OrderedDict[int, OpenFile] = OrderedDict()  # least recently used first
        self._opening = [Lock() for _ in urls]  # held by the thread that downloads a shard
        self._upcoming: list[int] = []  # in order of need
        self._prefetched: list[int] = []  # the first of them, as many as the cache can hold
        self._queue: list[int] = []  # those that no thread has started to download
        self._pool: ThreadPool | None = None
        self._verified: set[int] = set()  # whose version was compared with the server's
        self._accepts_ranges = True  # until a server returns a complete file instead
        self._warned = False
        self.description = (
            f"at a URL, with a disk cache in {self._cache.folder}, at most {cache_gib:g} GiB (--shard-cache-gib)"
        )

    def open(self, shard: int) -> OpenFile:
        with self._opening[shard]:
            file = self._already_open(shard)
            if file is None:
                url, version = self._urls[shard], self._verified_version(shard)
                keep = [_cache_name(self._urls[s], self._versions[s]) for s in self._upcoming]
                name, size = _cache_name(url, version), version.size
                file = self._cache.fetch(name, size, lambda to: fsspec_io.download(url, to, version), keep)
                with self._lock:
                    self._add_open_file(shard, file)
            return file

    def read(self, shard: int, length: int, offset: int) -> bytes:
        file = self._already_open(shard)
        if file is None and shard in self._upcoming and shard not in self._prefetched:
            self._warn_cache_too_small()
        if file is None and self._accepts_ranges and not (shard in self._prefetched or self._opening[shard].locked()):
            url, version = self._urls[shard], self._verified_version(shard)
            file = self._cache.lookup(_cache_name(url, version), version.size)
            if file is None:
                data = fsspec_io.read_range(url, offset, length)
                if data is not None:
                    return data
                self._accepts_ranges = False
            else:
                with self._lock:
                    self._add_open_file(shard, file)
        return (file or self.open(shard)).read(length, offset)

    def prefetch(self, shards: Sequence[int]) -> None:
        with self._lock:
            self._upcoming = list(dict.fromkeys(shards))[: MAX_OPEN_FILES // 2]
            sizes = accumulate(self._versions[shard].size for shard in self._upcoming)
            self._prefetched = self._upcoming[: sum(size <= self._cache.max_bytes for size in sizes)]
            missing = [shard for shard in self._prefetched if shard not in self._open_files]
            self._queue = [shard for shard in missing if not self._opening[shard].locked()]
            for _ in self._queue:
                self._pool = self._pool or ThreadPool(_PREFETCH_THREADS, "pixmim-prefetch")
                self._pool.submit(self._prefetch_next)

    def _already_open(self, shard: int) -> OpenFile | None:
        with self._lock:
            file = self._open_files.get(shard)
            if file is not None:
                self._open_files.move_to_end(shard)
                file.touch()
            return file

    def _add_open_file(self, shard: int, file: OpenFile) -> None:
        """Keep a file open, and close files that were evicted from the cache, which frees their space."""
        self._open_files[shard] = file
        for other in [s for s, held in self._open_files.items() if s != shard and held.is_deleted]:
            del self._open_files[other]
        while len(self._open_files) > MAX_OPEN_FILES:
            self._open_files.popitem(last=False)

    def _prefetch_next(self) -> None:
        with self._lock:
            shard = self._queue.pop(0) if self._queue else None
        if shard is not None:
            with suppress(Exception):  # a reader of the shard tries again, and raises it there
                self.open(shard)

    def _verified_version(self, shard: int) -> FileVersion:
        """Return a shard's version, compared with the server's on first use."""
        if shard not in self._verified:
            url, expected = self._urls[shard], self._versions[shard]
            current = fsspec_io.file_version(url)
            if current is None:
                raise UserError(f"{url} no longer exists")
            if not expected.tag and current.size != expected.size:
                raise UserError(
                    f"{url} has {current.size:,} bytes, but {expected.size:,} in its index: upload the cache again"
                )
            if not expected.matches(current):
                raise UserError(f"{url} changed on the server since it was indexed: restart the command")
            self._versions[shard] = current
            self._verified.add(shard)
        return self._versions[shard]

    def _warn_cache_too_small(self) -> None:
        with self._lock:
            if self._warned:
                return
            self._warned = True
            need = sum(self._versions[shard].size for shard in self._upcoming) / 2**30
        print(
            f"warning: --shard-cache-gib {self._cache_gib:g} is below the {need:.3g} GiB of remote shards that are "
            "read together: images of the others are fetched one by one",
            file=sys.stderr,
        )


def _cache_name(url: str, version: FileVersion) -> str:
    return cache_path("copies", f"{url}\0{version.size}\0{version.tag}").name


class DiskCache:
    """A bounded LRU cache of complete files, shared by the processes of a machine. Thread-safe.

    A file is downloaded under a temporary name and renamed once it has the expected size. Its modification time is the
    time of its last use.

    Args:
        folder: Folder of the files.
        max_bytes: Bound of their size, or one larger file. Downloads in progress in other processes do not count.
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
            keep: Upcoming names, in order of need. Other files are evicted before them, the last of them first.

        Raises:
            OSError: If the file cannot be written or has another size; and whatever `download` raises.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock(name):
            for _ in range(3):  # another process may evict the file immediately
                file = self.lookup(name, size) or self._download(name, size, download, keep)
                if file is not None:
                    return file
            return OpenFile(self.folder / name)

    def _download(self, name: str, size: int, download: Callable[[Path], None], keep: Sequence[str]) -> OpenFile | None:
        part = self.folder / f"{name}.{uuid.uuid4().hex}.part"  # unguessable, so nobody can place a link there
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
        """Let one process at a time download a file. On file systems without locks, each downloads its own copy."""
        with ExitStack() as stack:
            with suppress(OSError, NotImplementedError):
                stack.enter_context(FileLock(self.folder / f"{name}.lock"))
            yield
