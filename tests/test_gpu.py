"""Tests that need a CUDA device. All others run on a CPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.runs import train
from pixmim import LowFrequency, RandomMask, ReconstructionLoss, create_model, low_pass
from pixmim.config import PretrainConfig
from pixmim.data.dataset import ImageSpec
from pixmim.data.synthetic import SyntheticShapes
from pixmim.training.optim import SyncFreeOptimizer, adamw
from pixmim.transforms.crops import flip_and_normalize

pytestmark = pytest.mark.gpu


def test_a_step_does_not_wait_for_the_device() -> None:
    device = torch.device("cuda")
    model = create_model("mae", "vit_tiny_patch16_224", img_size=64, decoder_depth=1).to(device)
    loss, generator = ReconstructionLoss(LowFrequency(radius="auto")).to(device), RandomMask()
    optimizer = SyncFreeOptimizer(adamw(model, 1e-3, (0.9, 0.95), 0.05), 1.0, True, device)
    images = torch.randn(8, 3, 64, 64, device=device)

    def step() -> None:
        mask = generator(8, 16).to(device)
        with torch.autocast("cuda", torch.float16):
            prediction = model(images, mask)
        optimizer.backward(loss(prediction, images, mask).loss)
        optimizer.step(1e-3)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_low_pass_stays_exact_under_autocast() -> None:
    images = torch.rand(4, 3, 224, 224, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        filtered = low_pass(images, 40)
    assert (filtered.double() - low_pass(images.double(), 40)).abs().max() < 5e-6


def test_a_run_on_the_gpu_agrees_with_the_cpu(tiny_run: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    for device in ("cpu", "cuda"):
        train(tiny_run(device=device, steps=3), tmp_path / device)
    one, two = (load_file(tmp_path / device / "encoder/model.safetensors") for device in ("cpu", "cuda"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=2e-3, rtol=0)


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_deep_images_are_exact_on_the_gpu(dtype: str, tiny_run: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    mean, std, flip = torch.rand(5), torch.rand(5) + 0.1, torch.tensor([True, False])
    shapes = SyntheticShapes(image_spec=ImageSpec(5, dtype))  # type: ignore[arg-type]
    images = torch.stack([shapes.image(i)[:, :32, :32].float() for i in range(2)])
    images = images.to(getattr(torch, dtype)).pin_memory()
    done = flip_and_normalize(images.to("cuda", non_blocking=True), flip.to("cuda"), mean.to("cuda"), std.to("cuda"))
    torch.testing.assert_close(done.cpu(), flip_and_normalize(images, flip, mean, std), atol=1e-5, rtol=1e-5)
    train(tiny_run(device="cuda", steps=2, channels=5, dtype=dtype), tmp_path / "run")
    assert (tmp_path / "run" / "encoder/model.safetensors").exists()
