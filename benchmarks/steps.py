"""What the benchmarks of a training step share: pixmim's step, other people's, and the products a model takes."""

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
"""Forward, backward and update for normalized images (b c h w)."""


class Ours:
    """pixmim's step as `pretrain` makes it: masks of (seed, step, row), forward, backward, update.

    method, backbone, size  of the model, with `options` of `create_model`; mask, distance and normalization are the
                            method's own
    target  what must be predicted; PixMIM's unless another is given
    mode    of torch.compile, for model and objective in one graph; None: not compiled
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
        self._updater = SyncFreeOptimizer(adamw(self.model, 1e-4, (0.9, 0.95), 0.05), None, precision == "fp16", device)
        plain = method == "simmim"
        target = target or pixmim.LowFrequency("auto")
        self._objective = pixmim.ReconstructionLoss(target, not plain, "l1" if plain else "mse").to(device)
        self._masker, self._grid = own_masker(method, self.model.patch), (size // self.model.patch,) * 2
        self._loss = self._whole if mode is None else torch.compile(self._whole, mode=mode, fullgraph=True)
        self._done = 0

    def __call__(self, images: Tensor) -> None:
        u = rng.uniform(0, "mask", self._done, range(len(images)), self._masker.num_uniforms(self._grid))
        mask = self._masker.sample(torch.from_numpy(u.astype(np.float32)), self._grid).to(self.device)
        self._updater.backward(self._loss(images, mask))
        self._updater.step(1e-4)
        self._done += 1

    def _whole(self, images: Tensor, mask: Mask) -> Tensor:
        with autocast(self.device, self.precision):
            prediction = self.model(images, mask)
        return self._objective(prediction, images, mask).loss


def own_masker(method: str, patch: int) -> MaskGenerator:
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
    """FLOP of the model's forward and backward for one image: three times the forward's products, which are counted.

    A multiplication and an addition are two. The target's products do not count: they are not the model's. Nothing is
    computed. The counter's own word on the backward pass of convolutions in groups is not taken: it leaves them whole.
    """
    with torch.device("meta"):
        model: MaskedModel = pixmim.create_model(method, backbone, img_size=size, **options)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", False)  # noqa: B010  # the counter knows products, not every fused kernel
    mask = own_masker(method, model.patch)(1, (size // model.patch,) * 2).to("meta")
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, size, size, device="meta"), mask)
    return 3 * counter.get_total_flops()
