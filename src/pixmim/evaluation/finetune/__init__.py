"""Fine-tuning: train the complete encoder with labels, by the published recipe of its method.

The classifier is saved with the results, as a timm folder with its classes in the metadata.
"""

import json
import os
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pixmim.config import ModelConfig
from pixmim.data.dataset import ImageDataset
from pixmim.data.loader import Batch, Loader
from pixmim.data.sampler import BatchShard
from pixmim.evaluation.classification import LabeledSplits, evaluate_classifier, open_labeled, shortened_list
from pixmim.evaluation.context import EvalContext, Values, checked_once, describe_labels, discard
from pixmim.evaluation.finetune.model import build, classifier_config, load_encoder_weights
from pixmim.evaluation.finetune.recipes import FINETUNE_RECIPES, Recipe, apply_overrides, choose, describe
from pixmim.evaluation.frozen_encoder import FrozenEncoder, fingerprint
from pixmim.evaluation.settings import FinetuneSettings
from pixmim.models.layer_decay import layer_ids, not_decayed
from pixmim.training.find_batch_size import equal_parts
from pixmim.training.optim import LAMB, Schedule, SyncFreeOptimizer, layer_decay_param_groups
from pixmim.training.parallelize import batch_norms
from pixmim.training.precision import autocast, choose_attention
from pixmim.training.trainer import Trainer
from pixmim.transforms.augment import augmented
from pixmim.transforms.crops import RandomResizedCrop, SimpleResizedCrop
from pixmim.transforms.mixup import erase, mix, soft_labels
from pixmim.utils import rng
from pixmim.utils.errors import UserError
from pixmim.utils.files import parse_json
from pixmim.utils.trust import inside
from pixmim.weights.detect import read_weights
from pixmim.weights.load import build_encoder_with_weights
from pixmim.weights.safe_load import read
from pixmim.weights.save import save_encoder

_METADATA_KEY = "finetune"  # metadata key of a classifier's file for the settings that determine its weights, as JSON


@dataclass(frozen=True)
class FinetunePlan:
    """A checked fine-tuning."""

    data: LabeledSplits
    name: str
    recipe: Recipe  # the recipe with overrides
    settings: FinetuneSettings  # settings, with the resolved number of accumulation steps
    config: ModelConfig  # configuration that builds the classifier
    folder: Path  # folder of the classifier
    work: Path  # folder of unfinished work
    # settings that determine the weights, by flag; saved with them, so that they are not mistaken for the result of
    # other settings
    provenance: dict[str, Any]
    finished: bool  # True if `folder` holds the finished classifier of these settings


@checked_once
def check_finetune(context: EvalContext, settings: FinetuneSettings) -> FinetunePlan:
    """Check data, settings, encoder and the classifier's folder without training. Raises UserError."""
    encoder, data = context.encoder, open_labeled(context, settings.train, settings.test)
    name = choose(settings.recipe, encoder.config, encoder.module, settings.from_scratch)
    recipe = apply_overrides(FINETUNE_RECIPES[name], settings.changes)
    if data.train.image_spec.dtype != "uint8" and (recipe.augment != "none" or recipe.jitter):
        raise UserError("only 8-bit images can be augmented: pass --augment none --jitter 0")
    config = classifier_config(encoder.config, encoder.module, len(data.classes), recipe.pool, settings.size)
    width = int(encoder.module.num_features)  # type: ignore[arg-type]
    steps = equal_parts(recipe.batch_size, settings.accumulation_steps, encoder.device, config.image_size, width)
    resolved = replace(settings, accumulation_steps=steps)
    _initial_model(encoder, resolved, recipe, config)  # raises if the weights do not fit
    state = "" if context.encoder_state == "trained" else f"-{context.encoder_state}"
    folder = inside(context.folder, f"classifier{'-from-scratch' if settings.from_scratch else state}")
    provenance = _provenance(encoder, resolved, recipe, config, data)
    work = context.work_dir("finetune", resolved, describe_labels(data.train))
    finished = not context.overwrite and _is_finished(folder, provenance, work)
    return FinetunePlan(data, name, recipe, resolved, config, folder, work, provenance, finished)


