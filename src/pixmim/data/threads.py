"""Threads that read and decode: how many, and results in order while others are in the making."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
S = TypeVar("S")


def how_many(threads: int, processes: int = 1) -> int:
    """The number of threads meant: 0 is one for each core, at most 16; `processes` of a run share the cores."""
    return threads or min(16, max(1, (os.cpu_count() or 1) // processes))


def workers(threads: int, name: str) -> ThreadPoolExecutor:
    """A pool of `how_many(threads)`, each of which computes alone: no team of its own for every small resize."""
    return ThreadPoolExecutor(how_many(threads), name, initializer=torch.set_num_threads, initargs=(1,))


def in_turn(pool: ThreadPoolExecutor, work: Callable[[S], T], things: Iterable[S], most: int) -> Iterator[T]:
    """What `work` makes of each thing, in order; at most `most` results wait while one is asked for."""
    ahead: deque[Future[T]] = deque()
    for thing in things:
        ahead.append(pool.submit(work, thing))
        if len(ahead) > most:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()
