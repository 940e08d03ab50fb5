"""MAE's linear probe (arXiv 2111.06377, table 10), which PixMIM reports: LARS on features of augmented images.

The frozen encoder sees another crop of each image in every epoch, so its features are computed anew each time.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from pixmim.data.loader import Batch, Loader
from pixmim.data.sampler import BatchShard
from pixmim.evaluation.classification import Labelled, grade, open_labelled
from pixmim.evaluation.context import Bench
from pixmim.evaluation.learn import forget, learn
from pixmim.evaluation.settings import Linear
from pixmim.models import features
from pixmim.training.layerwise import LARS
from pixmim.training.precision import autocast
from pixmim.training.schedule import Schedule
from pixmim.transforms.crops import RandomResizedCrop, finish
from pixmim.utils.console import say
from pixmim.utils.errors import UserError

PART = 512
"""Images that BatchNorm takes its statistics from; the published batch is 32 of these."""

_WARMUP = 10  # epochs


def check(bench: Bench, settings: Linear) -> tuple[Labelled, str]:
    """Return the data and the kind of feature. Raises UserError for what `measure` would refuse."""
    data = open_labelled(bench, settings.train, settings.test, all_classes=True)
    kind = _kind(bench.encoder.module, settings.feature)
    if settings.batch_size < 2 or len(data.train) < 2:
        raise UserError("BatchNorm needs a batch of at least 2 images")
    return data, kind


def measure(bench: Bench, settings: Linear) -> Iterator[tuple[str, float]]:
    """Fit BatchNorm without parameters and one linear layer to the frozen encoder's features, and measure them.

    Feature -> BatchNorm1d(affine=False, eps=1e-6) -> Linear with weights N(0, 0.01). LARS with momentum 0.9, no decay,
    rate 0.1 x batch / 256; 10 epochs of warm-up, cosine to 0 over 90; single-try random resized crop (0.08, 1), flip.

    Yields "mae/top1" and the rest of `labelled.grade`. Raises UserError for data and settings that do not suit.
    """
    encoder, (data, kind) = bench.encoder, check(bench, settings)
    encoder.module.eval()
    images, epochs = len(data.train), 90 if settings.epochs is None else settings.epochs
    part, parts = _parts(min(settings.batch_size, images))
    batch = part * parts
    steps = max(1, round(epochs * images / batch))
    warmup = min(round(_WARMUP * images / batch), steps // 5)
    schedule = Schedule(steps, warmup, settings.base_lr * batch / 256, 0.0)

    console = bench.console or Console(quiet=True)
    cut = f" (cut from {settings.batch_size:,}: there are {images:,} images)" if batch < settings.batch_size else ""
    say(
        console,
        f"linear probe by MAE's protocol: {epochs} epochs of {images:,} images, {steps:,} updates of {batch:,}{cut}; "
        f"LARS, rate {schedule.peak:.3g} after {warmup} updates of warm-up, to 0; "
        + ("class token" if kind == "cls" else "mean of the patch tokens"),
    )
    torch.manual_seed(settings.seed)
    width = int(encoder.module.num_features)  # type: ignore[arg-type]
    head = nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=1e-6), nn.Linear(width, len(data.classes)))
    nn.init.normal_(head[1].weight, std=0.01)  # type: ignore[arg-type]
    nn.init.zeros_(head[1].bias)  # type: ignore[arg-type]
    lesson = Lesson(bench, settings, data, kind, part, head.to(encoder.device))
    work = bench.work("linear-mae", settings)
    learn(
        head,
        LARS(head.parameters(), lr=schedule.peak),
        schedule.lr,
        steps,
        lesson.batches,
        lesson.loss,
        work,
        images=images,
        batch=batch,
        accumulate=parts,
        scaling=False,
        console=bench.console,
    )
    head.eval()
    for name, value in grade(bench, data, encoder, encoder.size, lambda x: head(lesson.feature(x))):
        yield f"mae/{name}", value
    forget(work)


@dataclass(frozen=True)
class Lesson:
    """What the probe learns from. part: images in a part of a batch."""

    bench: Bench
    settings: Linear
    data: Labelled
    kind: str
    part: int
    head: nn.Module

    def batches(self, first: int) -> Loader:
        """The parts of batches from number `first` on."""
        return Loader(
            self.data.train,
            RandomResizedCrop(self.bench.encoder.size, (0.08, 1.0), single=True),
            BatchShard(self.part, first * self.part),
            skipped=self.bench.skipped(self.data.train),
            seed=self.settings.seed,
            threads=self.settings.threads,
            device=self.bench.encoder.device,
        )

    @torch.no_grad()
    def feature(self, images: Tensor) -> Tensor:
        """What the frozen encoder says of normalised images, (b d) float32."""
        encoder = self.bench.encoder
        with autocast(encoder.device, encoder.precision):
            found = features(encoder.module, images)
        return (found.vector[:, -1] if self.kind == "cls" else found.mean).float()

    def loss(self, batch: Batch, number: int) -> Tensor:
        """The loss of a part of a batch."""
        encoder = self.bench.encoder
        to: Any = {"device": encoder.device, "non_blocking": True}
        images = finish(batch.images.to(**to), batch.flip.to(**to), encoder.mean, encoder.std)
        return F.cross_entropy(self.head(self.feature(images)), self.data.labels[batch.indices].to(**to))


def _kind(module: nn.Module, feature: str) -> str:
    token = getattr(module, "cls_token", None) is not None
    if feature == "cls" and not token:
        raise UserError("the encoder has no class token: --feature mean")
    return ("cls" if token else "mean") if feature == "auto" else feature


def _parts(batch: int) -> tuple[int, int]:
    """A batch as so many images in so many equal parts, each of at most PART; the rest is left out of it."""
    return (batch, 1) if batch <= PART else (PART, batch // PART)
