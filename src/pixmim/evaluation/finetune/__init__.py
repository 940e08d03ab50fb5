"""Fine-tuning: the whole encoder learns classes, by the recipe that was published for its kind.

The classifier is kept beside the results, in timm's names, with its classes in the metadata.
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
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from pixmim.config import ModelConfig
from pixmim.data.dataset import ImageDataset
from pixmim.data.loader import Batch, Loader
from pixmim.data.sampler import BatchShard
from pixmim.evaluation.classification import LabeledSplits, evaluate_classifier, open_labeled, shortened_list
from pixmim.evaluation.context import EvalContext, Values, discard
from pixmim.evaluation.finetune.model import build, classifier_config, load_encoder_weights
from pixmim.evaluation.finetune.recipes import FINETUNE_RECIPES, Recipe, apply_overrides, choose, describe
from pixmim.evaluation.frozen_encoder import FrozenEncoder, fingerprint
from pixmim.evaluation.settings import FinetuneSettings
from pixmim.models.layer_decay import layer_ids, not_decayed
from pixmim.training.find_batch_size import equal_parts
from pixmim.training.optim import LAMB, Schedule, SyncFreeOptimizer, layer_decay_param_groups
from pixmim.training.precision import autocast, choose_attention
from pixmim.training.trainer import Trainer
from pixmim.transforms.augment import augmented
from pixmim.transforms.crops import RandomResizedCrop, SimpleResizedCrop, flip_and_normalize
from pixmim.transforms.mixup import erase, mix, soft_labels
from pixmim.utils import rng
from pixmim.utils.console import print_plain
from pixmim.utils.errors import UserError
from pixmim.utils.files import parse_json
from pixmim.utils.trust import inside
from pixmim.weights.detect import read_weights
from pixmim.weights.load import build_encoder_with_weights
from pixmim.weights.safe_load import read
from pixmim.weights.save import save_encoder

_SETTINGS = "finetune"
"""Where a classifier's metadata hold what decided its weights, as JSON."""


@dataclass(frozen=True)
class Plan:
    """What a fine-tuning will do, decided before any of it.

    name      of the recipe
    parts     of a batch
    run       builds the classifier
    folder    where the classifier is kept
    work      where unfinished work is kept
    settings  what decides its weights, by flag: kept with it, so that it is not taken for another one
    reused    whether it is there already
    """

    data: LabeledSplits
    name: str
    recipe: Recipe
    parts: int
    config: ModelConfig
    folder: Path
    work: Path
    settings: dict[str, Any]
    reused: bool


def check_finetune(context: EvalContext, settings: FinetuneSettings) -> Plan:
    """Check data, settings and the classifier's folder, and train nothing.

    Raises:
        UserError: If data, settings or the encoder do not suit, or another classifier is in the folder.
    """

    def make() -> Plan:
        encoder, data = context.encoder, open_labeled(context, settings.train, settings.test, all_classes=True)
        name = choose(settings.recipe, encoder.config, encoder.module, settings.from_scratch)
        recipe = apply_overrides(FINETUNE_RECIPES[name], settings.changes)
        if data.train.image_spec.dtype != "uint8" and (recipe.augment != "none" or recipe.jitter):
            raise UserError("only images of 8 bits are augmented: add --augment none --jitter 0")
        run = classifier_config(encoder.config, encoder.module, len(data.classes), recipe.pool, settings.size)
        width = int(encoder.module.num_features)  # type: ignore[arg-type]
        parts = equal_parts(recipe.batch_size, settings.accumulation_steps, encoder.device, run.image_size, width)
        _begun(encoder, settings, recipe, run)
        which = "" if context.encoder_state == "trained" else f"-{context.encoder_state}"
        folder = inside(context.folder, f"classifier{'-from-scratch' if settings.from_scratch else which}")
        decides = _decides(context, settings, recipe, parts, run, data)
        work = context.work_dir("finetune", replace(settings, accumulation_steps=parts))
        reused = not context.overwrite and _finished(folder, decides, work)
        return Plan(data, name, recipe, parts, run, folder, work, decides, reused)

    return context.cached(("finetune", repr(settings)), make)


