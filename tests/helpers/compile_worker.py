"""Compile the training step of every model, in a process without jaxtyping's run-time checks.

`aot_eager` traces forward and backward as a GPU backend would, and then runs eager kernels, so results must be equal to
those of the eager step. A graph break is an error (fullgraph).
"""

import gc
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
from pixmim.training.parallelize import recomputed, transformer_blocks
from pixmim.training.precision import Precision, autocast, choose_attention

CPU = torch.device("cpu")
VIT = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
THIN = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
BINS = {"decoder_stride": 2, "predict_patch": 16, "outputs": 4}
CONVMAE = {"embed_dim": (8, 8, 16), "depth": (1, 1, 1), "num_heads": 2}
CONVNEXT = {"depths": (1, 1, 1, 1)}
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
    "SimMIM on ConvNeXt": ("simmim", "convnext_atto", CONVNEXT, RandomMask(0.5), ABSOLUTE),
    "SimMIM on Swin": (
        "simmim",
        "swin_tiny_patch4_window7_224",
        SWIN,
        BlockwiseRandomMask(0.6, 8, whole_blocks=True),
        ABSOLUTE,
    ),
}


def main() -> None:
    gc.disable()  # a sixth of the time of tracing
    filter_is_constant()
    for name, case in CASES.items():
        torch.manual_seed(0)
        torch._dynamo.reset()
        step = Step(*case, CPU, "bf16")
        expected = step.loss_and_gradients(step.loss)
        full = torch.compile(step.loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(step.loss_and_gradients(full), expected)
        step.compile_blocks("eager")  # backward was traced with the step
        torch.testing.assert_close(step.loss_and_gradients(step.loss), expected)
        if name in ("MAE", "SimMIM on Swin"):
            recompute_in_compiled_blocks(Step(*case, CPU, "fp32"))
        print(f"{name}: compiled as one graph, and block by block", flush=True)


def recompute_in_compiled_blocks(step: "Step") -> None:
    torch._dynamo.reset()
    expected = step.loss_and_gradients(step.loss)
    for block in transformer_blocks(step.model):
        block.forward = recomputed(block.forward)
    step.compile_blocks("aot_eager")
    torch.testing.assert_close(step.loss_and_gradients(step.loss), expected)


def blocks_on_the_gpu() -> None:
    """Compile the blocks of every model as `pretrain` does on a GPU, and compare with the eager step in float32."""
    for name, case in CASES.items():
        torch.manual_seed(0)
        torch._dynamo.reset()
        step = Step(*case, torch.device("cuda"), "fp32")
        expected = step.loss_and_gradients(step.loss)
        step.compile_blocks("inductor")
        found = step.loss_and_gradients(step.loss)
        largest = max(float(value.abs().max()) for value in expected.values())
        for key, value in found.items():
            torch.testing.assert_close(value, expected[key], atol=1e-3 * largest, rtol=0)
        print(f"{name}: compiled block by block", flush=True)


class Step:
    """Loss and gradients of a model, as `pretrain` computes them."""

    def __init__(
        self,
        method: str,
        backbone: str,
        options: dict[str, Any],
        masks: MaskGenerator,
        objective: ReconstructionLoss,
        device: torch.device,
        precision: Precision,
    ) -> None:
        self.model = create_model(method, backbone, img_size=64, **options).to(device)
        choose_attention(self.model, device, precision)
        self.objective, self.device, self.precision = objective.to(device), device, precision
        grid = (64 // self.model.patch, 64 // self.model.patch)
        self.images, self.mask = torch.randn(2, 3, 64, 64).to(device), masks(2, grid).to(device)

    def loss(self) -> Tensor:
        with autocast(self.device, self.precision):
            prediction = self.model(self.images, self.mask)
        return self.objective(prediction, self.images, self.mask).loss

    def loss_and_gradients(self, compute: Callable[[], Tensor]) -> dict[str, Tensor]:
        self.model.zero_grad()
        value = compute()
        value.backward()
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        return {"loss": value.detach(), **gradients}

    def compile_blocks(self, backend: str) -> None:
        for block in transformer_blocks(self.model):
            block.compile(fullgraph=True, dynamic=False, backend=backend)


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
