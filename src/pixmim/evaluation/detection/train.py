"""Training a detector on an encoder: ViTDet's recipe, resumed exactly."""

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection import FasterRCNN

from pixmim.build import seeded
from pixmim.data.sampler import BatchShard
from pixmim.evaluation.context import EvalContext
from pixmim.evaluation.detection.backbone import build_maps
from pixmim.evaluation.detection.dataset import Annotated
from pixmim.evaluation.detection.detector import build_detector, losses
from pixmim.evaluation.detection.loader import DetectionBatch, DetectionLoader
from pixmim.evaluation.frozen_encoder import FrozenEncoder, rebuild_at_size
from pixmim.evaluation.settings import DetectionSettings
from pixmim.models.layer_decay import layer_ids
from pixmim.training.find_batch_size import equal_parts
from pixmim.training.optim import SyncFreeOptimizer, layer_decay_param_groups
from pixmim.training.trainer import Trainer
from pixmim.transforms.crops import flip_and_normalize
from pixmim.utils import rng

_ENCODER = "backbone.module.encoder."
_POSITIONS = "backbone.module.windowed.positions."


def trained(context: EvalContext, settings: DetectionSettings, train: Annotated, masks: bool) -> FasterRCNN:
    """A detector fine-tuned on annotated images; unfinished training is gone on with."""
    encoder = context.encoder
    model = build(encoder, settings, len(train.classes), masks).train()
    width = int(encoder.module.num_features)  # type: ignore[arg-type]
    parts = equal_parts(settings.batch_size, settings.accumulation_steps, encoder.device, (settings.size,) * 2, width)
    part = settings.batch_size // parts
    steps = settings.steps or max(1, round(settings.epochs * len(train.images) / settings.batch_size))
    groups = layer_decay_param_groups(model, layers(model), settings.layer_decay, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.999), fused=True)

    def open_loader(first: int) -> DetectionLoader:
        return DetectionLoader(
            train,
            BatchShard(part, first * part),
            skipped=context.skipped(train.images),
            size=settings.size,
            scale=settings.jitter,
            instances=masks,
            fill=encoder.mean.tolist(),
            seed=settings.seed,
            threads=settings.threads,
        )

    def compute_loss(batch: DetectionBatch, number: int) -> Tensor:
        # torchvision draws regions, and timm's drop path rows, from the global generator.
        torch.manual_seed(int(rng.bits(settings.seed, "detection", 0, [number], 1)[0, 0] >> np.uint64(1)))
        images = flip_and_normalize(batch.images.to(encoder.device), None, encoder.mean, encoder.std)
        targets = [{key: value.to(encoder.device) for key, value in target.items()} for target in batch.targets]
        return torch.stack(list(losses(model, images, targets).values())).sum()

    trainer = Trainer(
        model,
        SyncFreeOptimizer(optimizer, None, scaling=encoder.precision == "fp16", device=encoder.device),
        lambda step: rate(settings, step, steps),
        steps,
        context.work_dir("detection", settings),
        images=len(train.images),
        batch_size=settings.batch_size,
        accumulation_steps=parts,
        console=context.console,
    )
    trainer.resume_and_fit(open_loader, compute_loss)
    return model


def build(encoder: FrozenEncoder, settings: DetectionSettings, classes: int, masks: bool) -> FasterRCNN:
    """The detector as it is before training: a function of the encoder, the settings and their seed."""
    with seeded(settings.seed):
        module = rebuild_at_size(encoder, str(settings.size), drop_path_rate=settings.drop_path)
        maps = build_maps(module, settings.width, settings.window, settings.global_blocks, settings.relative_positions)
        return build_detector(maps, classes, masks, settings.regions, encoder.device, encoder.precision)


def rate(settings: DetectionSettings, step: int, steps: int) -> float:
    """The learning rate of an update: linear warm-up from a thousandth, then a tenth less from each drop on."""
    warmup = min(settings.warmup, steps // 5)
    if step < warmup:
        return settings.lr * (0.001 + 0.999 * step / warmup)
    return settings.lr * 0.1 ** sum(step >= share * steps for share in settings.drops)


def layers(model: FasterRCNN) -> dict[str, int]:
    """The layer of each parameter of a detector, by name: the encoder's own, and its topmost for all that stands on it.

    A block's relative positions count as the block's.
    """
    ids = layer_ids(model.backbone.module.encoder)
    found = dict.fromkeys((name for name, _ in model.named_parameters()), max(ids.values()))
    found |= {_ENCODER + name: layer for name, layer in ids.items()}
    for name in found:
        if name.startswith(_POSITIONS):
            found[name] = int(name.removeprefix(_POSITIONS).split(".")[0]) + 1
    return found
