"""Semantic segmentation: a head on an encoder learns from pictures with masks, and is measured by mean IoU.

The defaults are MAE's protocol on ADE20K (arXiv 2111.06377, appendix A.4): UPerNet, end to end.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from rich.console import Console
from torch import Tensor

from pixmim import rng
from pixmim.data.batches import Batch, Batches, Portion
from pixmim.data.loader import Loader, how_many
from pixmim.data.skipped import Skipped
from pixmim.data.source import BadImage
from pixmim.engine.device import autocast
from pixmim.engine.optim import layer_groups
from pixmim.errors import UserError
from pixmim.evaluate.bench import Bench, Values
from pixmim.evaluate.encoder import Encoder, anew
from pixmim.evaluate.features import progress
from pixmim.evaluate.learn import forget, learn
from pixmim.evaluate.segmentation.augment import DISTORTIONS, JitteredCrop, distort
from pixmim.evaluate.segmentation.draw import Pixels, sheet
from pixmim.evaluate.segmentation.heads import Segmenter, loss_of
from pixmim.evaluate.segmentation.pairs import Pairs, open_pairs
from pixmim.evaluate.segmentation.windows import segment
from pixmim.metrics import confusion, overlap
from pixmim.models.layers import layer_ids
from pixmim.protocols import Segmentation
from pixmim.transforms import finish

_SHOWN = 6  # test pictures in the report


def measure(bench: Bench, settings: Segmentation) -> Values:
    """Train a head, and yield mIoU, aAcc, mAcc and each class's IoU in per cent, over all test pixels together.

    Classes without a pixel in the test masks have no IoU, and are left out of the means. Raises UserError for data or
    settings that do not go together.
    """
    encoder = bench.encoder
    train = open_pairs(settings.train, encoder.form, "training")
    test = open_pairs(settings.test, encoder.form, "validation", train.classes)
    model, size = build(encoder, settings, len(train.classes))
    folder = bench.work("segmentation", settings)
    fit(model, encoder, settings, train, size, folder=folder, skipped=bench.skipped(train), console=bench.console)
    model.eval()

    names, skipped, rows = train.classes, bench.skipped(test), []
    wanted = set(np.linspace(0, len(test) - 1, _SHOWN).round().astype(int).tolist())
    matrix = torch.zeros(len(names), len(names), dtype=torch.int64, device=encoder.device)
    with progress(f"segments {test.spec}", len(test), bench.console) as advance:
        for index, pair in one_by_one(test, skipped):
            truth = pair[-1].to(encoder.device, torch.int64)
            found = segment(model, encoder, pair[:-1], size)
            matrix += confusion(found, truth, len(names))
            if index in wanted:
                rows.append((_visible(pair[:-1]), truth.cpu().numpy(), found.cpu().numpy()))
            advance(index + 1)
    if rows:
        bench.pictures[f"Segmentation with {settings.head} head: the image, its mask, the prediction"] = sheet(
            rows, names
        )
    forget(folder)
    measured = overlap(matrix.cpu())
    yield "mIoU", 100 * measured.mean_iou
    yield "aAcc", 100 * measured.pixel_accuracy
    yield "mAcc", 100 * measured.mean_accuracy
    for name, iou in zip(names, measured.iou.tolist(), strict=True):
        yield f"iou/{name}", 100 * iou
    yield "images", len(test) - len(skipped)


def build(encoder: Encoder, settings: Segmentation, classes: int) -> tuple[Segmenter, tuple[int, int]]:
    """The encoder with a fresh head, on its device, and the size of its crops. Raises UserError."""
    frozen = settings.head == "linear" if settings.frozen is None else settings.frozen
    size = replace(encoder.run, size=settings.size).hw
    if settings.batch % settings.accumulate or settings.batch // settings.accumulate < 2:
        raise UserError(
            f"--batch {settings.batch} does not make --accumulate {settings.accumulate} equal parts of 2 images or more"
        )
    module = anew(encoder, settings.size, **({} if frozen else {"drop_path_rate": settings.drop_path}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        try:
            model = Segmenter(module, settings.head, classes, settings.width, frozen)
        except TypeError as error:
            raise UserError(f"segmentation takes a ViT, Beit, Swin or ConvMAE: {error}") from error
    return model.to(encoder.device), size


def fit(
    model: Segmenter,
    encoder: Encoder,
    settings: Segmentation,
    train: Pairs,
    size: tuple[int, int],
    *,
    folder: Path,
    skipped: Skipped,
    console: Console | None = None,
) -> None:
    """Train what is not frozen of a model; goes on from a checkpoint in `folder` if there is one. Raises UserError."""
    part = settings.batch // settings.accumulate

    def batches(position: int) -> Batches:
        return Loader(
            train,
            JitteredCrop(size),
            Portion(part, position * part),
            skipped=skipped,
            seed=settings.seed,
            threads=settings.threads,
            pin=encoder.device.type == "cuda",
        )

    def loss(batch: Batch, step: int) -> Tensor:
        x, masks = prepare(batch, encoder, settings.seed, step)
        # What dropout draws belongs to the update and the images, so that a resumed training draws the same.
        torch.manual_seed(int(rng.bits(settings.seed, "dropout", step, batch.indices[:1].numpy(), 1)[0, 0]))
        with autocast(encoder.device, encoder.precision):
            scores = model(x)
        return loss_of(scores, masks)

    model.train()
    learn(
        model,
        torch.optim.AdamW(groups(model, settings), lr=settings.rate, betas=(0.9, 0.999), fused=True),
        lambda step: rate(settings, step),
        settings.steps,
        batches,
        loss,
        folder,
        images=len(train),
        batch=settings.batch,
        accumulate=settings.accumulate,
        scaling=encoder.precision == "fp16",
        console=console,
    )


def groups(model: Segmenter, settings: Segmentation) -> list[dict[str, Any]]:
    """What is trained: each layer of the encoder at its share of the learning rate, and what is new at the whole."""
    ids = {f"encoder.{name}": layer for name, layer in layer_ids(model.encoder).items()}
    top = max(ids.values())
    found = {name: ids.get(name, top) for name, _ in model.named_parameters()}
    return layer_groups(model, found, settings.layer_decay, settings.weight_decay, ("relative_position_bias_table",))


def rate(settings: Segmentation, step: int) -> float:
    """The learning rate of update `step`, counted from 0: a straight line to zero, times the warm-up's rise to one.

    Warm-up takes at most a fifth of the updates.
    """
    warmup = min(settings.warmup, settings.steps // 5)
    return settings.rate * (1 - step / settings.steps) * (min(1.0, (step + 1) / warmup) if warmup else 1.0)


def prepare(batch: Batch, encoder: Encoder, seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Images (b c h w), their colours distorted, flipped and normalised, and their masks (b h w), on the device."""
    pairs, flip = (t.to(encoder.device, non_blocking=True) for t in (batch.images, batch.flip))
    images, masks = pairs[:, :-1], pairs[:, -1].to(torch.int64)
    masks = torch.where(flip.view(-1, 1, 1), masks.flip(-1), masks)
    if not images.is_floating_point():  # those have no known range
        u = rng.uniform(seed, "colours", step, batch.indices.numpy(), DISTORTIONS).astype(np.float32)
        images = distort(images.float() / torch.iinfo(images.dtype).max, torch.from_numpy(u).to(encoder.device))
    return finish(images, flip, encoder.mean, encoder.std), masks


