"""Memory of a training: how many images are computed at once, what running out of it looks like, and how it is kept."""

import ctypes
import errno
import gc
import platform
from collections.abc import Callable

import torch

from pixmim.utils.available_memory import addresses
from pixmim.utils.errors import UserError

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of malloc.h


def keep_memory() -> bool:
    """Let this process keep freed memory for itself, up to what it held at most, from now on.

    By default glibc asks the kernel for each large block and returns it when it is freed, so every step touches every
    page of its tensors for the first time again: 50,000 page faults in a step of a tiny ViT, and none once memory is
    kept.

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


def images_at_once(pixels: int, width: int) -> int:
    """Return how many images a CPU computes at once: 16 of ViT-S at 224 pixels, 1,000 of a small one at 48."""
    return max(1, 320_000_000 // (pixels * width))


def halve(attempt: Callable[[int], None], images: int, agree: Callable[[bool], bool] = bool) -> int:
    """Return `images`, or of its halves the first that `attempt` computes without running out of memory.

    Args:
        attempt: Compute so many images.
        images: The number to begin with.
        agree: Return whether it fitted on every rank. Collective.

    Raises:
        UserError: If not even one image fits.
    """
    while not agree(_fits(attempt, images)):
        if images == 1:
            raise UserError("not even one image fits into the memory: choose a smaller model or a smaller --size")
        images = -(-images // 2)
    return images


def _fits(attempt: Callable[[int], None], images: int) -> bool:
    try:
        attempt(images)
        return True
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # Outside the except clause, where the error no longer holds on to the step's tensors.
    gc.collect()
    torch.cuda.empty_cache()
    return False


def in_gib(size: float) -> str:
    """Return bytes as a number of GiB, for people."""
    gib = size / 2**30
    return f"{gib:,.0f}" if gib >= 10 else f"{gib:.1f}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine, has no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)


_SIGNS = (
    "out of memory",  # CUDA outside the allocator, NCCL, Metal
    "can't allocate memory",  # the CPU's allocator
    "not enough memory",  # the same on Windows
    "bad_alloc",
    "could not create a primitive",  # oneDNN, which multiplies in bf16 and convolves on a CPU
    "status_alloc_failed",  # cuDNN, cuBLAS and their like
)
