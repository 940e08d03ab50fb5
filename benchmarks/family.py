"""Time a training step of every model against its nearest peer that installs, in float32 and in the default precision.

python benchmarks/family.py              widths of a ViT-S and a Swin-T at 96 px, batch 16
python benchmarks/family.py --full       the published base models at their published sizes, batch 4
python benchmarks/family.py --only MFF Pixio

MAE, LSMAE         transformers' ViTMAEForPreTraining
SimMIM             transformers' SwinForMaskedImageModeling and ViTForMaskedImageModeling
ConvMAE            nothing that installs; ViTMAEForPreTraining of the same width, for the cost of the convolutions
MFF, green noise   nothing that installs; ViTMAEForPreTraining, for the cost of the fusion and of the masks
Pixio              nothing that trains; ViTMAEForPreTraining of the same sizes, for the cost of its class tokens
SimMIM on ResNet   nothing that installs; timm's network that predicts all pixels, for the cost of hiding some

MFU  as in step.py: the products that our model needs, over what one large product reaches here
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from steps import Ours, huggingface_mae, theirs, training_flops
from timing import CLOCKS, interleaved, machine, product_rate
from torch import Tensor, nn
from transformers import SwinConfig, SwinForMaskedImageModeling, ViTConfig, ViTForMaskedImageModeling

from pixmim.mask_patterns import GreenNoiseMask
from pixmim.training.precision import choose_device, choose_precision
from pixmim.utils.memory import retain_freed_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", nargs="+", help="rows whose names contain one of these")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: for a CPU that others use too")
    options = parser.parse_args()
    clock = CLOCKS[options.clock]
    retain_freed_memory()
    device, batch = choose_device("auto"), options.batch or (4 if options.full else 16)
    steps = 10 if device.type == "cuda" else 1
    fast = choose_precision("auto", device)
    peaks = {precision: product_rate(device, precision, clock) for precision in dict.fromkeys(("fp32", fast))}
    print(f"{machine()}; batch {batch}, median of {options.rounds}; a step: forward, backward, update")
    print(f"{'':<26}{'peer, fp32':>12}{'pixmim, fp32':>19}{f'pixmim, {fast}':>19}{'GFLOP an image':>18}")
    for name, (build, ours) in (FULL if options.full else SMALL).items():
        if options.only and not any(part in name for part in options.only):
            continue
        images = torch.randn(batch, 3, ours["size"], ours["size"], device=device)
        candidates = {"peer": theirs(build(), "fp32", device)}
        candidates |= {precision: Ours(**ours, precision=precision, device=device) for precision in peaks}
        turns = {key: partial(step, images) for key, step in candidates.items()}
        seconds, flops = interleaved(turns, options.rounds, clock, steps), training_flops(**ours)
        row = f"{name:<26}{seconds['peer'] * 1e3:>9.0f} ms"
        for precision, peak in peaks.items():
            used = flops * batch / seconds[precision] / peak
            row += f"{seconds['peer'] / seconds[precision]:>8.2f} x,{used:>5.0%} MFU"
        print(f"{row}{flops / 1e9:>14.1f}", flush=True)


class Hiding(nn.Module):
    """Wrap a peer of SimMIM, which takes a mask: 60 % of the patches."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.places = model, (model.config.image_size // model.config.patch_size) ** 2

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.rand(len(images), self.places, device=images.device) < 0.6
        return self.model(images, bool_masked_pos=hidden).loss


def vit_peer(size: int, width: int, depth: int, heads: int) -> nn.Module:
    config = ViTConfig(
        image_size=size, hidden_size=width, num_hidden_layers=depth, num_attention_heads=heads,
        intermediate_size=4 * width, encoder_stride=16,
    )  # fmt: skip
    return Hiding(ViTForMaskedImageModeling(config))


def swin_peer(size: int, width: int, depths: list[int], heads: list[int], window: int) -> nn.Module:
    config = SwinConfig(
        image_size=size, embed_dim=width, depths=depths, num_heads=heads, window_size=window, drop_path_rate=0.0
    )
    return Hiding(SwinForMaskedImageModeling(config))


class Predicting(nn.Module):
    """Predict the pixels of all patches from the last map of a CNN."""

    def __init__(self, backbone: str) -> None:
        super().__init__()
        body: Any = timm.create_model(backbone, num_classes=0)
        self.body = body
        self.stride: int = body.feature_info[-1]["reduction"]
        self.head = nn.Conv2d(body.num_features, 3 * self.stride**2, 1)

    def forward(self, images: Tensor) -> Tensor:
        predicted = nn.functional.pixel_shuffle(self.head(self.body.forward_features(images)), self.stride)
        return nn.functional.l1_loss(predicted, images)


