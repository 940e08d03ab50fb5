"""Memory that a step gave back is there for the next one: on a CPU, glibc's own habits cost a tenth of a step.

By default glibc asks the kernel for each large block and returns it when it is freed, so every step touches every page
of its tensors for the first time again: 50,000 page faults in a step of a tiny ViT, and none once memory is kept.
"""

import ctypes
import platform

from pixmim.room import addresses

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of malloc.h


def keep_memory() -> bool:
    """Let this process keep freed memory for itself, up to what it held at most, from now on.

    Gives whether that was done: with glibc (Linux) it is, and elsewhere nothing is changed; nor is it where the
    process's addresses are limited (`ulimit -v`), since what is kept could give back its memory, but not its addresses,
    and others need some, too: libraries that compile at run time, new threads. GPU memory is not concerned: torch keeps
    that anyway.
    """
    if platform.libc_ver()[0] != "glibc" or addresses() is not None:
        return False
    libc = ctypes.CDLL(None)
    settings = ((_MMAP_THRESHOLD, 2**30), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**26))
    return all(libc.mallopt(which, value) == 1 for which, value in settings)


def give_back() -> None:
    """Return to the system, now, what is kept and not used."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
