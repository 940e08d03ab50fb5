"""Test that accumulated gradients equal those of the full batch, for every model, target and mask."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from helpers.models import MAE, OTHERS, THIN
from pixmim.build import build_loss, build_mask_sampler, build_model
from pixmim.config import ArchitectureConfig, MaskConfig, PretrainConfig, TargetConfig
from pixmim.data.sampler import BatchShard
from pixmim.pretraining import compute_loss

VIT, SWIN = OTHERS["vit"][0], OTHERS["swin"][0]
LSMAE = ArchitectureConfig(
    "lsmae", "vit_tiny_patch16_224", **THIN, decoder_stride=2, predict_patch=16, options=MAE.options
)
BINS = TargetConfig(distance="cross_entropy", normalize_patches=False)
CONFIGS: dict[str, dict[str, Any]] = {
    "mae": {"model": MAE},
    "mae, pixels, not normalized": {"model": MAE, "target": TargetConfig("pixels", normalize_patches=False)},
    "lsmae": {"model": LSMAE, "mask": MaskConfig("blocks", block_size=16)},
    "convmae": {"model": OTHERS["convmae"][0]},
    "vit, block-wise masks of several sizes": {"model": VIT, "size": "64", "mask": MaskConfig("beit-blocks", 0.4)},
    "beit, a window": {"model": OTHERS["beit"][0], "target": TargetConfig(normalize_patches=False, normalize_window=5)},
    "swin": {
        "model": SWIN,
        "size": "64",
        "mask": MaskConfig("blocks", 0.6, 32, True),
        "target": TargetConfig("pixels"),
    },
    "vit, cut blocks": {"model": VIT, "size": "40", "mask": MaskConfig("blocks", 0.6, 16, True), "target": BINS},
}


@dataclass
class Setup:
    """A model in float64 with its loss and masks."""

    config: PretrainConfig

    def __post_init__(self) -> None:
        self.model = build_model(self.config).double()
        self.criterion = build_loss(self.config).double()
        self.masks = build_mask_sampler(self.config, self.model.patch)

    def gradients(self, images: torch.Tensor, parts: int) -> dict[str, torch.Tensor]:
        """Accumulate the gradient of a batch over its parts."""
        shard = BatchShard(len(images), start=7 * len(images), parts=parts)
        for part in range(parts):
            positions = shard.positions(part)
            mask, weight = self.masks.at(positions)
            loss = compute_loss(self.model, self.criterion, images[positions % len(images)], mask, "fp32")
            (loss * weight).backward()
        result = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return result


@pytest.mark.parametrize("name", CONFIGS)
def test_accumulated_gradients_are_those_of_the_full_batch(name: str) -> None:
    values = {"size": "32", "batch_size": 8, "precision": "fp32", "device": "cpu"} | CONFIGS[name]
    setup = Setup(PretrainConfig(**values))
    images = torch.randn(8, 3, *setup.config.image_size, dtype=torch.float64)
    full = setup.gradients(images, 1)
    assert max(float(gradient.abs().max()) for gradient in full.values()) > 1e-4
    for parts in (2, 3, 8):
        for key, gradient in setup.gradients(images, parts).items():
            torch.testing.assert_close(gradient, full[key], rtol=1e-7, atol=1e-11, msg=f"{key} in {parts} parts")


def test_weights_of_parts_sum_to_one_if_masks_hide_different_numbers_of_patches() -> None:
    config = PretrainConfig(model=VIT, size="64", batch_size=8, device="cpu", mask=MaskConfig("beit-blocks", 0.4))
    masks, shard = build_mask_sampler(config, build_model(config).patch), BatchShard(8, start=24, parts=8)
    weights = [masks.at(shard.positions(part))[1] for part in range(8)]
    assert sum(weights) == pytest.approx(1) and len(set(weights)) > 1
    assert masks.at(np.arange(24, 32))[1] == 1
