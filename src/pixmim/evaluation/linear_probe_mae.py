"""MAE's linear probe (arXiv 2111.06377, table 10), reported by PixMIM: LARS on features of augmented images.

The frozen encoder sees another crop of each image in every epoch, so features are recomputed instead of cached.
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from pixmim.data.loader import Batch, Loader
from pixmim.data.sampler import BatchShard
from pixmim.evaluation.classification import LabeledSplits, evaluate_classifier, open_labeled
from pixmim.evaluation.context import EvalContext, Values, describe_labels, discard
from pixmim.evaluation.frozen_encoder import FrozenEncoder
from pixmim.evaluation.settings import LinearSettings
from pixmim.models import features
from pixmim.training.optim import LARS, Schedule, SyncFreeOptimizer
from pixmim.training.trainer import Trainer
from pixmim.transforms.crops import RandomResizedCrop
from pixmim.utils.errors import UserError
from pixmim.utils.initialization import seeded

MICROBATCH = 512  # images that BatchNorm computes statistics of; the published batch is 32 of these

_WARMUP_EPOCHS = 10


def check_linear_mae(context: EvalContext, settings: LinearSettings) -> tuple[LabeledSplits, str]:
    """Return the data and the kind of feature. Raises UserError for what `evaluate_linear_mae` would refuse."""
    data = open_labeled(context, settings.train, settings.test)
    kind = feature_kind(context.encoder.module, settings.feature)
    if settings.batch_size < 2 or len(data.train) < 2:
        raise UserError("BatchNorm needs a batch of at least 2 images")
    return data, kind


def evaluate_linear_mae(context: EvalContext, settings: LinearSettings) -> Values:
    """Fit BatchNorm without parameters and one linear layer to the frozen encoder's features, and evaluate them.

    Feature -> BatchNorm1d(affine=False, eps=1e-6) -> Linear with weights N(0, 0.01). LARS with momentum 0.9, no decay,
    rate 0.1 x batch / 256; 10 epochs of warm-up, cosine to 0 over 90; single-try random resized crop (0.08, 1), flip.

    Yields the values of `classification.evaluate_classifier` with the prefix "mae/". Raises UserError for unsuitable
    data.
    """
    encoder, (data, kind) = context.encoder, check_linear_mae(context, settings)
    images, epochs = len(data.train), 90 if settings.epochs is None else settings.epochs
    microbatch, count = split_batch(min(settings.batch_size, images))
    batch = microbatch * count
    steps = max(1, round(epochs * images / batch))
    warmup = min(round(_WARMUP_EPOCHS * images / batch), steps // 5)
    schedule = Schedule(steps, warmup, settings.base_lr * batch / 256, 0.0)

    reduced = f" (reduced from {settings.batch_size:,} for {images:,} images)" if batch < settings.batch_size else ""
    context.print(
        f"linear probe by MAE's protocol: {epochs} epochs of {images:,} images, {steps:,} steps of {batch:,}{reduced}; "
        f"LARS, rate {schedule.peak:.3g} after {warmup} steps of warm-up, to 0; "
        + ("class token" if kind == "cls" else "mean of the patch tokens")
    )
    with seeded(settings.seed):
        linear = nn.Linear(int(encoder.module.num_features), len(data.classes))  # type: ignore[arg-type]
        nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    head = nn.Sequential(nn.BatchNorm1d(linear.in_features, affine=False, eps=1e-6), linear).to(encoder.device)

    def open_loader(first: int) -> Loader:
        return Loader(
            data.train,
            RandomResizedCrop(encoder.size, (0.08, 1.0), single=True),
            BatchShard(microbatch, first * microbatch),
            skipped=context.skipped(data.train),
            seed=settings.seed,
            threads=settings.threads,
            device=encoder.device,
        )

    def compute_loss(batch: Batch, number: int) -> Tensor:
        scores = head(frozen_feature(encoder, kind, encoder.preprocess(batch.images, batch.flip)))
        return F.cross_entropy(scores, data.train_labels[batch.indices].to(encoder.device, non_blocking=True))

    work = context.work_dir("linear-mae", settings, describe_labels(data.train))
    trainer = Trainer(
        head,
        SyncFreeOptimizer(LARS(head.parameters(), lr=schedule.peak), None, scaling=False, device=encoder.device),
        schedule.lr,
        steps,
        work,
        images=images,
        batch_size=batch,
        accumulation_steps=count,
        console=context.console,
    )
    trainer.resume_and_fit(open_loader, compute_loss)
    head.eval()
    for name, value in evaluate_classifier(
        context, data, encoder, encoder.size, lambda x: head(frozen_feature(encoder, kind, x))
    ):
        yield f"mae/{name}", value
    discard(work)


def frozen_feature(encoder: FrozenEncoder, kind: str, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
    """Compute the frozen encoder's feature of normalized images: class token ("cls") or mean of patch tokens."""
    with encoder.evaluating():
        result = features(encoder.module, images)
    return (result.vector[:, -1] if kind == "cls" else result.mean).float()


def feature_kind(module: nn.Module, feature: str) -> str:
    """Return "cls" or "mean". Raises UserError if the encoder has no class token."""
    has_token = getattr(module, "cls_token", None) is not None
    if feature == "cls" and not has_token:
        raise UserError("the encoder has no class token: pass --feature mean")
    return ("cls" if has_token else "mean") if feature == "auto" else feature


def split_batch(batch: int) -> tuple[int, int]:
    """Return size and number of the microbatches of a batch; images that do not fill one are dropped."""
    return (batch, 1) if batch <= MICROBATCH else (MICROBATCH, batch // MICROBATCH)
