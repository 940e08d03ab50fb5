"""What fits into memory: against needs that are known, a slow count of all live tensors, and memory that runs out."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from pixmim import Objective, Pixels, RandomMask, create_model
from pixmim.engine.memory import footprint
from pixmim.engine.memory.footprint import Footprint, fits, is_out_of_memory, measure
from pixmim.engine.memory.live import Live
from pixmim.errors import UserError
from pixmim.models.base import MaskedModel

MB = 2**20
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def _model(device: torch.device = CPU) -> tuple[MaskedModel, Callable[[int], torch.Tensor]]:
    """A small MAE, and its loss of any number of images."""
    small = {"patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2}
    model = create_model("mae", "vit_tiny_patch16_224", img_size=64, decoder_dim=32, decoder_depth=1, **small).to(
        device
    )
    objective, masker = Objective(Pixels()), RandomMask()

    def loss(images: int) -> torch.Tensor:
        pixels, mask = torch.randn(images, 3, 64, 64, device=device), masker(images, 64).to(device)
        return objective(model(pixels, mask), pixels, mask).loss

    return model, loss


def _step(device: torch.device = CPU) -> tuple[MaskedModel, Callable[[int], None]]:
    """The same, with a whole step."""
    model, loss = _model(device)
    return model, lambda images: loss(images).backward()


def kept_bytes(step: Callable[[], None], parameters: Iterable[torch.Tensor] = ()) -> int:
    """Bytes that a step keeps from its forward for its backward pass, as autograd hands them over."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(sizes.values())


def _live(model: MaskedModel) -> Live:
    there = list(model.parameters())
    return Live([*there, *(p.grad for p in there if p.grad is not None)])


def test_what_lives_between_forward_and_backward_is_what_autograd_keeps() -> None:
    model, loss = _model()
    loss(1).backward()
    with _live(model) as live:
        end = loss(48)
        between = live.now
        end.backward()
    assert between == pytest.approx(kept_bytes(lambda: loss(48).backward(), model.parameters()), rel=0.05)
    assert between < live.peak < 1.5 * between
    del end
    assert live.now < 0.01 * between  # all are gone


def test_a_piece_of_memory_counts_once_and_until_it_is_gone() -> None:
    weight = torch.ones(1000)
    with Live([weight]) as live:
        doubled = weight * 2
        assert live.now == 4000
        rows, _ = doubled.view(10, 100), weight.add_(1)
        assert live.now == 4000
        del doubled
        assert live.now == 4000
        del rows
        assert live.now == 0
        torch.zeros(500)
    assert (live.now, live.peak) == (0, 4000)


def test_recomputing_is_seen() -> None:
    """Blocks that forget what they computed take less, though one at a time computes it again."""
    model, step = _step()
    step(1)
    with _live(model) as whole:
        step(16)
    for block in model.encoder.blocks:  # type: ignore[union-attr]
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[operator]
    with _live(model) as recomputed:
        step(16)
    kept = kept_bytes(lambda: step(16), model.parameters())
    assert kept < recomputed.peak < 0.8 * whole.peak


def test_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    model, step = _step()
    weights = 4 * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(footprint, "free_memory", lambda: 200 * MB)
    found = measure(step, CPU, model.parameters())
    assert found.room == 200 * MB + 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    step(1)
    with _live(model) as live:
        step(64)
    assert found.needs(64) == pytest.approx(live.peak + 4 * weights, rel=0.01)
    images = fits(step, CPU, model.parameters())
    assert images % 8 == 0 and found.needs(images) <= 0.7 * found.room < found.needs(images + 8)
    assert fits(step, CPU, model.parameters(), most=13) == 13
    assert all(p.grad is None for p in model.parameters())

    monkeypatch.setattr(footprint, "free_memory", lambda: 2 * MB)
    with pytest.raises(UserError, match="not even one image fits"):
        fits(step, CPU, model.parameters())
    monkeypatch.setattr(footprint, "free_memory", lambda: None)
    with pytest.raises(UserError, match="cannot be told on this system"):
        fits(step, CPU, model.parameters())
    with pytest.raises(UserError, match="free on meta cannot be told"):
        fits(step, torch.device("meta"), model.parameters())


