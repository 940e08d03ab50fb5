"""Make glibc keep freed memory. By default it returns large blocks to the kernel.

Every step then touches every page of its tensors for the first time again: 50,000 page faults in a step of a tiny ViT,
and none once memory is kept.
"""

import ctypes
import platform

from pixmim.utils.available_memory import addresses

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of malloc.h


def retain_freed_memory() -> bool:
    """Keep freed memory for this process, up to the most it ever held.

    Changes nothing without glibc, or where the address space is limited (`ulimit -v`): kept memory could be returned,
    but not its addresses, which new threads and libraries that compile at run time need as well.

    Returns:
        True if glibc has been set.
    """
    if platform.libc_ver()[0] != "glibc" or addresses() is not None:
        return False
    libc = ctypes.CDLL(None)
    settings = ((_MMAP_THRESHOLD, 2**30), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**26))
    return all(libc.mallopt(which, value) == 1 for which, value in settings)
