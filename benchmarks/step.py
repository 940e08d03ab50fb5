"""One training step (forward, backward, update) against a plain float32 MAE and transformers' ViTMAE, same sizes.

python benchmarks/step.py                                     a tiny ViT at 64 px, batch 128
python benchmarks/step.py --backbone vit_base_patch16_224 --size 224 --patch 16 --batch 16 --rounds 3
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from plain_mae import PlainMAE
from timing import interleaved, machine
from torch import Tensor
from transformers import ViTMAEConfig, ViTMAEForPreTraining

import pixmim
from pixmim import rng
from pixmim.engine.device import autocast, choose_attention, choose_device, choose_precision
from pixmim.engine.optim import Updater, adamw

DECODER = (512, 8, 16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--patch", type=int, default=8)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    size, patch, batch = options.size, options.patch, options.batch
    thin = (128, 4, 4) if "tiny" in options.backbone else DECODER
    device = choose_device("auto")
    fast = choose_precision("auto", device)
    images = torch.randn(batch, 3, size, size, device=device)

    ours = ours_step(images, options.backbone, patch, thin, "fp32", pixmim.Pixels())
    encoder = ours.model.encoder  # type: ignore[attr-defined]
    width, depth, heads = encoder.embed_dim, len(encoder.blocks), encoder.blocks[0].attn.num_heads
    candidates = {
        "plain PyTorch, fp32": theirs_step(PlainMAE(size, patch, width, depth, heads, thin).to(device), images),
        "transformers ViTMAE, fp32": theirs_step(
            huggingface(size, patch, width, depth, heads, thin).to(device), images
        ),
        "pixmim MAE, fp32": ours,
        "pixmim PixMIM, fp32": ours_step(images, options.backbone, patch, thin, "fp32", low_frequency()),
        f"pixmim PixMIM, {fast} (auto)": ours_step(images, options.backbone, patch, thin, fast, low_frequency()),
        "the target alone": lambda: low_frequency()(images),
    }
    seconds = interleaved(candidates, options.rounds)
    print(f"{options.backbone} at {size} px, patch {patch}, batch {batch}; {machine()}; median of {options.rounds}")
    base = seconds["plain PyTorch, fp32"]
    for name, time in seconds.items():
        print(f"{name:<34}{time * 1e3:9.1f} ms {batch / time:9.1f} images/s   {base / time:5.2f} x plain")
    for name in ("pixmim PixMIM, fp32", f"pixmim PixMIM, {fast} (auto)"):
        print(f"PixMIM's target takes {seconds['the target alone'] / seconds[name]:.2%} of a step of {name}")


def low_frequency() -> pixmim.LowFrequency:
    return pixmim.LowFrequency(radius="auto")


def ours_step(
    images: Tensor, backbone: str, patch: int, thin: tuple[int, int, int], precision: str, target: torch.nn.Module
) -> Callable[[], None]:
    batch, _, size, _ = images.shape
    model = pixmim.create_model(
        "mae",
        backbone,
        img_size=size,
        patch_size=patch,
        decoder_dim=thin[0],
        decoder_depth=thin[1],
        decoder_heads=thin[2],
    ).to(images.device)
    choose_attention(model, images.device, precision)  # type: ignore[arg-type]
    updater = Updater(adamw(model, 1e-4, (0.9, 0.95), 0.05), None, False, images.device)
    objective, masker = pixmim.Objective(target), pixmim.RandomMask(0.75)

    def step() -> None:
        u = rng.uniform(0, "mask", 0, np.arange(batch), (size // patch) ** 2).astype(np.float32)
        mask = masker.decide(torch.from_numpy(u), (size // patch, size // patch)).to(images.device)
        with autocast(images.device, precision):  # type: ignore[arg-type]
            prediction = model(images, mask)
        updater.backward(objective(prediction, images, mask).loss)
        updater.step(1e-4)

    step.model = model  # type: ignore[attr-defined]
    return step


def theirs_step(model: torch.nn.Module, images: Tensor) -> Callable[[], None]:
    """What one writes without thinking about it: float32, torch's default AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        output = model(images)
        (output if isinstance(output, Tensor) else output.loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def huggingface(
    size: int, patch: int, width: int, depth: int, heads: int, thin: tuple[int, int, int]
) -> ViTMAEForPreTraining:
    return ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=size,
            patch_size=patch,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            decoder_hidden_size=thin[0],
            decoder_num_hidden_layers=thin[1],
            decoder_num_attention_heads=thin[2],
            decoder_intermediate_size=4 * thin[0],
            norm_pix_loss=True,
        )
    )


if __name__ == "__main__":
    main()
