"""Tiny model configurations of every family."""

from typing import Any

import timm

from pixmim.config import ArchitectureConfig

TINY: dict[str, Any] = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
CNNS = {
    "resnet": ArchitectureConfig("simmim", "test_resnet"),
    "convnext": ArchitectureConfig("simmim", "test_convnext"),
}
THIN: dict[str, Any] = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
MAE = ArchitectureConfig("mae", "vit_tiny_patch16_224", **THIN, options=TINY)
OTHERS = {
    "convmae": (ArchitectureConfig("convmae", "convmae_tiny", **THIN, options={"depth": [1, 1, 1]}), 32),
    "vit": (ArchitectureConfig("simmim", "vit_tiny_patch16_224", options=TINY), 32),
    "beit": (ArchitectureConfig("simmim", "beit_base_patch16_224", options=TINY), 32),
    "swin": (
        ArchitectureConfig(
            "simmim",
            "swin_tiny_patch4_window7_224",
            options={"embed_dim": 24, "window_size": 4, "depths": [1, 1, 1, 1]},
        ),
        64,
    ),
}


def old_swin_layout() -> bool:
    """Return True if this timm mistakes its own Swin without a classifier for an older layout when loading it."""
    return tuple(map(int, timm.__version__.split(".")[:3])) < (1, 0, 31)