def evaluate_finetune(context: EvalContext, settings: FinetuneSettings) -> Values:
    """Train a classifier, save it, and evaluate it: see `classification.evaluate_classifier` for the values.

    A finished classifier of the same settings is not trained again. Raises UserError: see `check_finetune`.
    """
    plan, encoder = check_finetune(context, settings), context.encoder
    if plan.finished:
        context.print(f"using the finished classifier {plan.folder} (--overwrite trains it again)")
        model = build_encoder_with_weights(read_weights(plan.folder)).to(encoder.device)
        choose_attention(model, encoder.device, encoder.precision)
    else:
        model = _train(context, plan).eval()
        if not context.overwrite:  # another process may have saved one meanwhile
            _is_finished(plan.folder, plan.provenance, plan.work)
        metadata = {_METADATA_KEY: json.dumps(plan.provenance)}
        save_encoder(model, plan.folder, plan.config, encoder.step, classes=plan.data.classes, more=metadata)
        context.print(f"  classifier: {plan.folder}")
    yield from evaluate_classifier(context, plan.data, encoder, plan.config.image_size, model)
    discard(plan.work)


def _train(context: EvalContext, plan: FinetunePlan) -> nn.Module:
    """Train a classifier; resumes."""
    encoder, data, recipe, settings = context.encoder, plan.data, plan.recipe, plan.settings
    model, notes = _initial_model(encoder, settings, recipe, plan.config)
    model = model.to(encoder.device)
    choose_attention(model, encoder.device, encoder.precision)
    averaged = Averaged(model, recipe.average)

    images, per_epoch = len(data.train), len(data.train) / recipe.batch_size
    steps = max(1, round(recipe.epochs * per_epoch))
    warmup = min(round(recipe.warmup * per_epoch), steps // 5)
    peak = recipe.base_lr * recipe.batch_size / 256
    schedule = Schedule(steps, warmup, peak, recipe.min_lr, recipe.warmup_start_lr, warmup_prefix=recipe.warmup_prefix)
    if batch_norms(model) and settings.accumulation_steps > 1:
        notes.append("  batch norms: statistics of each part of a batch; --accumulation-steps sets their number")
    initial = "random weights" if settings.from_scratch else f"the {context.encoder_state} encoder"
    summary = describe(plan.name, recipe, images, steps, warmup, settings.accumulation_steps)
    for line in [*summary, f"  initialized from {initial}", *notes]:
        context.print(line)

    trainer = Trainer(
        averaged,
        SyncFreeOptimizer(_optimizer(model, recipe), recipe.clip or None, encoder.precision == "fp16", encoder.device),
        schedule.lr,
        steps,
        plan.work,
        images=images,
        batch_size=recipe.batch_size,
        accumulation_steps=settings.accumulation_steps,
        console=context.console,
    )
    trainer.resume_and_fit(
        lambda first: open_loader(context, settings, recipe, data.train, plan.config.image_size, first),
        lambda batch, number: compute_loss(model, batch, number, encoder, recipe, data, settings.seed),
        lambda step: averaged.update(),
    )
    return averaged.result


def _initial_model(
    encoder: FrozenEncoder, settings: FinetuneSettings, recipe: Recipe, config: ModelConfig
) -> tuple[nn.Module, list[str]]:
    """Return the classifier before training, and lines about interpolated tables. Raises UserError."""
    model = build(config, recipe.drop_path, recipe.head_std, settings.seed)
    return model, [] if settings.from_scratch else load_encoder_weights(model, config, encoder.module, encoder.config)


def _provenance(
    encoder: FrozenEncoder, settings: FinetuneSettings, recipe: Recipe, config: ModelConfig, data: LabeledSplits
) -> dict[str, Any]:
    """Return the settings that determine a classifier's weights, by flag. Paths are stored as digests only."""
    initial = (
        repr((config.model, config.image_size, encoder.image_spec, config.normalization))
        if settings.from_scratch
        else fingerprint(encoder)
    )
    digests = {
        flag: sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        for flag, text in (("MODEL", initial), ("--train", describe_labels(data.train)))
    }
    values = {
        "--size": config.size,
        "--accumulation-steps": settings.accumulation_steps,
        "--seed": settings.seed,
        "--precision": encoder.precision,
    }
    flags = {f"--{name.replace('_', '-')}": value for name, value in asdict(recipe).items()}
    provenance: dict[str, Any] = json.loads(json.dumps({**digests, **flags, **values}))  # as read from a file
    return provenance


def _is_finished(folder: Path, provenance: dict[str, Any], work: Path) -> bool:
    """Return True if a folder holds the finished classifier of these settings.

    Raises UserError if it holds anything else, except what an interrupted save of the same classifier left.
    """
    config, weights = (inside(folder, name) for name in ("config.json", "model.safetensors"))
    if not os.path.lexists(folder):
        return False
    fix = "move it, choose another --out, or add --overwrite to replace it"
    if not weights.is_file():
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
        if not names or (names == {config.name} and work.exists()):
            return False
        raise UserError(f"{folder} exists and is not a finished classifier: {fix}")
    try:
        previous = parse_json(read(weights).metadata.get(_METADATA_KEY, "null"), str(weights))
    except UserError as error:
        raise UserError(f"{error}. {folder} exists: {fix}") from error
    if not isinstance(previous, dict):
        raise UserError(f"{folder} exists, and its file does not contain how it was fine-tuned: {fix}")
    different = [flag for flag, value in provenance.items() if previous.get(flag) != value]
    if different:
        raise UserError(f"{folder} exists, fine-tuned with another {shortened_list(different)}: {fix}")
    return True


class Averaged(nn.Module):
    """A model and, with a decay above 0, the exponential moving average of its weights and buffers."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.model, self._decay = model, decay
        self.average = deepcopy(model).requires_grad_(False) if decay else None

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    @torch.no_grad()
    def update(self) -> None:
        """Update the average after a step."""
        if self.average is not None:
            mean, new = (
                [*module.parameters(), *(buffer for buffer in module.buffers() if buffer.is_floating_point())]
                for module in (self.average, self.model)
            )
            torch._foreach_lerp_(mean, new, 1 - self._decay)

    @property
    def result(self) -> nn.Module:
        """The average if there is one, otherwise the model."""
        return self.average if self.average is not None else self.model


def open_loader(
    context: EvalContext,
    settings: FinetuneSettings,
    recipe: Recipe,
    train: ImageDataset,
    size: tuple[int, int],
    first: int,
) -> Loader:
    """Load cropped and augmented images, from microbatch number `first`."""
    crop = RandomResizedCrop(size, recipe.scale) if recipe.crop == "random-resized" else SimpleResizedCrop(size)
    microbatch = recipe.batch_size // settings.accumulation_steps
    return Loader(
        train,
        augmented(crop, recipe.augment, recipe.jitter, context.encoder.mean.tolist()),
        BatchShard(microbatch, first * microbatch),
        skipped=context.skipped(train),
        seed=settings.seed,
        threads=settings.threads,
        device=context.encoder.device,
    )


def compute_loss(
    model: nn.Module, batch: Batch, number: int, encoder: FrozenEncoder, recipe: Recipe, data: LabeledSplits, seed: int
) -> Float[Tensor, ""]:
    """Compute the loss of a microbatch. All its randomness is a function of (seed, number)."""
    images = encoder.preprocess(batch.images, batch.flip)
    labels = data.train_labels[batch.indices].to(encoder.device, non_blocking=True)
    images, share = mix(erase(images, recipe.erase, seed, number), recipe.mixup, recipe.cutmix, seed, number)
    targets = soft_labels(labels, len(data.classes), share, recipe.smoothing)
    torch.manual_seed(rng.key(seed, "paths", number))  # drop path uses torch's global generator
    model.train()
    with autocast(encoder.device, encoder.precision):
        scores = model(images)
    return classification_loss(scores.float(), targets, recipe.loss)


def classification_loss(scores: Float[Tensor, "b k"], targets: Float[Tensor, "b k"], kind: str) -> Tensor:
    """Cross-entropy ("ce"), or binary cross-entropy ("bce") where each class with a nonzero target is present."""
    if kind == "bce":
        return F.binary_cross_entropy_with_logits(scores, (targets > 0).float())
    return F.cross_entropy(scores, targets)


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    groups = layer_decay_param_groups(
        model, layer_ids(model), recipe.layer_decay, recipe.weight_decay, not_decayed(model)
    )
    if recipe.optimizer == "lamb":
        return LAMB(groups, lr=recipe.base_lr)
    return torch.optim.AdamW(groups, lr=recipe.base_lr, betas=(0.9, 0.999), fused=True)
