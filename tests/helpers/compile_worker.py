"""Every model's step under torch.compile, in a process that pytest's run-time shape checks do not reach.

`aot_eager` traces forward and backward as a GPU's backend would and then runs torch's own kernels, so what it gives
must be what the step gives without it. A graph break is an error (fullgraph).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pixmim import (
    BeitBlockMask,
    BlockwiseRandomMask,
    ColorBins,
    LowFrequency,
    RandomMask,
    ReconstructionLoss,
    create_model,
    low_pass,
)
from pixmim.masking import MaskGenerator
from pixmim.training.parallelize import transformer_blocks
from pixmim.training.precision import autocast, choose_attention

CPU = torch.device("cpu")
VIT = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
THIN = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
BINS = {"decoder_stride": 2, "predict_patch": 16, "outputs": 4}
CONVMAE = {"embed_dim": (8, 8, 16), "depth": (1, 1, 1), "num_heads": 2}
SWIN = {"window_size": 4, "embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2)}

NORMALISED, ABSOLUTE = (
    ReconstructionLoss(LowFrequency("auto")),
    ReconstructionLoss(LowFrequency("auto", "paper-code"), False, "l1"),
)
COLOURS = ReconstructionLoss(ColorBins(4, LowFrequency("auto")), False, "cross_entropy")

CASES: dict[str, tuple[str, str, dict[str, Any], MaskGenerator, ReconstructionLoss]] = {
    "MAE": ("mae", "vit_tiny_patch16_224", VIT | THIN, RandomMask(), NORMALISED),
    "MAE of colors": ("mae", "vit_tiny_patch16_224", VIT | THIN | BINS, RandomMask(), COLOURS),
    "LSMAE": ("lsmae", "vit_tiny_patch16_224", VIT | THIN, BlockwiseRandomMask(0.75, 2), NORMALISED),
    "ConvMAE": ("convmae", "convmae_tiny", CONVMAE | THIN, RandomMask(), NORMALISED),
    "SimMIM on ViT": ("simmim", "vit_tiny_patch16_224", VIT, BlockwiseRandomMask(0.6, 2, whole_blocks=True), ABSOLUTE),
    "SimMIM on Beit": ("simmim", "beit_base_patch16_224", VIT, BeitBlockMask(0.4), ABSOLUTE),
    "SimMIM on Swin": (
        "simmim",
        "swin_tiny_patch4_window7_224",
        SWIN,
        BlockwiseRandomMask(0.6, 8, whole_blocks=True),
        ABSOLUTE,
    ),
}


def main() -> None:
    filter_is_constant()
    for name, case in CASES.items():
        torch.manual_seed(0)
        torch._dynamo.reset()
        check(*case)
        print(f"{name}: the whole step, and its blocks one by one", flush=True)


def check(
    method: str, backbone: str, options: dict[str, Any], masker: MaskGenerator, objective: ReconstructionLoss
) -> None:
    model = create_model(method, backbone, img_size=64, **options)
    choose_attention(model, CPU, "bf16")
    images, mask = torch.randn(2, 3, 64, 64), masker(2, (64 // model.patch, 64 // model.patch))

    def loss() -> Tensor:
        """As `pretrain` computes it."""
        with autocast(CPU, "bf16"):
            prediction = model(images, mask)
        return objective(prediction, images, mask).loss

    def outcome(step: Callable[[], Tensor]) -> dict[str, Tensor]:
        model.zero_grad()
        found = step()
        found.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {"the loss": found.detach(), **gradients}

    expected = outcome(loss)
    torch.testing.assert_close(outcome(torch.compile(loss, fullgraph=True, backend="aot_eager")), expected)
    for block in transformer_blocks(model):
        block.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    torch.testing.assert_close(outcome(loss), expected)


def filter_is_constant() -> None:
    """In the graph of the target stand products with a basis, and nothing that would make it anew in each step."""
    called: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph

    images = torch.rand(1, 3, 32, 32)
    found = torch.compile(lambda x: low_pass(x, "auto"), fullgraph=True, backend=backend)(images)
    assert torch.equal(found, low_pass(images, "auto"))
    products = [name for name in called if "matmul" in name]
    assert len(products) == 4 and not any("arange" in name or "cos" in name for name in called), called
