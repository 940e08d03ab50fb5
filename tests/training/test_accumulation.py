"""A batch in parts: the same update as the batch as a whole, for every family of models, target and mask."""

from typing import Any

import numpy as np
import pytest
import torch

from helpers.models import MAE, OTHERS, THIN
from pixmim.config import ArchitectureConfig, MaskConfig, PretrainConfig, TargetConfig
from pixmim.data.sampler import BatchShard
from pixmim.method import Method
from pixmim.pretraining import _parts
from pixmim.training.distributed import SINGLE_PROCESS
from pixmim.training.optim import SyncFreeOptimizer

VIT, SWIN = OTHERS["vit"][0], OTHERS["swin"][0]
LSMAE = ArchitectureConfig(
    "lsmae", "vit_tiny_patch16_224", **THIN, decoder_stride=2, predict_patch=16, options=MAE.options
)
BINS = TargetConfig(distance="cross_entropy", normalize_patches=False)
RUNS: dict[str, dict[str, Any]] = {
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
    "vit, cut units": {"model": VIT, "size": "40", "mask": MaskConfig("blocks", 0.6, 16, True), "target": BINS},
}


def gradients(method: Method, images: torch.Tensor, parts: int) -> dict[str, torch.Tensor]:
    shard = BatchShard(len(images), start=7 * len(images), parts=parts)
    for part in range(parts):
        positions = shard.positions(part)
        mask, weight = method.masks.at(positions)
        (method.loss(method.model, images[positions % len(images)], mask) * weight).backward()
    found = {name: p.grad for name, p in method.model.named_parameters() if p.grad is not None}
    method.model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("name", RUNS)
def test_parts_make_the_update_of_the_batch(name: str) -> None:
    values = {"size": "32", "batch_size": 8, "precision": "fp32", "device": "cpu"} | RUNS[name]
    method = Method.of(PretrainConfig(**values))
    method.model.double(), method.objective.double()
    images = torch.randn(8, 3, *method.config.image_size, dtype=torch.float64)
    whole = gradients(method, images, 1)
    assert max(float(gradient.abs().max()) for gradient in whole.values()) > 1e-4
    for parts in (2, 3, 8):
        for key, gradient in gradients(method, images, parts).items():
            torch.testing.assert_close(gradient, whole[key], rtol=1e-7, atol=1e-11, msg=f"{key} in {parts} parts")


def test_shares_of_a_batch_sum_to_one_where_masks_differ() -> None:
    method = Method.of(
        PretrainConfig(model=VIT, size="64", batch_size=8, device="cpu", mask=MaskConfig("beit-blocks", 0.4))
    )
    shard = BatchShard(8, start=24, parts=8)
    weights = [method.masks.at(shard.positions(part))[1] for part in range(8)]
    assert sum(weights) == pytest.approx(1) and len(set(weights)) > 1
    assert method.masks.at(np.arange(24, 32))[1] == 1


@pytest.mark.parametrize(("batch", "fitting", "parts"), [(64, 64, 1), (64, 40, 2), (64, 9, 8), (50, 12, 8)])
def test_a_device_that_runs_out_of_memory_gets_parts_that_fit(batch: int, fitting: int, parts: int) -> None:
    """Halves of 50 are 25, 13 and 7 images; eight parts of 7 and 6 are computed."""
    weight = torch.nn.Parameter(torch.ones(1))

    def loss(network: object, images: torch.Tensor, mask: range) -> torch.Tensor:
        assert len(images) == len(mask)
        if len(images) > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return weight.sum()

    model = torch.nn.ParameterList([weight])
    method = object.__new__(Method)
    vars(method).update(device=torch.device("meta"), model=model, loss=loss, masks=lambda step, rows: rows)
    updater = SyncFreeOptimizer(torch.optim.AdamW([weight]), None, scaling=False, device=torch.device("cpu"))
    run = PretrainConfig(batch_size=batch, size="32")
    assert _parts(run, method, model, updater, SINGLE_PROCESS, None) == parts
    assert BatchShard(batch, parts=parts).local_batch_size <= fitting and weight.grad is None
    assert (
        _parts(
            PretrainConfig(batch_size=batch, size="32", accumulation_steps=5),
            method,
            model,
            updater,
            SINGLE_PROCESS,
            None,
        )
        == 5
    )
