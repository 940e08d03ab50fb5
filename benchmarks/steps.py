"""Build training steps of pixmim and of peers, and count the FLOP of a model: shared by the benchmarks of steps."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pixmim
from pixmim.masking import Mask, MaskGenerator, MaskSampler
from pixmim.models.base import MaskedModel
from pixmim.training.optim import SyncFreeOptimizer, adamw
from pixmim.training.parallelize import transformer_blocks
from pixmim.training.precision import autocast, choose_attention

Step = Callable[[Tensor], None]
"""Forward, backward and optimizer step for normalized images (b c h w)."""

Compile = Literal["none", "blocks", "full", "graphs"]
"""What is compiled: nothing, each transformer block, model and loss, or these as CUDA graphs."""

COMPILE = get_args(Compile)


class Ours:
    """The step of `pretrain`: masks of (seed, step, row), forward, loss, backward, optimizer.

    Args:
        method: Method, whose own mask, distance and normalization are used.
        backbone: Backbone of the method.
        size: Side of the images in pixels.
        precision: Precision of the autocast.
        device: Device.
        target: Target of the loss; PixMIM's by default.
        compile: What is compiled.
        backend: Compiler.
        mask: Mask; the method's own by default.
        **options: Options of `create_model`.
    """

    def __init__(
        self,
        method: str,
        backbone: str,
        size: int,
        precision: Any,
        device: torch.device,
        target: nn.Module | None = None,
        compile: Compile = "none",
        backend: str = "inductor",
        mask: MaskGenerator | None = None,
        **options: Any,
    ) -> None:
        self.model = pixmim.create_model(method, backbone, img_size=size, **options).to(device)
        self.precision, self.device = precision, device
        choose_attention(self.model, device, precision)
        optimizer = adamw(self.model, 1e-4, (0.9, 0.95), 0.05)
        self._optimizer = SyncFreeOptimizer(optimizer, None, precision == "fp16", device)
        plain = method == "simmim"
        target = target or pixmim.LowFrequency("auto")
        self._reconstruction_loss = pixmim.ReconstructionLoss(target, not plain, "l1" if plain else "mse").to(device)
        patch = self.model.patch
        self._masks = MaskSampler(mask or own_mask_generator(method, patch), (size // patch,) * 2, 0, 1)
        self._loss = compiled(self._eager_loss, self.model, compile, backend)
        self._steps = 0

    def __call__(self, images: Tensor) -> None:
        loss = self._loss(images, self.masks(len(images)).to(self.device))
        self.backward(loss)
        self.update()

    def masks(self, count: int) -> Mask:
        """Sample the masks of a step, which the loader's threads do in `pretrain`."""
        return self._masks(self._steps, range(count))

    def predict(self, images: Tensor, mask: Mask) -> Tensor:
        with autocast(self.device, self.precision):
            return self.model(images, mask)

    def loss(self, prediction: Tensor, images: Tensor, mask: Mask) -> Tensor:
        return self._reconstruction_loss(prediction, images, mask).loss

    def backward(self, loss: Tensor) -> None:
        self._optimizer.backward(loss)

    def update(self) -> None:
        self._optimizer.step(1e-4)
        self._steps += 1

    def _eager_loss(self, images: Tensor, mask: Mask) -> Tensor:
        return self.loss(self.predict(images, mask), images, mask)


def compiled(function: Callable[..., Any], model: nn.Module, what: Compile, backend: str) -> Callable[..., Any]:
    """Compile a function of the model, or the blocks of the model in place. Forgets what was compiled before."""
    torch._dynamo.reset()
    if what == "blocks":
        for block in transformer_blocks(model):
            block.compile(fullgraph=True, dynamic=False, backend=backend)
    if what in ("none", "blocks"):
        return function
    mode = "reduce-overhead" if what == "graphs" and backend == "inductor" else None
    return torch.compile(function, dynamic=False, mode=mode, backend=backend)


def own_mask_generator(method: str, patch: int) -> MaskGenerator:
    """Return the mask that a method was published with: blocks of 32 pixels, in Pixio of 64."""
    unit = max(1, 32 // patch)
    if method == "simmim":
        return pixmim.BlockwiseRandomMask(0.6, unit, whole_blocks=True)
    if method == "pixio":
        return pixmim.BlockwiseRandomMask(0.75, 2 * unit)
    return pixmim.BlockwiseRandomMask(0.75, unit) if method == "lsmae" else pixmim.RandomMask(0.75)


def theirs(
    model: nn.Module, precision: Any, device: torch.device, compile: Compile = "none", backend: str = "inductor"
) -> Step:
    """Return a step as their documentation shows it: torch's AdamW with its defaults, under autocast.

    `model` returns the loss of images, or an output with an attribute `loss`.
    """
    model.to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    called = compiled(model, model, compile, backend)

    def step(images: Tensor) -> None:
        with autocast(device, precision):
            found = called(images)
        (found if isinstance(found, Tensor) else found.loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def huggingface_mae(
    size: int, patch: int, width: int, depth: int, heads: int, decoder: tuple[int, int, int]
) -> nn.Module:
    """Build the ViTMAE of transformers with norm_pix_loss; decoder: (width, depth, heads)."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    return ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=size,
            patch_size=patch,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            decoder_hidden_size=decoder[0],
            decoder_num_hidden_layers=decoder[1],
            decoder_num_attention_heads=decoder[2],
            decoder_intermediate_size=4 * decoder[0],
            norm_pix_loss=True,
        )
    )


def memory(step: Step, model: nn.Module, images: Tensor) -> int:
    """Return the peak bytes of a step on a GPU: weights, moments, and the step's own memory."""
    kept = sum(p.numel() * p.element_size() * (3 if p.requires_grad else 1) for p in model.parameters())
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(images)
    return kept + torch.cuda.max_memory_allocated() - before


def training_flops(method: str, backbone: str, size: int, mask: MaskGenerator | None = None, **options: Any) -> int:
    """Return the FLOP of the model's forward and backward pass for one image: three times the forward products.

    A multiplication and an addition are two. The target does not count. Nothing is computed. The backward pass is not
    counted itself, because FlopCounterMode ignores the groups of convolutions there.
    """
    with torch.device("meta"):
        model: MaskedModel = pixmim.create_model(method, backbone, img_size=size, **options)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", False)  # noqa: B010  # the counter knows products, not every fused kernel
    generator, grid = mask or own_mask_generator(method, model.patch), (size // model.patch,) * 2
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size, device="meta"), generator(1, grid).to("meta"))
    return 3 * counter.get_total_flops()