def one_by_one(pairs: Pairs, skipped: Skipped, threads: int = 0) -> Iterator[tuple[int, Shaped[Tensor, "c h w"]]]:
    """Every pair in order, read ahead by threads, with its index; what cannot be read is left out and accounted for."""

    def read(index: int) -> Tensor | None:
        try:
            return pairs.image(index)
        except BadImage as error:
            skipped.add(index, pairs.locate(index), str(error))
            return None

    count = how_many(threads)
    with ThreadPoolExecutor(count, "pixmim-read", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        ahead: deque[tuple[int, Future[Tensor | None]]] = deque()
        for index in range(len(pairs) + 2 * count):
            if index < len(pairs):
                ahead.append((index, pool.submit(read, index)))
            if index >= 2 * count and ahead:
                which, future = ahead.popleft()
                pair = future.result()
                if pair is not None:
                    skipped.passed(which)
                    yield which, pair


def _visible(picture: Shaped[Tensor, "c h w"]) -> Pixels:
    """A picture as bytes in three channels, to be looked at: the first three, or the first one in grey."""
    values = picture.permute(1, 2, 0).numpy()
    shown = values[..., :3] if values.shape[2] >= 3 else values[..., :1].repeat(3, axis=2)
    if shown.dtype == np.uint8:
        return shown
    top = np.iinfo(shown.dtype).max if np.issubdtype(shown.dtype, np.integer) else max(float(shown.max()), 1e-8)
    return (shown.astype(np.float32) / top * 255).clip(0, 255).astype(np.uint8)
