"""Thread pools that never block the end of a process, and ordered parallel maps."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch

from pixmim.utils.console import status_counter

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S")

SHUTDOWN_TIMEOUT = 1.0
"""Seconds to wait for running jobs when a pool is closed early."""

_Job = tuple[Future[Any], Callable[[], Any]]


def num_threads(threads: int, processes: int = 1) -> int:
    """Return `threads`, or for 0 one per core and at most 16.

    Cores are those that this process may use, and its share of the machine's if it is one of several `processes`.
    """
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 16
    return threads or min(16, own, max(1, (os.cpu_count() or 1) // processes))


class ThreadPool(Executor):
    """A pool of daemon threads (see `num_threads`), in which torch uses one thread each.

    A thread may be stuck reading a file that never answers. ThreadPoolExecutor would wait for it forever, on shutdown
    and at exit. This pool, if it is closed early (with `cancel_futures`, or by an exception in its `with` block), waits
    for SHUTDOWN_TIMEOUT seconds and then abandons the threads.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._closed = False
        self._threads = [
            Thread(target=_work, args=(self._jobs,), name=f"{name}-{i}", daemon=True)
            for i in range(num_threads(threads))
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Schedule a call and return its future."""
        if self._closed:
            raise RuntimeError("the pool is closed")
        future: Future[T] = Future()
        self._jobs.put((future, partial(fn, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Close the pool. With `cancel_futures`, wait for SHUTDOWN_TIMEOUT seconds at most."""
        self._closed = True
        if cancel_futures:
            with suppress(Empty):
                while True:
                    if job := self._jobs.get_nowait():
                        job[0].cancel()
        for _ in self._threads:
            self._jobs.put(None)
        deadline = time.monotonic() + SHUTDOWN_TIMEOUT
        for thread in self._threads if wait else []:
            thread.join(max(0.0, deadline - time.monotonic()) if cancel_futures else None)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.shutdown(cancel_futures=kind is not None)

    def __del__(self) -> None:
        for _ in self._threads:
            self._jobs.put(None)


def _work(jobs: "SimpleQueue[_Job | None]") -> None:
    torch.set_num_threads(1)
    while (job := jobs.get()) is not None:
        _run(*job)
        del job  # free its references while waiting for the next one


def _run(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(call())
    except BaseException as error:
        future.set_exception(error)
        del future  # break the cycle of future, error, traceback and this frame


def ordered_map(pool: Executor, function: Callable[[S], T], items: Iterable[S], prefetch: int) -> Iterator[T]:
    """Yield `function(item)` in order, computing up to `prefetch` results ahead."""
    futures: deque[Future[T]] = deque()
    for item in items:
        futures.append(pool.submit(function, item))
        if len(futures) > prefetch:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


def parallel_map(description: str, function: Callable[[int], T], count: int, threads: int = 16) -> list[T]:
    """Return `function(i)` for 0 to `count - 1`, called in threads. An exception cancels the calls that are pending."""
    results: list[T] = []
    pool = ThreadPool(min(threads, max(1, count)), "pixmim-files")
    with status_counter(description, f"of {count:,}") as add, pool:
        for result in ordered_map(pool, function, range(count), count):
            results.append(result)
            add(1)
    return results
