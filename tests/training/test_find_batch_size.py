"""Test how many images are computed at once, and how out-of-memory errors are recognized."""

import errno
from itertools import pairwise
from typing import TypeVar

import pytest
import torch

from pixmim.config import PretrainConfig
from pixmim.data.sampler import BatchShard
from pixmim.training.distributed import SINGLE_PROCESS, Distributed
from pixmim.training.find_batch_size import (
    find_accumulation_steps,
    images_at_once,
    is_out_of_memory,
    out_of_memory_hint,
)
from pixmim.utils.errors import UserError

T = TypeVar("T")
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture(autouse=True)
def _without_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the collection of garbage, which takes seconds in a process that has imported much."""
    monkeypatch.setattr("gc.collect", lambda: 0)


class Trial:
    """Compute at most `most` images, and record the attempts."""

    def __init__(self, most: int, error: Exception = OUT_OF_MEMORY) -> None:
        self.attempts, self._most, self._error = list[int](), most, error

    def __call__(self, images: int) -> None:
        self.attempts.append(images)
        if images > self._most:
            raise self._error


class TwoRanks(Distributed):
    """Rank 0 of two, the other of which computes 16 images at most."""

    def gather(self, value: T, group: object = None) -> list[T]:
        return [value, next(self.answers)]  # type: ignore[list-item]  # T is bool

    answers = iter([False, False, True])


def find(batch: int, trial: Trial, world: Distributed = SINGLE_PROCESS, steps: int = 0) -> int:
    """Find the parts of a batch on a device that is not a CPU."""
    config = PretrainConfig(batch_size=batch, accumulation_steps=steps)
    return find_accumulation_steps(config, world, torch.device("meta"), width=384, trial=trial, reserved=2**40)


@pytest.mark.parametrize(
    ("batch", "most", "images", "parts"),
    [(512, 600, 512, 1), (512, 511, 256, 2), (64, 9, 8, 8), (50, 12, 7, 8), (4, 1, 1, 4), (94, 30, 24, 4)],
)
def test_the_batch_is_halved_until_it_fits(batch: int, most: int, images: int, parts: int) -> None:
    """Halves of 50 are 25, 13 and 7 images, of which 8 parts have 7 or 6."""
    trial = Trial(most)
    assert find(batch, trial) == parts and trial.attempts[-1] == images
    assert all(-(-larger // 2) == smaller for larger, smaller in pairwise(trial.attempts))
    assert BatchShard(batch, parts=parts).local_batch_size <= most
    assert find(batch, trial, steps=2) == 2


def test_every_rank_computes_what_fits_on_the_smallest() -> None:
    assert find(64, Trial(64), TwoRanks()) == 4


def test_nothing_fits() -> None:
    with pytest.raises(UserError, match="not even one image fits"):
        find(2, Trial(0, MemoryError()))


def test_another_error_is_not_taken_for_out_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"):
        find(8, Trial(0, RuntimeError("shapes differ")))


@pytest.mark.parametrize(("images", "advice"), [(8, "--accumulation-steps 4"), (1, "a smaller model")])
def test_running_out_of_memory_names_what_to_change(images: int, advice: str) -> None:
    with pytest.raises(UserError, match=advice), out_of_memory_hint(images, parts=2):
        raise OUT_OF_MEMORY


def test_a_cpu_computes_fewer_images_at_once_if_they_or_the_model_are_larger() -> None:
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
def test_out_of_memory_errors_are_recognized(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) == is_one


def test_an_allocation_beyond_the_memory_names_the_flag_to_change() -> None:
    """Recognize the error of torch's own allocator."""
    with (
        pytest.raises(UserError, match=r"out of memory with 2,048 images .*--accumulation-steps 2 halves them"),
        out_of_memory_hint(2048, 1),
    ):
        torch.empty(2**55)