def evaluate_finetune(context: EvalContext, settings: FinetuneSettings) -> Values:
    """Train a classifier, keep it, and measure it: see `classification.evaluate_classifier` for what is yielded.

    A finished classifier of the same settings is not trained again. Raises UserError: see `check_finetune`.
    """
    todo, encoder, console = check_finetune(context, settings), context.encoder, context.console or Console(quiet=True)
    settings = replace(settings, accumulation_steps=todo.parts)
    if todo.reused:
        print_plain(console, f"the classifier of these settings is there: {todo.folder} (--overwrite trains it again)")
        product = build_encoder_with_weights(read_weights(todo.folder)).to(encoder.device)
        choose_attention(product, encoder.device, encoder.precision)
    else:
        product = _trained(context, settings, todo).eval()
        if not context.overwrite:  # another process may have kept one meanwhile
            _finished(todo.folder, todo.settings, todo.work)
        about = {_SETTINGS: json.dumps(todo.settings)}
        save_encoder(product, todo.folder, todo.config, encoder.step, classes=todo.data.classes, more=about)
        print_plain(console, f"  the classifier: {todo.folder}")
    yield from evaluate_classifier(context, todo.data, encoder, todo.config.image_size, product)
    discard(todo.work)


def _trained(context: EvalContext, settings: FinetuneSettings, todo: Plan) -> nn.Module:
    """Train a classifier, from where it was interrupted if it was."""
    encoder, data, recipe, run, parts = context.encoder, todo.data, todo.recipe, todo.config, todo.parts
    model, lines = _begun(encoder, settings, recipe, run)
    model = model.to(encoder.device)
    choose_attention(model, encoder.device, encoder.precision)
    trained = Averaged(model, recipe.average)

    per_epoch = len(data.train) / recipe.batch_size
    steps = max(1, round(recipe.epochs * per_epoch))
    warmup = min(round(recipe.warmup * per_epoch), steps // 5)
    peak = recipe.base_lr * recipe.batch_size / 256
    schedule = Schedule(steps, warmup, peak, recipe.min_lr, recipe.warmup_start_lr, warmup_prefix=recipe.warmup_prefix)
    begun = "random weights" if settings.from_scratch else f"the {context.encoder_state} encoder"
    console = context.console or Console(quiet=True)
    about = describe(todo.name, recipe, len(data.train), steps, warmup, parts)
    for line in [*about, f"  begins with {begun}", *lines]:
        print_plain(console, line)

    trainer = Trainer(
        trained,
        SyncFreeOptimizer(_optimizer(model, recipe), recipe.clip or None, encoder.precision == "fp16", encoder.device),
        schedule.lr,
        steps,
        todo.work,
        images=len(data.train),
        batch_size=recipe.batch_size,
        accumulation_steps=parts,
        console=context.console,
    )
    trainer.resume_and_fit(
        lambda first: open_loader(context, settings, recipe, data.train, run.image_size, first),
        lambda batch, number: compute_loss(model, batch, number, encoder, recipe, data, settings.seed),
        lambda step: trained.follow(),
    )
    return trained.result


def _begun(
    encoder: FrozenEncoder, settings: FinetuneSettings, recipe: Recipe, config: ModelConfig
) -> tuple[nn.Module, list[str]]:
    """Return the classifier as it is before training, and lines about what had to be refitted. Raises UserError."""
    model = build(config, recipe.drop_path, recipe.head_std, settings.seed)
    return model, [] if settings.from_scratch else load_encoder_weights(model, config, encoder.module, encoder.config)


def _decides(
    context: EvalContext,
    settings: FinetuneSettings,
    recipe: Recipe,
    parts: int,
    config: ModelConfig,
    data: LabeledSplits,
) -> dict[str, Any]:
    """Return what decides the weights of a classifier, by flag. Data and encoder are digests: files name no places."""
    encoder = context.encoder
    begun = (
        repr((config.model, config.image_size, encoder.image_spec, config.normalization))
        if settings.from_scratch
        else fingerprint(encoder)
    )
    images = f"{data.train.spec} {data.train.fingerprint()} {len(data.train)} {data.classes}"
    digests = {
        name: sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        for name, text in (("MODEL", begun), ("--train", images))
    }
    numbers = {f"--{name.replace('_', '-')}": value for name, value in asdict(recipe).items() if name != "about"}
    own = {
        "--size": config.size,
        "--accumulation-steps": parts,
        "--seed": settings.seed,
        "--precision": encoder.precision,
    }
    found: dict[str, Any] = json.loads(json.dumps({**digests, **numbers, **own}))  # as it is read again
    return found


def _finished(folder: Path, decides: dict[str, Any], work: Path) -> bool:
    """Return whether the finished classifier of these settings is in a folder.

    Raises:
        UserError: If anything else is there, but for what writing the same classifier left when it was interrupted.
    """
    config, weights = (inside(folder, name) for name in ("config.json", "model.safetensors"))
    if not os.path.lexists(folder):
        return False
    instead = "move it, choose another --out, or add --overwrite to replace it"
    if not weights.is_file():
        names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
        if not names or (names == {config.name} and work.exists()):
            return False
        raise UserError(f"{folder} is there already, and holds no finished classifier: {instead}")
    try:
        before = parse_json(read(weights).metadata.get(_SETTINGS, "null"), str(weights))
    except UserError as error:
        raise UserError(f"{error}. {folder} is there already: {instead}") from error
    if not isinstance(before, dict):
        raise UserError(f"{folder} is there already, and its file does not say how it was fine-tuned: {instead}")
    others = [flag for flag, value in decides.items() if before.get(flag) != value]
    if others:
        raise UserError(f"{folder} is there already, fine-tuned with another {shortened_list(others)}: {instead}")
    return True


class Averaged(nn.Module):
    """A model and, with a decay above 0, the exponential average of its weights over updates."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.model, self._decay = model, decay
        self.average: nn.Module | None = None
        if decay:
            self.average = deepcopy(model).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)

    @torch.no_grad()
    def follow(self) -> None:
        """Move the average towards the model's weights, after an update."""
        if self.average is not None:
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - self._decay)

    @property
    def result(self) -> nn.Module:
        """What is measured: the average, where there is one."""
        return self.average if self.average is not None else self.model


