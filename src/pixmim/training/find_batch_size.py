"""Split batches into parts that fit in memory, and recognize out-of-memory errors."""

import errno
import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from pixmim.config import PretrainConfig
from pixmim.training.distributed import Distributed
from pixmim.training.parallelize import parallel_mode
from pixmim.utils.errors import UserError, first_line


def images_at_once(pixels: int, width: int) -> int:
    """Return how many images a CPU computes at once: 16 for ViT-S at 224 pixels, over 1,000 for a small one at 48."""
    return max(1, 320_000_000 // (pixels * width))


def equal_parts(batch: int, steps: int, device: torch.device, size: tuple[int, int], width: int) -> int:
    """Return the number of equal parts to compute a batch in: `steps`, or for 0 as many as suit the device.

    A CPU takes parts of at most `images_at_once`, any other device one. Raises UserError if `steps` parts are unequal.
    """
    if steps and batch % steps:
        raise UserError(f"a batch of {batch} does not divide into --accumulation-steps {steps} equal parts")
    if steps or device.type != "cpu":
        return steps or 1
    fewest = -(-batch // images_at_once(math.prod(size), width))
    return next(parts for parts in range(fewest, batch + 1) if batch % parts == 0)


def find_accumulation_steps(
    config: PretrainConfig,
    world: Distributed,
    device: torch.device,
    width: int,
    trial: Callable[[int], None],
    reserved: int,
) -> int:
    """Return the number of parts in which each rank computes its share of a batch. Collective: call on every rank.

    This is --accumulation-steps if given. Otherwise a CPU takes parts of at most `images_at_once`, and a GPU halves the
    share until a trial fits. FSDP always takes one part: a rank whose trial fails would block the others.

    `trial` computes the gradient of a given number of images, and `reserved` bytes of device memory are left free.
    `width` is that of the encoder.

    Raises:
        UserError: If not even one image fits.
    """
    share = config.batch_size // world.size
    if config.accumulation_steps:
        return config.accumulation_steps
    if device.type == "cpu":
        at_once = images_at_once(math.prod(config.image_size), width) // world.local_world_size()
        return -(-share // max(1, at_once))
    if parallel_mode(config.parallel, world) == "fsdp":
        return 1
    images = share
    while not all(world.gather(_fits(trial, images, reserved, device))):
        if images == 1:
            raise UserError("not even one image fits in memory: choose a smaller model or a smaller --size")
        images = -(-images // 2)
    return -(-share // images)


def _fits(trial: Callable[[int], None], images: int, reserved: int, device: torch.device) -> bool:
    try:
        reservation = torch.empty(reserved, dtype=torch.uint8, device=device)
        trial(images)
        del reservation
        return True
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # Outside the except clause, where the error no longer references its tensors.
    gc.collect()
    torch.cuda.empty_cache()
    return False


@contextmanager
def out_of_memory_hint(images: int, parts: int) -> Iterator[None]:
    """Turn an out-of-memory error into a UserError with advice. `images`: computed at once, in each of the parts."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        advice = f"--accumulation-steps {2 * parts} halves them" if images > 1 else "choose a smaller model"
        raise UserError(
            f"out of memory with {images:,} images computed at once ({first_line(error)}): {advice}; a smaller --size "
            "helps too"
        ) from None


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error means that the device or the machine has no memory left."""
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
    "status_alloc_failed",  # cuDNN and cuBLAS
)
