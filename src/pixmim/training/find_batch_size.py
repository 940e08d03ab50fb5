"""Find out how many images fit into memory at once, and recognize errors that mean it ran out."""

import errno
import gc
import math
from collections.abc import Callable

import torch

from pixmim.utils.errors import UserError


def images_at_once(pixels: int, width: int) -> int:
    """Return how many images a CPU computes at once: 16 of ViT-S at 224 pixels, 1,000 of a small one at 48."""
    return max(1, 320_000_000 // (pixels * width))


def equal_parts(batch: int, asked: int, device: torch.device, size: tuple[int, int], width: int) -> int:
    """Return the number of equal parts to compute a batch in: `asked`, or for 0 what a CPU's memory suits.

    Raises:
        UserError: If the batch does not divide into as many as were asked for.
    """
    if asked and batch % asked:
        raise UserError(f"a batch of {batch} does not divide into --accumulation-steps {asked} equal parts")
    if asked or device.type != "cpu":
        return asked or 1
    fewest = -(-batch // images_at_once(math.prod(size), width))
    return next(parts for parts in range(fewest, batch + 1) if batch % parts == 0)


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