def open_loader(
    context: EvalContext,
    settings: FinetuneSettings,
    recipe: Recipe,
    train: ImageDataset,
    size: tuple[int, int],
    first: int,
) -> Loader:
    """Load cropped and augmented images, from part number `first` of a batch on."""
    crop = RandomResizedCrop(size, recipe.scale) if recipe.crop == "random-resized" else SimpleResizedCrop(size)
    part = recipe.batch_size // settings.accumulation_steps
    return Loader(
        train,
        augmented(crop, recipe.augment, recipe.jitter, context.encoder.mean.tolist()),
        BatchShard(part, first * part),
        skipped=context.skipped(train),
        seed=settings.seed,
        threads=settings.threads,
        device=context.encoder.device,
    )


def compute_loss(
    model: nn.Module, batch: Batch, number: int, encoder: FrozenEncoder, recipe: Recipe, data: LabeledSplits, seed: int
) -> Float[Tensor, ""]:
    """Compute the loss of a part of a batch. All its randomness is a function of (seed, number)."""
    to: Any = {"device": encoder.device, "non_blocking": True}
    images = flip_and_normalize(batch.images.to(**to), batch.flip.to(**to), encoder.mean, encoder.std)
    labels = data.labels[batch.indices].to(**to)
    images, share = mix(erase(images, recipe.erase, seed, number), recipe.mixup, recipe.cutmix, seed, number)
    targets = soft_labels(labels, len(data.classes), share, recipe.smoothing)
    # Dropped paths are drawn from torch's global generator.
    torch.manual_seed(rng.key(seed, "paths", number))
    model.train()
    with autocast(encoder.device, encoder.precision):
        scores = model(images)
    return loss_of(scores.float(), targets, recipe.loss)


def loss_of(scores: Float[Tensor, "b classes"], targets: Float[Tensor, "b classes"], kind: str) -> Tensor:
    """ "ce": cross-entropy. "bce": binary cross-entropy, where a class counts as present if its target is not zero."""
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