TINY = "vit_tiny_patch16_224"  # a name only: the sizes are options
THIN = {"decoder_dim": 192, "decoder_depth": 4, "decoder_heads": 6}
S = {"patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
Row = tuple[Callable[[], nn.Module], dict[str, Any]]
SMALL: dict[str, Row] = {
    "MAE": (
        lambda: huggingface_mae(96, 16, 384, 12, 6, (192, 4, 6)),
        {"method": "mae", "backbone": TINY, "size": 96, **S, **THIN},
    ),
    "LSMAE": (
        lambda: huggingface_mae(192, 16, 384, 12, 6, (192, 4, 6)),
        {"method": "lsmae", "backbone": TINY, "size": 192, **S, **THIN},
    ),
    "MFF": (
        lambda: huggingface_mae(96, 16, 384, 12, 6, (192, 4, 6)),
        {"method": "mff", "backbone": TINY, "size": 96, **S, **THIN},
    ),
    "MAE, green noise": (
        lambda: huggingface_mae(96, 16, 384, 12, 6, (192, 4, 6)),
        {"method": "mae", "backbone": TINY, "size": 96, "mask": GreenNoiseMask(0.75), **S, **THIN},
    ),
    "Pixio": (
        lambda: huggingface_mae(128, 16, 384, 12, 6, (192, 16, 6)),
        {"method": "pixio", "backbone": TINY, "size": 128, **S, **THIN, "decoder_depth": 16},
    ),
    "ConvMAE": (
        lambda: huggingface_mae(96, 16, 384, 12, 6, (192, 4, 6)),
        {
            "method": "convmae", "backbone": "convmae_tiny", "size": 96, "embed_dim": (128, 192, 384),
            "depth": (2, 2, 11), "num_heads": 6, **THIN,
        },
    ),
    "SimMIM on ViT": (lambda: vit_peer(96, 384, 12, 6), {"method": "simmim", "backbone": TINY, "size": 96, **S}),
    "SimMIM on Swin": (
        lambda: swin_peer(96, 96, [2, 2, 6, 2], [3, 6, 12, 24], 3),
        {"method": "simmim", "backbone": "swin_tiny_patch4_window7_224", "size": 96, "window_size": 3},
    ),
    "SimMIM on ResNet-50": (
        lambda: Predicting("resnet50"),
        {"method": "simmim", "backbone": "resnet50", "size": 96},
    ),
}  # fmt: skip
FULL: dict[str, Row] = {
    "MAE, ViT-B at 224": (
        lambda: huggingface_mae(224, 16, 768, 12, 12, (512, 8, 16)),
        {"method": "mae", "backbone": "vit_base_patch16_224", "size": 224},
    ),
    "LSMAE, ViT-B at 448": (
        lambda: huggingface_mae(448, 16, 768, 12, 12, (384, 8, 12)),
        {"method": "lsmae", "backbone": "vit_base_patch16_224", "size": 448},
    ),
    "MFF, ViT-B at 224": (
        lambda: huggingface_mae(224, 16, 768, 12, 12, (512, 8, 16)),
        {"method": "mff", "backbone": "vit_base_patch16_224", "size": 224},
    ),
    "Green noise, ViT-B at 224": (
        lambda: huggingface_mae(224, 16, 768, 12, 12, (512, 8, 16)),
        {"method": "mae", "backbone": "vit_base_patch16_224", "size": 224, "mask": GreenNoiseMask(0.75)},
    ),
    "Pixio, ViT-B at 256": (
        lambda: huggingface_mae(256, 16, 768, 12, 12, (512, 32, 16)),
        {"method": "pixio", "backbone": "vit_base_patch16_224", "size": 256},
    ),
    "ConvMAE-B at 224": (
        lambda: huggingface_mae(224, 16, 768, 12, 12, (512, 8, 16)),
        {"method": "convmae", "backbone": "convmae_base", "size": 224},
    ),
    "SimMIM, ViT-B at 224": (
        lambda: vit_peer(224, 768, 12, 12),
        {"method": "simmim", "backbone": "vit_base_patch16_224", "size": 224},
    ),
    "SimMIM, Swin-B at 192": (
        lambda: swin_peer(192, 128, [2, 2, 18, 2], [4, 8, 16, 32], 6),
        {"method": "simmim", "backbone": "swin_base_patch4_window7_224", "size": 192, "window_size": 6},
    ),
    "SimMIM, ResNet-50 at 224": (
        lambda: Predicting("resnet50"),
        {"method": "simmim", "backbone": "resnet50", "size": 224},
    ),
}


if __name__ == "__main__":
    main()
