"""One training step of every model against the most natural peer that installs, in float32 and as pixmim would run it.

python benchmarks/family.py              widths of a ViT-S and a Swin-T at 96 px, batch 16
python benchmarks/family.py --full       the published base models at their published sizes, batch 4

MAE, LSMAE   transformers' ViTMAEForPreTraining
SimMIM       transformers' SwinForMaskedImageModeling and ViTForMaskedImageModeling
ConvMAE      nothing that installs; ViTMAEForPreTraining of the same width, for the cost of the convolutions
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from timing import interleaved, machine
from torch import Tensor, nn
from transformers import (
    SwinConfig,
    SwinForMaskedImageModeling,
    ViTConfig,
    ViTForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

import pixmim
from pixmim.engine.device import autocast, choose_attention, choose_device, choose_precision
from pixmim.engine.optim import Updater, adamw
from pixmim.masking import Mask, Masker

Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device, batch = choose_device("auto"), 4 if options.full else 16
    fast = choose_precision("auto", device)
    print(f"{machine()}; batch {batch}, median of {options.rounds}; a step: forward, backward, update")
    print(f"{'':<26}{'peer fp32':>12}{'fp32':>12}{fast:>12}")
    for name, (build, ours) in (FULL if options.full else SMALL).items():
        candidates = {
            "peer": peer_step(build().to(device), batch),
            "fp32": our_step("fp32", batch, **ours),
            fast: our_step(fast, batch, **ours),
        }
        seconds = interleaved(candidates, options.rounds)
        base = seconds["peer"]
        row = "".join(f"{base / seconds[key]:>10.2f} x" for key in ("fp32", fast))
        print(f"{name:<26}{base * 1e3:>9.0f} ms{row}", flush=True)


def mae_peer(size: int, width: int, depth: int, heads: int, decoder: tuple[int, int, int]) -> nn.Module:
    config = ViTMAEConfig(
        image_size=size, hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        intermediate_size=4 * width, decoder_hidden_size=decoder[0], decoder_num_hidden_layers=decoder[1],
        decoder_num_attention_heads=decoder[2], decoder_intermediate_size=4 * decoder[0], norm_pix_loss=True,
    )  # fmt: skip
    return ViTMAEForPreTraining(config)


def vit_peer(size: int, width: int, depth: int, heads: int) -> nn.Module:
    config = ViTConfig(
        image_size=size, hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        intermediate_size=4 * width, encoder_stride=16,
    )  # fmt: skip
    return ViTForMaskedImageModeling(config)


def swin_peer(size: int, width: int, depths: list[int], heads: list[int], window: int) -> nn.Module:
    config = SwinConfig(
        image_size=size, embed_dim=width, depths=depths, num_heads=heads, window_size=window, drop_path_rate=0.0
    )
    return SwinForMaskedImageModeling(config)


THIN = {"decoder_dim": 192, "decoder_depth": 4, "decoder_heads": 6}
S = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
Row = tuple[Callable[[], nn.Module], dict[str, Any]]
SMALL: dict[str, Row] = {
    "MAE": (lambda: mae_peer(96, 384, 12, 6, (192, 4, 6)), {"name": "mae", "size": 96, **S, **THIN}),
    "LSMAE": (lambda: mae_peer(192, 384, 12, 6, (192, 4, 6)), {"name": "lsmae", "size": 192, **S, **THIN}),
    "ConvMAE": (
        lambda: mae_peer(96, 384, 12, 6, (192, 4, 6)),
        {
            "name": "convmae", "backbone": "convmae_tiny", "size": 96, "embed_dim": (128, 192, 384),
            "depth": (2, 2, 11), "num_heads": 6, **THIN,
        },
    ),
    "SimMIM on ViT": (lambda: vit_peer(96, 384, 12, 6), {"name": "simmim", "size": 96, **S}),
    "SimMIM on Swin": (
        lambda: swin_peer(96, 96, [2, 2, 6, 2], [3, 6, 12, 24], 3),
        {"name": "simmim", "backbone": "swin_tiny_patch4_window7_224", "size": 96, "window_size": 3},
    ),
}  # fmt: skip
FULL: dict[str, Row] = {
    "MAE, ViT-B at 224": (
        lambda: mae_peer(224, 768, 12, 12, (512, 8, 16)),
        {"name": "mae", "backbone": "vit_base_patch16_224", "size": 224},
    ),
    "LSMAE, ViT-B at 448": (
        lambda: mae_peer(448, 768, 12, 12, (384, 8, 12)),
        {"name": "lsmae", "backbone": "vit_base_patch16_224", "size": 448},
    ),
    "ConvMAE-B at 224": (
        lambda: mae_peer(224, 768, 12, 12, (512, 8, 16)),
        {"name": "convmae", "backbone": "convmae_base", "size": 224},
    ),
    "SimMIM, ViT-B at 224": (
        lambda: vit_peer(224, 768, 12, 12),
        {"name": "simmim", "backbone": "vit_base_patch16_224", "size": 224},
    ),
    "SimMIM, Swin-B at 192": (
        lambda: swin_peer(192, 128, [2, 2, 18, 2], [4, 8, 16, 32], 6),
        {"name": "simmim", "backbone": "swin_base_patch4_window7_224", "size": 192, "window_size": 6},
    ),
}


def our_step(
    precision: Any, batch: int, name: str, size: int, backbone: str = "vit_tiny_patch16_224", **options: Any
) -> Step:
    """pixmim's step with the method's own mask and distance, and PixMIM's target."""
    device = choose_device("auto")
    images = torch.randn(batch, 3, size, size, device=device)
    model = pixmim.create_model(name, backbone, img_size=size, **options).to(device)
    choose_attention(model, device, precision)
    updater = Updater(adamw(model, 1e-4, (0.9, 0.95), 0.05), None, False, device)
    simmim = name == "simmim"
    objective = pixmim.Objective(pixmim.LowFrequency("auto"), not simmim, "l1" if simmim else "mse")
    unit = max(1, 32 // model.patch)
    masker: Masker = pixmim.RandomMask(0.75)
    if simmim:
        masker = pixmim.UnitMask(0.6, unit, whole=True)
    elif name == "lsmae":
        masker = pixmim.UnitMask(0.75, unit)
    grid = (size // model.patch, size // model.patch)

    def step() -> None:
        mask: Mask = masker(batch, grid).to(device)
        with autocast(device, precision):
            prediction = model(images, mask)
        updater.backward(objective(prediction, images, mask).loss)
        updater.step(1e-4)

    return step


def peer_step(model: Any, batch: int) -> Step:
    """What its documentation shows: float32, torch's AdamW, a random mask of 60 % for the models that take one."""
    size, patch = model.config.image_size, model.config.patch_size
    images = torch.randn(batch, 3, size, size, device=next(model.parameters()).device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    takes_mask = not isinstance(model, ViTMAEForPreTraining)
    places = (size // patch) ** 2

    def step() -> None:
        hidden: dict[str, Tensor] = {}
        if takes_mask:
            hidden = {"bool_masked_pos": torch.rand(batch, places, device=images.device) < 0.6}
        model(images, **hidden).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
