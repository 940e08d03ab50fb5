"""Bounds of an image, checked before memory or time is spent on it: bombs, mistakes and images of no use.

The bounds fit the machine, so that each of its threads may decode the largest image at once.
"""

import os
from functools import cache

from pixmim.data.dataset import BadImage
from pixmim.utils.errors import UserError
from pixmim.utils.memory import total_memory

MAX_ASPECT = 100
"""An image longer than this many times its width is refused: resizing its short edge would fill the memory."""

MAX_SCANS = 100
"""A JPEG of more scans is refused. Each is a pass over all pixels; ordinary progressive files have about ten."""

VARIABLE = "PIXMIM_MAX_PIXELS"
"""Environment variable that sets the largest number of pixels of an image."""

_LEAST_PIXELS, _MOST_PIXELS = 25_000_000, 120_000_000
_LEAST_BYTES, _MOST_BYTES = 2**28, 2**30
_PIXEL_BYTES = 20  # that decoding takes for each pixel of the costliest ordinary file (WebP with transparency)
_COPIES = 4  # of a file or an array, at most, while it is decoded


def bounds(memory: int | None, threads: int, wanted: str = "") -> tuple[int, int]:
    """Return the most pixels of an image, and the most bytes of a file or an array.

    Args:
        memory: Bytes that this process may take; half of them are shared by the threads. None if not known.
        threads: Threads that decode at the same time.
        wanted: A number of pixels that the user asks for instead, or an empty string.

    Raises:
        UserError: If `wanted` is not a positive number.
    """
    share = (memory or 2**62) // 2 // threads
    pixels = min(max(share // _PIXEL_BYTES, _LEAST_PIXELS), _MOST_PIXELS)
    size = min(max(share // _COPIES, _LEAST_BYTES), _MOST_BYTES)
    if not wanted:
        return pixels, size
    if not (wanted.isascii() and wanted.isdigit() and 0 < len(wanted) < 16 and int(wanted)):
        raise UserError(f"{VARIABLE}={wanted}: not a number of pixels. Set it to one, such as 300000000, or unset it")
    return int(wanted), max(size, 8 * int(wanted))


def max_pixels() -> int:
    """Return the most pixels that an image may have on this machine."""
    return _here()[0]


def max_bytes() -> int:
    """Return the most bytes that an image file, or an array of pixels, may have on this machine."""
    return _here()[1]


def check_size(width: int, height: int) -> None:
    """Raises BadImage for a picture of no pixels, too many, or too long a shape."""
    if min(width, height) < 1:
        raise BadImage(f"{width}x{height} pixels: there is nothing in it")
    if width * height > max_pixels():
        raise BadImage(
            f"{width}x{height} pixels are more than the {max_pixels():,} allowed on this machine: cut it into tiles, "
            f"or set {VARIABLE}"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(f"{width}x{height} pixels: more than {MAX_ASPECT} times as long as wide")


def check_bytes(count: int) -> None:
    """Raises BadImage for a file or an array of too many bytes."""
    if count > max_bytes():
        raise BadImage(
            f"{count / 2**30:.1f} GiB are more than the {max_bytes() / 2**30:.3g} allowed on this machine: cut it into "
            f"tiles, or set {VARIABLE}"
        )


@cache
def _here() -> tuple[int, int]:
    # The decoding threads of all processes on a machine share its cores, and one process starts 16 at most.
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    threads = min(os.cpu_count() or 1, 16 * (int(processes) if processes.isdigit() else 1))
    return bounds(total_memory(), max(1, threads), os.environ.get(VARIABLE, ""))
