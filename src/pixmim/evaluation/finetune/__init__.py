"""Fine-tuning: the whole encoder learns classes, by the recipe that was published for its kind.

The classifier is kept beside the results, in timm's names, with its classes in the metadata.
"""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from pixmim.data.batches import Batch, Portion
from pixmim.data.dataset import Source
from pixmim.data.loader import Loader
from pixmim.evaluation.classification import Labelled, grade, open_labelled
from pixmim.evaluation.context import Bench, Values, discard
from pixmim.evaluation.finetune.model import build, inherit, plan
from pixmim.evaluation.finetune.recipes import TUNINGS, Recipe, choose, describe, resolve
from pixmim.evaluation.frozen_encoder import Encoder
from pixmim.evaluation.settings import Finetune
from pixmim.models.layer_decay import layer_ids, not_decayed
from pixmim.training.find_batch_size import equal_parts
from pixmim.training.optim import LAMB, Updater, layer_groups
from pixmim.training.precision import autocast, choose_attention
from pixmim.training.schedule import Schedule
from pixmim.training.trainer import Trainer
from pixmim.transforms.augment import augmented
from pixmim.transforms.crops import RandomResizedCrop, SimpleResizedCrop, finish
from pixmim.transforms.mixup import erase, mix, soft_labels
from pixmim.utils import rng
from pixmim.utils.console import say
from pixmim.utils.errors import UserError
from pixmim.utils.trust import inside
from pixmim.weights.save import save_encoder


def measure(bench: Bench, settings: Finetune) -> Values:
    """Train a classifier, keep it, and measure it: see `labelled.grade` for what is yielded.

    Raises UserError for data, settings or an encoder that do not suit.
    """
    encoder, data = bench.encoder, open_labelled(bench, settings.train, settings.test, all_classes=True)
    name = choose(settings.recipe, encoder.run, encoder.module, settings.from_scratch)
    recipe = resolve(TUNINGS[name], settings.changes)
    if data.train.form.pixels != "uint8" and (recipe.augment != "none" or recipe.jitter):
        raise UserError("only images of 8 bits are augmented: add --augment none --jitter 0")

    run = plan(encoder.run, encoder.module, len(data.classes), recipe.pool, settings.size)
    model = build(run, recipe.drop_path, recipe.head_std, settings.seed)
    lines = [] if settings.from_scratch else inherit(model, run, encoder.module, encoder.run)
    width = int(model.num_features)  # type: ignore[arg-type]
    parts = equal_parts(recipe.batch_size, settings.accumulate, encoder.device, run.hw, width)
    settings = replace(settings, accumulate=parts)
    model = model.to(encoder.device)
    choose_attention(model, encoder.device, encoder.precision)
    trained = Averaged(model, recipe.average)

    per_epoch = len(data.train) / recipe.batch_size
    steps = max(1, round(recipe.epochs * per_epoch))
    warmup = min(round(recipe.warmup * per_epoch), steps // 5)
    peak = recipe.base_lr * recipe.batch_size / 256
    schedule = Schedule(steps, warmup, peak, recipe.final_lr, recipe.first_lr, warmup_prefix=recipe.warmup_prefix)
    begun = "random weights" if settings.from_scratch else f"the {bench.which} encoder"
    console = bench.console or Console(quiet=True)
    for line in [*describe(name, recipe, len(data.train), steps, warmup, parts), f"  begins with {begun}", *lines]:
        say(console, line)

    work = bench.work("finetune", settings)
    trainer = Trainer(
        trained,
        Updater(_optimizer(model, recipe), recipe.clip or None, encoder.precision == "fp16", encoder.device),
        schedule.lr,
        steps,
        work,
        images=len(data.train),
        batch_size=recipe.batch_size,
        accumulate=parts,
        console=bench.console,
    )
    trainer.resume_and_fit(
        lambda first: open_loader(bench, settings, recipe, data.train, run.hw, first),
        lambda batch, number: compute_loss(model, batch, number, encoder, recipe, data, settings.seed),
        lambda step: trained.follow(),
    )
    product = trained.result.eval()
    which = "" if bench.which == "trained" else f"-{bench.which}"
    path = inside(bench.folder, f"classifier{'-from-scratch' if settings.from_scratch else which}")
    for name in ("config.json", "model.safetensors"):
        inside(path, name)
    save_encoder(product, path, run, encoder.step, classes=data.classes)
    say(console, f"  the classifier: {path}")
    yield from grade(bench, data, encoder, run.hw, product)
    discard(work)


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
    bench: Bench, settings: Finetune, recipe: Recipe, train: Source, size: tuple[int, int], first: int
) -> Loader:
    """Load cropped and augmented images, from part number `first` of a batch on."""
    crop = RandomResizedCrop(size, recipe.scale) if recipe.crop == "rrc" else SimpleResizedCrop(size)
    part = recipe.batch_size // settings.accumulate
    return Loader(
        train,
        augmented(crop, recipe.augment, recipe.jitter, bench.encoder.mean.tolist()),
        Portion(part, first * part),
        skipped=bench.skipped(train),
        seed=settings.seed,
        threads=settings.threads,
        device=bench.encoder.device,
    )


def compute_loss(
    model: nn.Module, batch: Batch, number: int, encoder: Encoder, recipe: Recipe, data: Labelled, seed: int
) -> Float[Tensor, ""]:
    """Compute the loss of a part of a batch. All its randomness is a function of (seed, number)."""
    to: Any = {"device": encoder.device, "non_blocking": True}
    images = finish(batch.images.to(**to), batch.flip.to(**to), encoder.mean, encoder.std)
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
    groups = layer_groups(model, layer_ids(model), recipe.layer_decay, recipe.weight_decay, not_decayed(model))
    if recipe.optimizer == "lamb":
        return LAMB(groups, lr=recipe.base_lr)
    return torch.optim.AdamW(groups, lr=recipe.base_lr, betas=(0.9, 0.999), fused=True)
