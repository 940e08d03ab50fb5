"""How many images fit into memory at once: measured at two small numbers, and reckoned from there.

What a step takes grows in a straight line with its images: fixed + images x per_image. On a CUDA device the allocator
tells it, and the number found is tried. On a CPU, where a step too large would end the process, tensors are counted.
"""

import errno
import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from pixmim.engine.memory.live import Live
from pixmim.errors import UserError
from pixmim.room import free_memory

Step = Callable[[int], None]
"""Forward and backward of so many images on the device, any number of them; the gradients stay."""

_SMALL = {"cuda": (8, 16), "cpu": (2, 4)}
"""Images that steps are measured with; where these do not fit, 1 and 2."""

_MARGIN = {"cuda": 0.08, "cpu": 0.3}
"""Share of the memory that stays free: allocators waste some, and on a CPU what kernels take is not counted."""


@dataclass(frozen=True)
class Footprint:
    """What training takes of a device, in bytes.

    fixed      whatever the number of images: weights, gradients, two moments, and what else lies there
    per_image  for each image computed at once
    room       what there is for training altogether
    margin     share of `room` that must stay free
    """

    fixed: float
    per_image: float
    room: float
    margin: float = 0.0

    @staticmethod
    def through(low: tuple[int, float], high: tuple[int, float], room: float, margin: float) -> "Footprint":
        """The straight line through two measurements, each a number of images and the bytes they take."""
        per_image = max(1.0, (high[1] - low[1]) / (high[0] - low[0]))
        return Footprint(high[1] - per_image * high[0], per_image, room, margin)

    def needs(self, images: int) -> float:
        """Bytes for steps of so many images at once."""
        return self.fixed + self.per_image * images

    def holds(self, size: float) -> bool:
        """Whether so many bytes fit."""
        return size <= self.room * (1 - self.margin)

    def fitting(self, most: int) -> int:
        """The largest number of images that fit, at most `most`: all of these, or a multiple of 8 above 8. 0: none."""
        if self.holds(self.needs(most)):
            return most
        return in_eights(max(0, int((self.room * (1 - self.margin) - self.fixed) / self.per_image)))


def fits(
    step: Step,
    device: torch.device,
    parameters: Iterable[nn.Parameter],
    most: int = 4096,
    least: Callable[[int], int] = int,
) -> int:
    """The largest number of images that can be computed at once, at most `most`: all of these, or in eights above 8.

    step        leaves gradients, which are removed afterwards
    parameters  what is trained. The optimizer must not have made its moments yet: they are reckoned
    least       gives the smallest of the numbers that all processes of the run give; each of them must be here

    Raises UserError where not one image fits, and where a device's memory cannot be told.
    """
    trained = [p for p in parameters if p.requires_grad]
    footprint = measure(step, device, trained, least)
    images = least(footprint.fitting(most))
    if device.type == "cuda":
        images = _tried(_cuda_peak(step, device, trained), footprint, images, least)
    _forget_gradients(trained, device)
    if images < 1:
        raise UserError(
            f"not even one image fits: training would take {in_gib(footprint.needs(1))} GiB of {device}, which has "
            f"{in_gib(footprint.room)}. Choose a smaller model or a smaller --size."
        )
    return images


def measure(
    step: Step, device: torch.device, parameters: Iterable[nn.Parameter], least: Callable[[int], int] = int
) -> Footprint:
    """What training takes, from steps of a few images; arguments and errors as of `fits`."""
    trained = [p for p in parameters if p.requires_grad]
    if device.type not in _MARGIN:
        raise UserError(f"how much memory is free on {device} cannot be told: give --batch-size a number")
    take = (_cuda_peak if device.type == "cuda" else _cpu_need)(step, device, trained)
    _forget_gradients(trained, device)
    for few, more in (_SMALL[device.type], (1, 2)):
        low, high = _or_none(take, few), _or_none(take, more)
        if least(low is not None and high is not None):
            break
    _forget_gradients(trained, device)
    room = _room(device, trained)  # after the first steps, which load libraries
    if low is None or high is None:
        raise UserError(f"a step of 2 images does not fit into {in_gib(room)} GiB of {device}: choose a smaller model")
    return Footprint.through((few, low), (more, high), room, _MARGIN[device.type])


def _tried(take: Callable[[int], float], footprint: Footprint, images: int, least: Callable[[int], int]) -> int:
    """What is left of `images` after steps of that size: fewer as long as they do not fit."""
    while images:
        taken = _or_none(take, images)
        if least(taken is not None and footprint.holds(taken)):
            break
        fewer = images * 3 // 4
        if taken is not None and images > 1:
            # The need bends upwards, where another moment of the step becomes the fullest: it lies below this line.
            one = 1, footprint.needs(1)
            fewer = Footprint.through(one, (images, taken), footprint.room, footprint.margin).fitting(images - 1)
        images = least(in_eights(fewer))
    return images


def in_eights(images: int) -> int:
    """The multiple of 8 below; up to 8 the number itself."""
    return images // 8 * 8 if images > 8 else images


def in_gib(size: float) -> str:
    """Bytes as a number of GiB, for people."""
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


def _cuda_peak(step: Step, device: torch.device, parameters: list[nn.Parameter]) -> Callable[[int], float]:
    """Gives the bytes that are taken at the fullest moment of training with so many images at once."""
    moments = 2 * _bytes(parameters)

    def take(images: int) -> float:
        step(1)  # so that gradients are there, and what libraries keep for themselves
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        step(images)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) + moments

    return take


def _cpu_need(step: Step, device: torch.device, parameters: list[nn.Parameter]) -> Callable[[int], float]:
    """Gives the bytes of the tensors of a step of so many images, and of weights, gradients and two moments."""

    def take(images: int) -> float:
        step(1)  # so that gradients are there
        with Live([*parameters, *(p.grad for p in parameters if p.grad is not None)]) as live:
            step(images)
        return live.peak + 4 * _bytes(parameters)

    return take


def _room(device: torch.device, parameters: list[nn.Parameter]) -> float:
    """Bytes that training may take, those that it already has among them: torch's, or on a CPU the weights'."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = free_memory()
    if free is None:
        raise UserError("how much memory is free cannot be told on this system: give --batch-size a number")
    return free + _bytes(parameters)


def _or_none(take: Callable[[int], float], images: int) -> float | None:
    """What a step takes, or None if there is no memory for it."""
    try:
        return take(images)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    # Outside the except clause, where the error no longer holds on to the step's tensors.
    gc.collect()
    torch.cuda.empty_cache()
    return None


def _forget_gradients(parameters: list[nn.Parameter], device: torch.device) -> None:
    for p in parameters:
        p.grad = None
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _bytes(parameters: list[nn.Parameter]) -> int:
    """Bytes of the weights that lie on this process's device: of those that are shared out, its own part."""
    local = (getattr(p, "to_local", lambda p=p: p)() for p in parameters)
    return sum(p.numel() * p.element_size() for p in local)
