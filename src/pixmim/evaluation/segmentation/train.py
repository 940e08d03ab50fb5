"""Train a segmentation model: crops and colors of MMSegmentation, the schedule of MAE, bitwise resume."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Shaped
from rich.console import Console
from torch import Tensor

from pixmim.data.bad_images import BadImageLog
from pixmim.data.loader import Batch, Loader
from pixmim.data.sampler import BatchShard
from pixmim.evaluation.frozen_encoder import FrozenEncoder, rebuild_at_size
from pixmim.evaluation.segmentation.dataset import IGNORE, SegmentationDataset
from pixmim.evaluation.segmentation.model import Segmenter, segmentation_loss
from pixmim.evaluation.settings import SegmentationSettings
from pixmim.models.layer_decay import layer_ids
from pixmim.training.optim import SyncFreeOptimizer, layer_decay_param_groups
from pixmim.training.precision import autocast
from pixmim.training.trainer import Trainer
from pixmim.transforms.crops import Array, Crop, cover_size, flip_and_normalize, resize
from pixmim.utils import rng
from pixmim.utils.errors import UserError
from pixmim.utils.initialization import seeded

_TRIES = 10
COLOR_UNIFORMS = 9
"""Uniform numbers that `distort_colors` takes per image."""


def build(encoder: FrozenEncoder, settings: SegmentationSettings, classes: int) -> tuple[Segmenter, tuple[int, int]]:
    """Return the encoder with a random head, on its device, and the (h, w) of its crops. Raises UserError."""
    frozen = settings.head == "linear" if settings.frozen is None else settings.frozen
    size = replace(encoder.config, size=settings.size).image_size
    module = rebuild_at_size(encoder, settings.size, **({} if frozen else {"drop_path_rate": settings.drop_path}))
    with seeded(settings.seed):
        try:
            model = Segmenter(module, settings.head, classes, settings.width, frozen)
        except TypeError as error:
            raise UserError(f"segmentation needs a ViT, Beit, Swin, CNN or ConvMAE: {error}") from error
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
    """Train the parameters of a model that are not frozen. Resumes from a checkpoint in `folder`. Raises UserError."""
    part = settings.batch_size // settings.accumulation_steps

    def open_loader(position: int) -> Loader:
        shard, crop = BatchShard(part, position * part), JitteredCrop(size)
        options: dict[str, Any] = {"seed": settings.seed, "threads": settings.threads, "device": encoder.device}
        return Loader(train, crop, shard, skipped=skipped, **options)

    def compute_loss(batch: Batch, step: int) -> Tensor:
        x, masks = prepare_batch(batch, encoder, settings.seed, step)
        # Dropout must depend on the step and the images only, so that a resumed training draws the same.
        torch.manual_seed(int(rng.bits(settings.seed, "dropout", step, batch.indices[:1].numpy(), 1)[0, 0]))
        with autocast(encoder.device, encoder.precision):
            scores = model(x)
        return segmentation_loss(scores, masks)

    model.train()
    optimizer = torch.optim.AdamW(_param_groups(model, settings), lr=settings.rate, betas=(0.9, 0.999), fused=True)
    trainer = Trainer(
        model,
        SyncFreeOptimizer(optimizer, None, scaling=encoder.precision == "fp16", device=encoder.device),
        lambda step: learning_rate(settings, step),
        settings.steps,
        folder,
        images=len(train),
        batch_size=settings.batch_size,
        accumulation_steps=settings.accumulation_steps,
        console=console,
    )
    trainer.resume_and_fit(open_loader, compute_loss)


def _param_groups(model: Segmenter, settings: SegmentationSettings) -> list[dict[str, Any]]:
    """Return parameter groups with layer-wise learning rates; the head has the full rate."""
    ids = {f"encoder.{name}": layer for name, layer in layer_ids(model.encoder).items()}
    layers = {name: ids.get(name, max(ids.values())) for name, _ in model.named_parameters()}
    return layer_decay_param_groups(
        model, layers, settings.layer_decay, settings.weight_decay, ("relative_position_bias_table",)
    )


def learning_rate(settings: SegmentationSettings, step: int) -> float:
    """Return the rate of a step: linear decay to zero, times a warm-up of at most a fifth of the steps."""
    warmup = min(settings.warmup, settings.steps // 5)
    return settings.rate * (1 - step / settings.steps) * (min(1.0, (step + 1) / warmup) if warmup else 1.0)


def prepare_batch(batch: Batch, encoder: FrozenEncoder, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Return images (b c h w) with distorted colors, flipped and normalized, and their masks (b h w), on the device."""
    pairs, flip = (t.to(encoder.device, non_blocking=True) for t in (batch.images, batch.flip))
    images, masks = pairs[:, :-1], pairs[:, -1].to(torch.int64)
    masks = torch.where(flip.view(-1, 1, 1), masks.flip(-1), masks)
    if not images.is_floating_point():  # floating point images have no known range
        u = rng.uniform(seed, "colors", step, batch.indices.numpy(), COLOR_UNIFORMS).astype(np.float32)
        scaled = images.float() / torch.iinfo(images.dtype).max
        images = distort_colors(scaled, torch.from_numpy(u).to(encoder.device))
    return flip_and_normalize(images, flip, encoder.mean, encoder.std), masks


