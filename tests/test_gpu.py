"""Test on a GPU what the other tests promise of a CPU. Most of it also runs on the CPU, so that the tests are right."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import compile_worker
from helpers.batches import tensors
from helpers.commands import Started
from helpers.compile_worker import CASES
from helpers.interrupt import Stopped
from helpers.runs import print_training, train, weights
from pixmim import ColorBins, LowFrequency, Pixels, ReconstructionLoss, low_pass
from pixmim.build import build_model
from pixmim.config import ParallelConfig, PretrainConfig
from pixmim.data import create_loader, open_dataset
from pixmim.data.bad_images import BadImageLog
from pixmim.data.build_resized_cache import make_cache
from pixmim.data.caching import CacheLocation
from pixmim.data.dataset import ImageSpec
from pixmim.data.sampler import BatchShard
from pixmim.data.synthetic import SyntheticShapes
from pixmim.masking import MaskSampler, RandomMask
from pixmim.pretraining import compute_loss
from pixmim.training import trainer
from pixmim.training.optim import SyncFreeOptimizer, adamw
from pixmim.training.parallelize import choose_compilation
from pixmim.training.precision import Precision
from pixmim.transforms.crops import SimpleResizedCrop, flip_and_normalize

Make = Callable[..., PretrainConfig]
CPU, EAGER = torch.device("cpu"), ParallelConfig(compile="none")
LOCATIONS: list[CacheLocation] = ["none", "ram", "gpu"]
ON_CPU_TOO = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TARGETS: dict[str, ReconstructionLoss] = {
    "pixels": ReconstructionLoss(Pixels()),
    "low frequencies": ReconstructionLoss(LowFrequency("auto")),
    "low frequencies of the paper's code": ReconstructionLoss(LowFrequency("auto", "paper-code")),
    "an ellipse, in windows": ReconstructionLoss(LowFrequency((6, 9)), False, "smooth_l1", normalize_window=9),
    "colors": ReconstructionLoss(ColorBins(8), False, "cross_entropy"),
    "colors of low frequencies": ReconstructionLoss(ColorBins(4, LowFrequency("auto")), False, "cross_entropy"),
}


@pytest.fixture(params=ON_CPU_TOO)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield torch.device(request.param)


@pytest.fixture
def no_waiting(device: torch.device) -> Iterator[Callable[[bool], None]]:
    """Return a function that turns an error at each wait for the GPU on and off; on a CPU it does nothing."""

    def switch(on: bool) -> None:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error" if on else "default")

    yield switch
    switch(False)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("gpu") / "cache"
    make_cache(open_dataset("shapes:count=40,size=32"), folder, (32, 32))
    return str(folder)


def build(name: str) -> tuple[nn.Module, Callable[[int], Any], ReconstructionLoss]:
    """Build a case of compile_worker.py at 64 px: model, function that draws masks, and loss."""
    method, backbone, options, masks, loss = CASES[name]
    model = compile_worker.create_model(method, backbone, img_size=64, **options)
    grid = (64 // model.patch, 64 // model.patch)
    return model, lambda count: masks(count, grid), loss


def close(found: Tensor, expected: Tensor, share: float) -> None:
    """Assert that the largest difference is at most a share of the largest value."""
    error = (found.detach().cpu().double() - expected.detach().double()).abs().max()
    assert error <= share * expected.detach().abs().max() + 1e-12, f"{float(error):.2e}"


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_of_every_model_are_those_of_float64(name: str, device: torch.device) -> None:
    model, masks, loss = build(name)
    images, mask = torch.randn(4, 3, 64, 64), masks(4)
    model.double()
    expected = compute_loss(model, loss, images.double(), mask, "fp32")
    expected.backward()
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.float().to(device).zero_grad()
    found = compute_loss(model, loss.to(device), images.to(device), mask, "fp32")
    found.backward()
    loss.to(CPU)
    close(found, expected, 1e-5)
    largest = max(g.abs().max() for g in gradients.values())
    for key, p in model.named_parameters():
        if key in gradients:
            assert (p.grad.cpu().double() - gradients[key]).abs().max() <= 2e-4 * largest, key  # type: ignore[union-attr]


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_is_exact_under_autocast(name: str, device: torch.device) -> None:
    images, loss = torch.rand(2, 3, 48, 64), TARGETS[name]
    expected = loss.targets(images.double(), 8)
    with torch.autocast(device.type, torch.bfloat16):
        found = loss.to(device).targets(images.to(device), 8).cpu()
    loss.to(CPU)
    if isinstance(loss.target, ColorBins):
        assert (found != expected).double().mean() < 1e-3  # values on the border of two bins
    else:
        close(found, expected, 2e-5)


def test_the_low_pass_stays_exact_under_autocast(device: torch.device) -> None:
    images = torch.rand(4, 3, 224, 224)
    with torch.autocast(device.type, torch.bfloat16):
        filtered = low_pass(images.to(device), 40)
    assert (filtered.cpu().double() - low_pass(images.double(), 40)).abs().max() < 5e-6


@pytest.mark.parametrize("location", LOCATIONS)
def test_batches_are_those_of_the_cpu(location: CacheLocation, device: torch.device, cache: str) -> None:
    data, masks = open_dataset(cache), MaskSampler(RandomMask(), (4, 4), 3, 6)

    def batches(location: CacheLocation, device: torch.device) -> list[list[Tensor]]:
        skipped, shard = BadImageLog(None, len(data), 0.5), BatchShard(6, start=30)
        with create_loader(
            data, SimpleResizedCrop(32), shard, location, skipped=skipped, device=device, masks=masks.at, threads=3
        ) as loader:
            return [[t.to(device, non_blocking=True).cpu().clone() for t in tensors(b)] for b in islice(loader, 6)]

    for one, two in zip(batches(location, device), batches("none", CPU), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_deep_images_are_exact(dtype: str, device: torch.device, tiny_run: Make, tmp_path: Path) -> None:
    mean, std, flip = torch.rand(5), torch.rand(5) + 0.1, torch.tensor([True, False])
    shapes = SyntheticShapes(image_spec=ImageSpec(5, dtype))  # type: ignore[arg-type]
    images = torch.stack([shapes.image(i)[:, :32, :32].float() for i in range(2)]).to(getattr(torch, dtype))
    if device.type == "cuda":
        images = images.pin_memory()
    done = flip_and_normalize(images.to(device, non_blocking=True), *(t.to(device) for t in (flip, mean, std)))
    torch.testing.assert_close(done.cpu(), flip_and_normalize(images, flip, mean, std), atol=1e-5, rtol=1e-5)
    train(tiny_run(device=device.type, steps=2, channels=5, dtype=dtype, parallel=EAGER), tmp_path / "run")
    assert weights(tmp_path / "run")


@pytest.fixture(scope="module")
def plain(tiny_run: Make, cache: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, float], None]:
    """Return an assertion that a run of three steps moves its weights as the plain one on the CPU, up to a share."""
    config, out = tiny_run(data=cache, steps=3, log_every=3), tmp_path_factory.mktemp("plain")
    initial = build_model(config).encoder.state_dict()
    train(config, out)
    expected = weights(out)
    movement = sum(float((expected[name] - initial[name]).abs().sum()) for name in expected)

    def check(run: Path, share: float) -> None:
        difference = sum(float((found - expected[name]).abs().sum()) for name, found in weights(run).items())
        assert difference <= share * movement, difference / movement

    return check


@pytest.mark.parametrize(
    "changes",
    [{}, {"accumulation_steps": 2}, {"cache_images": "gpu"}, {"cache_images": "ram", "precision": "bf16"}],
    ids=lambda changes: ", ".join(map(str, changes.values())) or "as it is",
)
def test_a_run_agrees_with_the_plain_run_on_the_cpu(
    changes: dict[str, Any], device: torch.device, plain: Any, tiny_run: Make, tmp_path: Path, cache: str
) -> None:
    train(tiny_run(data=cache, steps=3, device=device.type, parallel=EAGER, **changes), tmp_path / "run")
    plain(tmp_path / "run", 0.05 if "precision" in changes else 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("compile", ["auto", "none", "blocks", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_compiled_and_half_precision_runs_agree_with_the_plain_run_on_the_cpu(
    compile: Any, precision: Precision, plain: Any, tiny_run: Make, tmp_path: Path, cache: str
) -> None:
    config = tiny_run(data=cache, steps=3, device="cuda", precision=precision, parallel=ParallelConfig(compile=compile))
    text = Started(tmp_path / "output.txt", print_training, config, tmp_path / "run").end()
    assert "3 steps" in text and "nothing is compiled" not in text
    plain(tmp_path / "run", 1e-3 if precision == "fp32" else 0.05)


@pytest.mark.gpu
def test_blocks_of_every_model_compile_on_the_gpu(tmp_path: Path) -> None:
    text = Started(tmp_path / "output.txt", compile_worker.blocks_on_the_gpu).end()
    assert [line.split(":")[0] for line in text.splitlines() if line.endswith("by block")] == list(CASES)


def test_blocks_are_compiled_by_default_on_a_gpu_only(device: torch.device) -> None:
    model = compile_worker.create_model("mae", "vit_tiny_patch16_224", img_size=32, decoder_depth=1)
    config, line = choose_compilation(ParallelConfig(), model, device)
    assert (config.compile, line) == ("blocks" if device.type == "cuda" else "none", "")
    assert (
        choose_compilation(ParallelConfig(), compile_worker.create_model("simmim", "resnet10t"), device)[0].compile
        == "none"
    )


def test_a_bad_gradient_halves_the_scale_and_changes_nothing(device: torch.device) -> None:
    model = nn.Linear(4, 2).to(device)
    optimizer = SyncFreeOptimizer(adamw(model, 0.1, (0.9, 0.95), 0.05), 1.0, True, device)
    before = [p.detach().clone() for p in model.parameters()]
    for factor, scale, skipped in ((float("nan"), 2.0**15, 1), (float("inf"), 2.0**14, 2)):
        optimizer.backward(model(torch.randn(3, 4, device=device)).square().mean() * factor)
        optimizer.step(0.1)
        assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        assert float(optimizer.state["scale"]) == scale and int(optimizer.state["skipped"]) == skipped
    optimizer.backward(model(torch.randn(3, 4, device=device)).square().mean())
    norm = optimizer.step(0.1)
    assert torch.isfinite(norm) and not any(
        torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)
    )
    assert float(optimizer.state["scale"]) == 2.0**14 and int(optimizer.state["streak"]) == 0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.gpu)])
def test_no_model_waits_for_the_gpu(
    name: str, precision: Precision, device: torch.device, no_waiting: Callable[[bool], None]
) -> None:
    if precision == "fp16" and device.type == "cpu":
        pytest.skip("requires a CUDA device")
    model, masks, loss = build(name)
    model.to(device)
    optimizer = SyncFreeOptimizer(adamw(model, 1e-3, (0.9, 0.95), 0.05), 1.0, precision == "fp16", device)
    images, loss = torch.randn(4, 3, 64, 64, device=device), loss.to(device)
    for turn in range(3):
        mask = masks(4)
        mask = mask.pin_memory() if device.type == "cuda" else mask
        no_waiting(turn > 0)
        optimizer.backward(compute_loss(model, loss, images, mask, precision))
        optimizer.step(1e-3)
        no_waiting(False)
    loss.to(CPU)
    assert int(optimizer.state["skipped"]) == 0


@pytest.mark.parametrize(
    ("location", "changes"),
    [("none", {}), ("none", {"accumulation_steps": 2}), ("ram", {}), ("gpu", {"precision": "bf16"})],
)
def test_the_steps_of_a_run_do_not_wait_for_the_gpu(
    location: CacheLocation,
    changes: dict[str, Any],
    device: torch.device,
    no_waiting: Callable[[bool], None],
    tiny_run: Make,
    tmp_path: Path,
    cache: str,
) -> None:
    """Steps 3 to 6, from the real loader: the first ones warm up, and the last one is logged and saved."""
    seen: list[int] = []

    def after(step: int) -> None:
        seen.append(step)
        if step in (2, 6):
            no_waiting(step == 2)

    config = tiny_run(
        data=cache, steps=8, log_every=8, device=device.type, cache_images=location,
        parallel=EAGER, **changes,
    )  # fmt: skip
    train(config, tmp_path / "run", on_step_end=after)
    assert seen == list(range(1, 9))


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.gpu)])
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    precision: Precision, device: torch.device, tiny_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise on a CPU. On a GPU, atomic sums in the backward pass of a gather have no order."""
    if precision == "fp16" and device.type == "cpu":
        pytest.skip("requires a CUDA device")
    config = tiny_run(device=device.type, steps=6, precision=precision, log_every=1, parallel=EAGER)
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "PreemptionHandler", Stopped)
        patch.setattr(Stopped, "after", 2)
        train(replace(config), tmp_path / "parts")
    assert not (tmp_path / "parts/encoder").exists()
    assert "resuming from step 3" in train(config, tmp_path / "parts")
    tolerance = 0.0 if device.type == "cpu" else 1e-5
    expected = weights(tmp_path / "whole")
    for name, found in weights(tmp_path / "parts").items():
        torch.testing.assert_close(found, expected[name], atol=tolerance, rtol=0)
