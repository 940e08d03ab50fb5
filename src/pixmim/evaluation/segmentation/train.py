"""Training of a head for segmentation, and of the encoder under it: resumed exactly, by the protocol's schedule."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from pixmim.build import seeded
from pixmim.data.bad_images import BadImageLog
from pixmim.data.loader import Batch, Loader
from pixmim.data.sampler import BatchShard
from pixmim.evaluation.frozen_encoder import FrozenEncoder, rebuild_at_size
from pixmim.evaluation.segmentation.augment import DISTORTIONS, JitteredCrop, distort
from pixmim.evaluation.segmentation.dataset import SegmentationDataset
from pixmim.evaluation.segmentation.heads import Segmenter, loss_of
from pixmim.evaluation.settings import SegmentationSettings
from pixmim.models.layer_decay import layer_ids
from pixmim.training.optim import SyncFreeOptimizer, layer_decay_param_groups
from pixmim.training.precision import autocast
from pixmim.training.trainer import Trainer
from pixmim.transforms.crops import flip_and_normalize
from pixmim.utils import rng
from pixmim.utils.errors import UserError


def build(encoder: FrozenEncoder, settings: SegmentationSettings, classes: int) -> tuple[Segmenter, tuple[int, int]]:
    """The encoder with a fresh head, on its device, and the size of its crops. Raises UserError."""
    frozen = settings.head == "linear" if settings.frozen is None else settings.frozen
    size = replace(encoder.config, size=settings.size).image_size
    module = rebuild_at_size(encoder, settings.size, **({} if frozen else {"drop_path_rate": settings.drop_path}))
    with seeded(settings.seed):
        try:
            model = Segmenter(module, settings.head, classes, settings.width, frozen)
        except TypeError as error:
            raise UserError(f"segmentation takes a ViT, Beit, Swin or ConvMAE: {error}") from error
    return model.to(encoder.device), size


def fit(
    model: Segmenter,
    encoder: FrozenEncoder,
    settings: SegmentationSettings,
    train: SegmentationDataset,
    size: tuple[int, int],
    *,
    folder: Path,
    skipped: BadImageLog,
    console: Console | None = None,
) -> None:
    """Train what is not frozen of a model; goes on from a checkpoint in `folder` if there is one. Raises UserError."""
    part = settings.batch_size // settings.accumulation_steps

    def open_loader(position: int) -> Loader:
        return Loader(
            train,
            JitteredCrop(size),
            BatchShard(part, position * part),
            skipped=skipped,
            seed=settings.seed,
            threads=settings.threads,
            device=encoder.device,
        )

    def compute_loss(batch: Batch, step: int) -> Tensor:
        x, masks = prepare(batch, encoder, settings.seed, step)
        # What dropout draws belongs to the update and the images, so that a resumed training draws the same.
        torch.manual_seed(int(rng.bits(settings.seed, "dropout", step, batch.indices[:1].numpy(), 1)[0, 0]))
        with autocast(encoder.device, encoder.precision):
            scores = model(x)
        return loss_of(scores, masks)

    model.train()
    optimizer = torch.optim.AdamW(groups(model, settings), lr=settings.rate, betas=(0.9, 0.999), fused=True)
    trainer = Trainer(
        model,
        SyncFreeOptimizer(optimizer, None, scaling=encoder.precision == "fp16", device=encoder.device),
        lambda step: rate(settings, step),
        settings.steps,
        folder,
        images=len(train),
        batch_size=settings.batch_size,
        accumulation_steps=settings.accumulation_steps,
        console=console,
    )
    trainer.resume_and_fit(open_loader, compute_loss)


def groups(model: Segmenter, settings: SegmentationSettings) -> list[dict[str, Any]]:
    """What is trained: each layer of the encoder at its share of the learning rate, and what is new at the whole."""
    ids = {f"encoder.{name}": layer for name, layer in layer_ids(model.encoder).items()}
    top = max(ids.values())
    found = {name: ids.get(name, top) for name, _ in model.named_parameters()}
    return layer_decay_param_groups(
        model, found, settings.layer_decay, settings.weight_decay, ("relative_position_bias_table",)
    )


def rate(settings: SegmentationSettings, step: int) -> float:
    """The learning rate of update `step`, counted from 0: a straight line to zero, times the warm-up's rise to one.

    Warm-up takes at most a fifth of the updates.
    """
    warmup = min(settings.warmup, settings.steps // 5)
    return settings.rate * (1 - step / settings.steps) * (min(1.0, (step + 1) / warmup) if warmup else 1.0)


def prepare(batch: Batch, encoder: FrozenEncoder, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Images (b c h w), their colors distorted, flipped and normalized, and their masks (b h w), on the device."""
    pairs, flip = (t.to(encoder.device, non_blocking=True) for t in (batch.images, batch.flip))
    images, masks = pairs[:, :-1], pairs[:, -1].to(torch.int64)
    masks = torch.where(flip.view(-1, 1, 1), masks.flip(-1), masks)
    if not images.is_floating_point():  # those have no known range
        u = rng.uniform(seed, "colors", step, batch.indices.numpy(), DISTORTIONS).astype(np.float32)
        images = distort(images.float() / torch.iinfo(images.dtype).max, torch.from_numpy(u).to(encoder.device))
    return flip_and_normalize(images, flip, encoder.mean, encoder.std), masks