@dataclass(frozen=True)
class JitteredCrop(Crop):
    """MMSegmentation's crop for ADE20K, of an image whose last channel is its mask.

    Resize the image to cover `size` times a random scale, aspect kept, and crop `size` at a random position: the first
    of ten in which the most frequent class has less than `max_share` of the labeled pixels. An image smaller than
    the crop is continued by mirroring, which the mask ignores.
    """

    size: tuple[int, int]  # (h, w) of the result in pixels
    scale: tuple[float, float] = (0.5, 2.0)  # range of the scale
    max_share: float = 0.75  # share of the most frequent class, in [0, 1]

    @property
    def num_uniforms(self) -> int:
        return 1 + 2 * _TRIES

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    def crop_into(self, image: Shaped[Array, "h w c"], u: Sequence[float], out: Shaped[Array, "h2 w2 c"]) -> None:
        factor = self.scale[0] + u[0] * (self.scale[1] - self.scale[0])
        target = max(1, round(self.size[0] * factor)), max(1, round(self.size[1] * factor))
        pixels = resize(image[..., :-1], cover_size(image.shape[:2], target), "bilinear")
        mask = resize_nearest(image[..., -1], pixels.shape[:2])
        (height, width), (h, w) = mask.shape, self.size
        for k in range(_TRIES):
            top, left = int(u[1 + 2 * k] * (max(0, height - h) + 1)), int(u[2 + 2 * k] * (max(0, width - w) + 1))
            part = mask[top : top + h, left : left + w]
            if self._is_mixed(part):
                break
        rows, columns = symmetric_indices(top, h, height), symmetric_indices(left, w, width)
        out[..., :-1] = pixels[rows[:, None], columns]
        out[..., -1] = IGNORE
        out[: part.shape[0], : part.shape[1], -1] = part

    def _is_mixed(self, mask: npt.NDArray[np.generic]) -> bool:
        counts = np.bincount(mask.ravel().astype(np.uint8), minlength=IGNORE + 1)[:IGNORE]
        return bool(np.count_nonzero(counts) > 1 and counts.max() < self.max_share * counts.sum())


def resize_nearest(mask: npt.NDArray[np.generic], size: tuple[int, int]) -> npt.NDArray[np.generic]:
    """Resize a mask (h w); equals torch's "nearest-exact"."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64) for old, new in zip(mask.shape, size, strict=True)
    )
    return mask[rows[:, None], columns]


def symmetric_indices(start: int, count: int, length: int) -> npt.NDArray[np.int64]:
    """Return the pixels at `count` positions from `start` of an axis that is continued by numpy's "symmetric"."""
    positions = np.arange(start, start + count) % (2 * length)
    return np.minimum(positions, 2 * length - 1 - positions)


def distort_colors(images: Float[Tensor, "b c h w"], u: Float[Tensor, "b n"]) -> Float[Tensor, "b c h w"]:
    """Apply MMSegmentation's photometric distortion to images with values in [0, 1], by 9 uniform numbers per image.

    Each of these is applied with probability 0.5: brightness plus up to 32/255 in either direction; contrast times 0.5
    to 1.5, before or after the others; for color images saturation times 0.5 to 1.5, and hue shifted by up to a tenth
    of the circle.
    """
    b_on, b, c_on, c, late, s_on, s, h_on, h = (v.view(-1, 1, 1, 1) for v in u.unbind(1))
    one = torch.ones_like(b)
    contrast, early = torch.where(c_on < 0.5, 0.5 + c, one), late < 0.5
    x = (images + torch.where(b_on < 0.5, (2 * b - 1) * 32 / 255, 0 * one)).clamp(0, 1)
    x = (x * torch.where(early, contrast, one)).clamp(0, 1)
    if images.shape[1] == 3:
        shift = torch.where(h_on < 0.5, (2 * h - 1) / 10, 0 * one)
        x = _adjust_saturation_and_hue(x, torch.where(s_on < 0.5, 0.5 + s, one), shift)
    return (x * torch.where(early, one, contrast)).clamp(0, 1)


def _adjust_saturation_and_hue(x: Float[Tensor, "b 3 h w"], factor: Tensor, shift: Tensor) -> Float[Tensor, "b 3 h w"]:
    """Multiply the saturation by `factor` and shift the hue by a fraction of the circle, each (b 1 1 1)."""
    value, strongest = x.max(dim=1, keepdim=True)
    range_ = value - x.amin(dim=1, keepdim=True)
    saturation = range_ / value.clamp(min=1e-8)
    # Hue in sixths of the circle: that of the strongest channel, moved towards the larger of the other two.
    red, green, blue = x.split(1, dim=1)
    differences = torch.cat([green - blue, blue - red, red - green], dim=1)
    hue = 2 * strongest + differences.gather(1, strongest) / range_.clamp(min=1e-8) + 6 * shift
    chroma = value * (saturation * factor).clamp(max=1)
    # Each channel has its full value around its own hue (0, 2, 4), and falls to value - chroma on the opposite side.
    own = torch.tensor([0.0, 2.0, 4.0], device=x.device).view(1, 3, 1, 1)
    distance = ((hue - own + 3) % 6 - 3).abs()
    return value - chroma * (distance - 1).clamp(0, 1)
