"""Shared by benchmarks of a training step: steps of pixmim and of others, and the FLOP of a model."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pixmim
from pixmim.masking import Mask, MaskGenerator
from pixmim.models.base import MaskedModel
from pixmim.training.optim import SyncFreeOptimizer, adamw
from pixmim.training.precision import autocast, choose_attention
from pixmim.utils import rng

Step = Callable[[Tensor], None]
"""Forward, backward and optimizer step for normalized images (b c h w)."""


class Ours:
    """The step of `pretrain`: masks of (seed, step, row), forward, backward, optimizer.

    Args:
        method: Method, whose own mask, distance and normalization are used.
        backbone: Backbone of the method.
        size: Side of the images in pixels.
        precision: Precision of the autocast.
        device: Device.
        target: Target of the loss; PixMIM's by default.
        mode: Mode of torch.compile for model and loss in one graph; None: not compiled.
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
        mode: str | None = None,
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
        self._generator, self._grid = own_mask_generator(method, self.model.patch), (size // self.model.patch,) * 2
        self._loss = self._eager_loss if mode is None else torch.compile(self._eager_loss, mode=mode, fullgraph=True)
        self._steps = 0

    def __call__(self, images: Tensor) -> None:
        u = rng.uniform(0, "mask", self._steps, range(len(images)), self._generator.num_uniforms(self._grid))
        mask = self._generator.sample(torch.from_numpy(u.astype(np.float32)), self._grid).to(self.device)
        self._optimizer.backward(self._loss(images, mask))
        self._optimizer.step(1e-4)
        self._steps += 1

    def _eager_loss(self, images: Tensor, mask: Mask) -> Tensor:
        with autocast(self.device, self.precision):
            prediction = self.model(images, mask)
        return self._reconstruction_loss(prediction, images, mask).loss


def own_mask_generator(method: str, patch: int) -> MaskGenerator:
    """The mask that a method was published with; units are of 32 pixels."""
    unit = max(1, 32 // patch)
    if method == "simmim":
        return pixmim.BlockwiseRandomMask(0.6, unit, whole_blocks=True)
    return pixmim.BlockwiseRandomMask(0.75, unit) if method == "lsmae" else pixmim.RandomMask(0.75)


def theirs(model: nn.Module, precision: Any, device: torch.device, mode: str | None = None) -> Step:
    """A step as their documentation shows it: torch's AdamW as it comes, under autocast if in half precision.

    model  gives its loss for images, or something that has one
    """
    model.to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    called = model if mode is None else torch.compile(model, mode=mode)

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
    """transformers' ViTMAE with norm_pix; decoder: (width, depth, heads)."""
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


def training_flops(method: str, backbone: str, size: int, **options: Any) -> int:
    """Return the FLOP of the model's forward and backward pass for one image: three times the forward products.

    A multiplication and an addition are two. The target does not count. Nothing is computed. The backward pass is not
    counted itself, because FlopCounterMode ignores the groups of convolutions there.
    """
    with torch.device("meta"):
        model: MaskedModel = pixmim.create_model(method, backbone, img_size=size, **options)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", False)  # noqa: B010  # the counter knows products, not every fused kernel
    mask = own_mask_generator(method, model.patch)(1, (size // model.patch,) * 2).to("meta")
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size, device="meta"), mask)
    return 3 * counter.get_total_flops()
