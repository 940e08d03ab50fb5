"""Threads that read and decode: how many, and results in order while others are in the making."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S")

PATIENCE = 1.0
"""Seconds that work in progress is waited for when a pool is closed early."""

_Job = tuple[Future[Any], Callable[[], Any]]


def num_threads(threads: int, processes: int = 1) -> int:
    """The number of threads meant: 0 is one for each core, at most 16; `processes` of a run share the cores."""
    return threads or min(16, max(1, (os.cpu_count() or 1) // processes))


def thread_pool(threads: int, name: str) -> "Workers":
    """A pool of `num_threads(threads)`, each of which computes alone: no team of its own for every small resize."""
    return Workers(num_threads(threads), name)


class Workers(Executor):
    """A pool of threads that never holds up the end of a process.

    A thread may be stuck in a file that never answers. ThreadPoolExecutor would wait for it without end, when it is
    closed and again when the interpreter ends. These are daemon threads, and a pool that is closed early (with
    `cancel_futures`, or by an exception in its `with` statement) waits for them for PATIENCE seconds, then leaves them.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._closed = False
        self._threads = [
            Thread(target=_work, args=(self._jobs,), name=f"{name}-{i}", daemon=True) for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        if self._closed:
            raise RuntimeError("the pool is closed")
        future: Future[T] = Future()
        self._jobs.put((future, partial(fn, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._closed = True
        if cancel_futures:
            with suppress(Empty):
                while True:
                    job = self._jobs.get_nowait()
                    if job is not None:
                        job[0].cancel()
        for _ in self._threads:
            self._jobs.put(None)
        deadline = monotonic() + PATIENCE
        for thread in self._threads if wait else []:
            thread.join(max(0.0, deadline - monotonic()) if cancel_futures else None)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.shutdown(cancel_futures=kind is not None)

    def __del__(self) -> None:
        for _ in self._threads:
            self._jobs.put(None)


def _work(jobs: "SimpleQueue[_Job | None]") -> None:
    torch.set_num_threads(1)
    while (job := jobs.get()) is not None:
        _do(*job)
        del job  # hold on to nothing while waiting for the next one


def _do(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(call())
    except BaseException as error:
        future.set_exception(error)
        del future  # which holds the error, whose traceback holds this frame


def ordered_map(pool: Executor, work: Callable[[S], T], things: Iterable[S], most: int) -> Iterator[T]:
    """What `work` makes of each thing, in order; at most `most` results wait while one is asked for."""
    ahead: deque[Future[T]] = deque()
    for thing in things:
        ahead.append(pool.submit(work, thing))
        if len(ahead) > most:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()
