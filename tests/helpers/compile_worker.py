"""Compile the training step of every model, in a process without jaxtyping's run-time checks.

`aot_eager` traces forward and backward as a GPU backend would, and then runs eager kernels, so results must be equal to
those of the eager step. A graph break is an error (fullgraph).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pixmim import (
    BeitBlockMask,
    BlockwiseRandomMask,
    ColorBins,
    GreenNoiseMask,
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

NORMALIZED, ABSOLUTE = (
    ReconstructionLoss(LowFrequency("auto")),
    ReconstructionLoss(LowFrequency("auto", "paper-code"), False, "l1"),
)
COLORS = ReconstructionLoss(ColorBins(4, LowFrequency("auto")), False, "cross_entropy")

CASES: dict[str, tuple[str, str, dict[str, Any], MaskGenerator, ReconstructionLoss]] = {
    "MAE": ("mae", "vit_tiny_patch16_224", VIT | THIN, RandomMask(), NORMALIZED),
    "LSMAE of colors": ("lsmae", "vit_tiny_patch16_224", VIT | THIN | BINS, BlockwiseRandomMask(0.75, 2), COLORS),
    "MFF": ("mff", "vit_tiny_patch16_224", VIT | THIN | {"depth": 3}, GreenNoiseMask(), NORMALIZED),
    "Pixio": ("pixio", "vit_tiny_patch16_224", VIT | THIN, BlockwiseRandomMask(0.75, 4), NORMALIZED),
    "CrossMAE": ("crossmae", "vit_tiny_patch16_224", VIT | THIN | {"decoder_depth": 2}, RandomMask(), NORMALIZED),
    "ConvMAE": ("convmae", "convmae_tiny", CONVMAE | THIN, RandomMask(), NORMALIZED),
    "SimMIM on ViT": ("simmim", "vit_tiny_patch16_224", VIT, BlockwiseRandomMask(0.6, 2, whole_blocks=True), ABSOLUTE),
    "SimMIM on Beit": ("simmim", "beit_base_patch16_224", VIT, BeitBlockMask(0.4), ABSOLUTE),
    "SimMIM on ResNet": ("simmim", "resnet10t", {}, RandomMask(0.5), ABSOLUTE),
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
        print(f"{name}: compiled as one graph, and block by block", flush=True)


def check(
    method: str, backbone: str, options: dict[str, Any], masks: MaskGenerator, objective: ReconstructionLoss
) -> None:
    model = create_model(method, backbone, img_size=64, **options)
    choose_attention(model, CPU, "bf16")
    images, mask = torch.randn(2, 3, 64, 64), masks(2, (64 // model.patch, 64 // model.patch))

    def loss() -> Tensor:
        """Compute the loss as `pretrain` does."""
        with autocast(CPU, "bf16"):
            prediction = model(images, mask)
        return objective(prediction, images, mask).loss

    def loss_and_gradients(step: Callable[[], Tensor]) -> dict[str, Tensor]:
        model.zero_grad()
        value = step()
        value.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {"loss": value.detach(), **gradients}

    expected = loss_and_gradients(loss)
    torch.testing.assert_close(loss_and_gradients(torch.compile(loss, fullgraph=True, backend="aot_eager")), expected)
    for block in transformer_blocks(model):
        block.compile(fullgraph=True, dynamic=False, backend="eager")  # backward was traced with the step
    torch.testing.assert_close(loss_and_gradients(loss), expected)


def filter_is_constant() -> None:
    """Check that the compiled target multiplies by a basis without recomputing it in each step."""
    called: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph

    images = torch.rand(1, 3, 32, 32)
    filtered = torch.compile(lambda x: low_pass(x, "auto"), fullgraph=True, backend=backend)(images)
    assert torch.equal(filtered, low_pass(images, "auto"))
    products = [name for name in called if "matmul" in name]
    assert len(products) == 4 and not any("arange" in name or "cos" in name for name in called), called
