"""How many images are computed at once, and what running out of memory looks like."""

import errno
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from pixmim.training.find_batch_size import halve, images_at_once, is_out_of_memory
from pixmim.utils.errors import UserError


@pytest.mark.parametrize(("room", "images", "expected"), [(600, 512, 512), (511, 512, 256), (1, 4, 1), (30, 94, 24)])
def test_halves_until_it_fits(room: int, images: int, expected: int) -> None:
    tried: list[int] = []

    def attempt(count: int) -> None:
        tried.append(count)
        if count > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    assert halve(attempt, images) == expected == tried[-1]
    assert all(-(-more // 2) == fewer for more, fewer in pairwise(tried))


def test_every_rank_computes_what_fits_on_the_smallest() -> None:
    assert halve(lambda images: None, 64, agreeing([False, False, True])) == 16


def agreeing(answers: list[bool]) -> Callable[[bool], bool]:
    """What all ranks together answer, one call after another."""
    return lambda fits: answers.pop(0) and fits


def test_nothing_fits() -> None:
    def attempt(images: int) -> None:
        raise MemoryError

    with pytest.raises(UserError, match="not even one image fits"):
        halve(attempt, 2)


def test_another_error_is_not_taken_for_want_of_memory() -> None:
    def attempt(images: int) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        halve(attempt, 8)


def test_a_cpu_computes_less_at_once_the_larger_image_and_model_are() -> None:
    assert images_at_once(224 * 224, 384) == 16 and images_at_once(224 * 224, 768) == 8
    assert images_at_once(48 * 48, 128) > 1000 and images_at_once(16384**2, 4096) == 1


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), True),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."),
            True,
        ),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("shapes differ"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_that_mean_there_is_no_memory(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) == is_one
