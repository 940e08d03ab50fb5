"""Tars that lie far away, read from whole copies: fetched when they are needed, or, if that was told, before."""

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from threading import Lock, Thread
from time import monotonic

from pixmim.data import remote
from pixmim.data.copies import Copies
from pixmim.data.remembered import place
from pixmim.data.shelf import OPEN, Descriptor, Shelf, Version
from pixmim.errors import UserError

_FETCHERS = 4  # threads that fetch ahead
_TOUCH = 60.0  # seconds between two notes of what is in use, for other processes


class Far(Shelf):
    """Tars at URLs. Raises UserError, on opening, for one that cannot be fetched or has changed on the server.

    versions    as the places in each tar were listed for; a tag that is not known is taken as it is found first
    local_copy  GiB of copies on this machine, together with those of other data sets
    """

    def __init__(self, urls: Sequence[str], versions: Sequence[Version], local_copy: float) -> None:
        self._urls, self._versions, self._local_copy = urls, list(versions), local_copy
        self._copies = Copies(place("copies", "").parent, int(local_copy * 2**30))
        self._lock = Lock()
        self._opened: OrderedDict[int, Descriptor] = OrderedDict()  # the least recently used first
        self._coming: dict[int, Future[Descriptor]] = {}
        self._wanted: list[int] = []
        self._fetchers = 0
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
        with self._lock:
            found = self._opened.get(shard)
            if found is not None:
                self._opened.move_to_end(shard)
                self._used.add(shard)
                if monotonic() - self._noted > _TOUCH:
                    self._note()
                return found
            coming, mine = self._coming.get(shard), shard not in self._coming
            if coming is None:
                coming = self._coming[shard] = Future()
        if mine:
            self._fetch(shard, coming)
        return coming.result()

    def soon(self, shards: Sequence[int]) -> None:
        with self._lock:
            self._wanted = list(dict.fromkeys(shards))[: OPEN // 2]
            more = _FETCHERS - self._fetchers if self._next() is not None else 0
            self._fetchers += more
        for _ in range(more):
            Thread(target=self._fetch_ahead, name="pixmim-fetch", daemon=True).start()

    def _fetch_ahead(self) -> None:
        """Fetch what is wanted, in order, until all of it is there, or as much as the bound allows."""
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
        total = 0
        for shard in self._wanted:
            total += self._versions[shard].size
            if total > self._copies.bound:
                return None
            if shard not in self._opened and shard not in self._coming:
                return shard
        return None

    def _fetch(self, shard: int, coming: "Future[Descriptor]") -> None:
        """Open a shard's copy, and fetch it before if there is none."""
        try:
            url, version = self._urls[shard], self._current(shard)
            with self._lock:
                self._note()
                keep = [_name(self._urls[s], self._versions[s]) for s in self._wanted]
            found, missed = self._copies.get(
                _name(url, version), version.size, lambda to: remote.copy(url, to, version), keep
            )
        except BaseException as error:
            with self._lock:
                del self._coming[shard]
            coming.set_exception(error)
            return
        with self._lock:
            del self._coming[shard]
            self._opened[shard] = found
            while len(self._opened) > OPEN:
                self._opened.popitem(last=False)
            for other in [s for s, descriptor in self._opened.items() if s != shard and descriptor.deleted]:
                del self._opened[other]  # so that its space becomes free
        coming.set_result(found)
        if missed or version.size > self._copies.bound:
            self._warn(version.size)

    def _current(self, shard: int) -> Version:
        """A shard's version, all of it known."""
        expected = self._versions[shard]
        if not expected.tag:
            found = remote.version(self._urls[shard])
            if found is None:
                raise UserError(f"there is no {self._urls[shard]}")
            if not expected.fits(found):
                raise UserError(
                    f"{self._urls[shard]} has {found.size:,} bytes, and {expected.size:,} by its index: copy both again"
                )
            self._versions[shard] = found
        return self._versions[shard]

    def _note(self) -> None:
        """Mark the copies that were used, in order of their last use."""
        for shard in self._opened:
            if shard in self._used:
                self._opened[shard].touch()
        self._used.clear()
        self._noted = monotonic()

    def _warn(self, least: int) -> None:
        with self._lock:
            if self._warned:
                return
            self._warned = True
            need = max(least, sum(self._versions[shard].size for shard in self._wanted)) / 2**30
        warnings.warn(
            f"--local-copy {self._local_copy:g} holds less than the far shards that are read together: some are "
            f"fetched again and again. Give at least {need:.3g} (GiB)",
            stacklevel=2,
        )


def _name(url: str, version: Version) -> str:
    """Of a copy: another one for each version."""
    return place("copies", f"{url}\0{version.size}\0{version.tag}").name
