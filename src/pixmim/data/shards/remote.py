"""Tars that lie far away. What is known to be needed is copied whole, ahead of time; any other image is read alone."""

import sys
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from threading import Lock, Thread
from time import monotonic

from pixmim.data.shards import fsspec_io as remote
from pixmim.data.shards.disk_cache import Copies
from pixmim.data.shards.local import OPEN, Descriptor, Shelf, Version
from pixmim.utils.errors import UserError
from pixmim.utils.files import cache_path

_FETCHERS = 4  # threads that fetch ahead
_TOUCH = 60.0  # seconds between two notes of what is in use, for other processes


class Far(Shelf):
    """Tars at URLs. Raises UserError, on opening, for one that cannot be fetched or has changed on the server.

    versions    as the places in each tar were listed for; a tag that is not known is taken as it is found first
    local_copy  GiB of copies on this machine, together with those of other data sets
    """

    def __init__(self, urls: Sequence[str], versions: Sequence[Version], local_copy: float) -> None:
        self._urls, self._versions, self._local_copy = urls, list(versions), local_copy
        self._copies = Copies(cache_path("copies", "").parent, int(local_copy * 2**30))
        self._lock = Lock()
        self._opened: OrderedDict[int, Descriptor] = OrderedDict()  # the least recently used first
        self._coming: dict[int, Future[Descriptor]] = {}
        self._wanted: list[int] = []
        self._fitting: list[int] = []  # the first of those wanted, as far as the bound allows
        self._fetchers = 0
        self._looked: set[int] = set()  # whose version was compared with the server's
        self._in_parts = True  # until a server is found to hand out whole files only
        self._used: set[int] = set()  # since that was noted last
        self._noted = monotonic()
        self._warned = False

    @property
    def about(self) -> str:
        return f"far away, copied to {self._copies.folder}, at most {self._local_copy:g} GiB (--local-copy)"

    @property
    def far(self) -> bool:
        return True

    def open(self, shard: int) -> Descriptor:
        found = self._held(shard)
        if found is not None:
            return found
        with self._lock:
            coming, mine = self._coming.get(shard), shard not in self._coming
            if coming is None:
                coming = self._coming[shard] = Future()
        if mine:
            self._fetch(shard, coming)
        return coming.result()

    def read(self, shard: int, length: int, offset: int) -> bytes:
        held = self._held(shard)
        if held is None and (shard in self._coming or shard in self._fitting or not self._in_parts):
            held = self.open(shard)
        if held is None:
            version = self._current(shard)
            held = self._copies.find(_name(self._urls[shard], version), version.size)
            if held is not None:
                self._keep(shard, held)
        if shard in self._wanted and shard not in self._fitting:
            self._warn()
        if held is None:
            data = remote.read_part(self._urls[shard], version, offset, length)
            if data is not None:
                return data
            self._in_parts = False
            held = self.open(shard)
        return held.read(length, offset)

    def soon(self, shards: Sequence[int]) -> None:
        with self._lock:
            self._wanted = list(dict.fromkeys(shards))[: OPEN // 2]
            total, count = 0, 0
            for shard in self._wanted:
                total += self._versions[shard].size
                count += total <= self._copies.bound
            self._fitting = self._wanted[:count]
            more = _FETCHERS - self._fetchers if self._next() is not None else 0
            self._fetchers += more
        for _ in range(more):
            Thread(target=self._fetch_ahead, name="pixmim-fetch", daemon=True).start()

    def _held(self, shard: int) -> Descriptor | None:
        """A copy that is open, noted as used."""
        with self._lock:
            found = self._opened.get(shard)
            if found is not None:
                self._opened.move_to_end(shard)
                self._used.add(shard)
                if monotonic() - self._noted > _TOUCH:
                    self._note()
            return found

    def _keep(self, shard: int, found: Descriptor) -> None:
        """Hold a copy open, and let go of what was used long ago, and of what is deleted, so that its space is free."""
        with self._lock:
            self._opened[shard] = found
            while len(self._opened) > OPEN:
                self._opened.popitem(last=False)
            for other in [s for s, descriptor in self._opened.items() if s != shard and descriptor.deleted]:
                del self._opened[other]

    def _fetch_ahead(self) -> None:
        """Fetch what is wanted, in order, until as much of it is there as the bound allows."""
        while True:
            with self._lock:
                shard = self._next()
                if shard is None:
                    self._fetchers -= 1
                    return
                coming = self._coming[shard] = Future()
            self._fetch(shard, coming)
            if coming.exception() is not None:  # whoever needs it tries again, and tells
                with self._lock:
                    self._fetchers -= 1
                return

    def _next(self) -> int | None:
        return next((s for s in self._fitting if s not in self._opened and s not in self._coming), None)

    def _fetch(self, shard: int, coming: "Future[Descriptor]") -> None:
        """Open a shard's copy, and fetch it before if there is none."""
        try:
            url, version = self._urls[shard], self._current(shard)
            with self._lock:
                self._note()
                keep = [_name(self._urls[s], self._versions[s]) for s in self._wanted]
            name = _name(url, version)
            found = self._copies.get(name, version.size, lambda to: remote.copy(url, to, version), keep)
        except BaseException as error:
            with self._lock:
                del self._coming[shard]
            coming.set_exception(error)
            return
        self._keep(shard, found)
        with self._lock:
            del self._coming[shard]
        coming.set_result(found)

    def _current(self, shard: int) -> Version:
        """A shard's version, compared with the server's once."""
        if shard not in self._looked:
            url, expected = self._urls[shard], self._versions[shard]
            found = remote.version(url)
            if found is None:
                raise UserError(f"there is no {url} any more")
            if not expected.tag and found.size != expected.size:
                raise UserError(
                    f"{url} has {found.size:,} bytes, and {expected.size:,} by its index: copy the cache there again"
                )
            if not expected.fits(found):
                raise UserError(f"{url} has changed on the server since the places in it were listed: start again")
            self._versions[shard] = found
            self._looked.add(shard)
        return self._versions[shard]

    def _note(self) -> None:
        """Mark the copies that were used, in order of their last use."""
        for shard in self._opened:
            if shard in self._used:
                self._opened[shard].touch()
        self._used.clear()
        self._noted = monotonic()

    def _warn(self) -> None:
        """Say once that the bound is too small."""
        with self._lock:
            if self._warned:
                return
            self._warned = True
            need = sum(self._versions[shard].size for shard in self._wanted) / 2**30
        print(
            f"warning: --local-copy {self._local_copy:g} holds less than the far shards that are read together, "
            f"{need:.3g} GiB: images of the others are fetched one by one",
            file=sys.stderr,
        )


def _name(url: str, version: Version) -> str:
    """Of a copy: another one for each version."""
    return cache_path("copies", f"{url}\0{version.size}\0{version.tag}").name