class Gpu:
    """Stands in for a device of 1,000 MB, of which 100 are somebody else's, and for a step whose need is known."""

    def __init__(self, patch: pytest.MonkeyPatch, need: Callable[[int], float], largest: float = 900) -> None:
        self.need, self.largest, self.steps = need, largest, list[int]()
        self.peak = 0.0
        patch.setattr(torch.cuda, "synchronize", lambda device: None)
        patch.setattr(torch.cuda, "empty_cache", lambda: None)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", self._reset)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda device: int(self.peak * MB))
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (600 * MB, 1000 * MB))
        patch.setattr(torch.cuda, "memory_reserved", lambda device: 300 * MB)

    def _reset(self, device: torch.device) -> None:
        self.peak = 0.0

    def step(self, images: int) -> None:
        self.steps.append(images)
        if self.need(images) > self.largest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.peak = max(self.peak, self.need(images))


@pytest.mark.parametrize(
    ("need", "largest", "images"),
    [
        (lambda n: 100 + 2 * n, 900, 352),  # (900 x 0.92 - 20 - 100) / 2 = 354; moments take 20
        (lambda n: 100 + 2 * n, 800, 264),  # memory in pieces: 352 do not fit after all
        (lambda n: 100 + 2 * n, 500, 192),  # nor do 264
        (lambda n: max(100 + 2 * n, 4 * n), 900, 192),  # the fullest moment becomes another
        (lambda n: max(100 + 2 * n, 2.5 * n), 900, 312),  # here without running out: 352 leave no margin
        (lambda n: 30 * n, 900, 24),  # 26.9
        (lambda n: 90 * n, 900, 8),  # 16 do not fit to be measured
        (lambda n: 400 * n, 900, 2),
        (lambda n: 1.0, 900, 500),  # most
    ],
)
def test_on_a_gpu(need: Callable[[int], float], largest: float, images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, need, largest)
    weights = [torch.nn.Parameter(torch.empty(10 * MB // 4))]
    assert fits(gpu.step, CUDA, weights, most=500) == images
    assert gpu.steps[-1] == images  # it has been tried


def test_nothing_fits_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch, lambda n: 500.0 * n)
    with pytest.raises(UserError, match=r"does not fit into 0\.9 GiB of cuda"):
        fits(gpu.step, CUDA, [])


def test_another_error_is_not_taken_for_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(images: int) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        fits(step, CPU, [])


def test_several_processes_agree_on_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tries what the others try, though it could do more by itself."""
    asked = []

    def least(mine: int) -> int:
        asked.append(mine)
        return min(mine, 104)  # what another says

    gpu = Gpu(monkeypatch, lambda n: 100 + 2 * n)
    assert fits(gpu.step, CUDA, [], least=least) == 104 and gpu.steps[-1] == 104 and asked[-1] == 1


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


RUNS_OUT = """
import os, resource
from test_memory import CPU, _step
from pixmim.engine.memory.footprint import fits, is_out_of_memory, measure
model, step = _step()
step(2)
taken = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (taken + 400 * 2**20,) * 2)
images = fits(step, CPU, model.parameters(), most=2**20)
step(images)
try:
    step(2 * images)
except RuntimeError as error:
    print(images, is_out_of_memory(error), error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of addresses, as Linux keeps it")
def test_what_was_found_fits_and_twice_that_runs_out() -> None:
    """In a process that may take 400 MB more than its start: there the CPU's allocator itself says no."""
    here = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", RUNS_OUT], capture_output=True, text=True, env=here)
    assert done.returncode == 0, done.stderr
    images, recognised, said = done.stdout.split(maxsplit=2)
    assert int(images) > 8 and recognised == "True" and "allocate memory" in said


@pytest.mark.gpu
def test_what_was_found_fits_on_a_real_gpu() -> None:
    """With half a GiB for this process, of which its counters know nothing: what is found has been tried."""
    model, step = _step(CUDA)
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(2**29 / total)
    try:
        images = fits(step, CUDA, model.parameters(), most=2**16)
        step(images)
        with pytest.raises(torch.OutOfMemoryError):
            step(4 * images)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_footprint() -> None:
    found = Footprint.through((2, 14.0), (4, 18.0), 100.0, margin=0.2)
    assert (found.fixed, found.per_image, found.needs(10)) == (10.0, 2.0, 30.0)
    assert found.fitting(1000) == 32 and found.fitting(35) == 35 and found.fitting(3) == 3  # 35 fill 80
    assert Footprint(90.0, 2.0, 100.0).fitting(9) == 5 and Footprint(99.0, 2.0, 100.0).fitting(9) == 0
