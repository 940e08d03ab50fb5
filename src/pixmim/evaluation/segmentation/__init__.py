"""Semantic segmentation: train a head on an encoder and measure mean IoU.

The defaults are MAE's protocol on ADE20K (arXiv 2111.06377, appendix A.4): UPerNet, end to end.
"""

import math
from collections.abc import Iterator, Sequence
from hashlib import sha256

import numpy as np
import torch
from jaxtyping import Int, Shaped
from rich.console import Console
from torch import Tensor

from pixmim.data.bad_images import BadImageLog
from pixmim.evaluation.classification import shares, shortened_list, warn_shared
from pixmim.evaluation.context import SKIPPED_FILE, EvalContext, Values, bad_image_log, checked_once, discard
from pixmim.evaluation.segmentation.dataset import IGNORE, SegmentationDataset, open_segmentation
from pixmim.evaluation.segmentation.model import segment
from pixmim.evaluation.segmentation.train import build, fit
from pixmim.evaluation.settings import SegmentationSettings
from pixmim.evaluation.visualize import draw_segmentations, to_rgb
from pixmim.utils.console import print_plain, progress
from pixmim.utils.errors import UserError
from pixmim.utils.threads import ThreadPool, num_threads, ordered_map

_DRAWN = 6  # test images in the report

Checked = tuple[SegmentationDataset, SegmentationDataset, BadImageLog, BadImageLog, tuple[str, str]]
"""Train and test images, all read once, with the logs of those that cannot be used; and digests of their masks."""


@checked_once
def check_segmentation(context: EvalContext, settings: SegmentationSettings) -> Checked:
    """Read all images and masks and build the model, before anything is trained. Raises UserError."""
    spec, console = context.encoder.image_spec, context.console
    train = open_segmentation(settings.train, spec, "training", ignore=settings.ignore, foreground=settings.foreground)
    test = open_segmentation(settings.test, spec, "validation", train.classes, table=train.table)
    build(context.encoder, settings, len(train.classes))
    warn_shared(train.source, test.source, console)
    skipped = [bad_image_log(data, context.folder / SKIPPED_FILE) for data in (train, test)]
    digests = check_masks(train, skipped[0], "train", console), check_masks(test, skipped[1], "test", console)
    return train, test, skipped[0], skipped[1], digests


def evaluate_segmentation(context: EvalContext, settings: SegmentationSettings) -> Values:
    """Train a head and yield `segmentation_metrics` over the pixels of all test images, and the number of these."""
    encoder, console = context.encoder, context.console
    train, test, train_skipped, skipped, (digest, _) = check_segmentation(context, settings)
    model, size = build(encoder, settings, len(train.classes))
    folder = context.work_dir("segmentation", settings, digest)
    fit(model, encoder, settings, train, size, folder=folder, skipped=train_skipped, console=console)
    model.eval()

    names, rows = train.classes, []
    drawn = set(np.linspace(0, len(test) - 1, _DRAWN).round().astype(int).tolist())
    matrix = torch.zeros(len(names), len(names), dtype=torch.int64, device=encoder.device)
    with progress(f"segments {test.spec}", len(test), console) as advance:
        for index, pair in iterate_pairs(test, skipped):
            image, truth = pair[:-1], pair[-1].to(encoder.device, torch.int64)
            prediction = segment(model, encoder, image, size)
            matrix += confusion_matrix(prediction, truth, len(names))
            if index in drawn:
                rows.append((to_rgb(image, encoder.config), truth.cpu().numpy(), prediction.cpu().numpy()))
            advance(index + 1)
    if rows:
        caption = f"Segmentation with the {settings.head} head: image, mask, prediction"
        context.images[caption] = draw_segmentations(rows, names)
    discard(folder)
    yield from segmentation_metrics(matrix.cpu(), names).items()
    yield "images", len(test) - len(skipped)


def check_masks(pairs: SegmentationDataset, skipped: BadImageLog, split: str, console: Console | None) -> str:
    """Read all images and masks; print classes, their shares of the pixels, and what is left out.

    Returns a digest of the images' names and of all masks. Raises UserError.
    """
    counts, digest = torch.zeros(256, dtype=torch.int64), sha256(f"{pairs.fingerprint()} {pairs.classes}".encode())
    with progress(f"checks {pairs.spec}", len(pairs), console) as advance:
        for index, pair in iterate_pairs(pairs, skipped):
            counts += torch.bincount(pair[-1].to(torch.int64).flatten(), minlength=256)
            digest.update(pair[-1].numpy().tobytes())
            advance(index + 1)
    pixels, ignored = counts[: len(pairs.classes)].tolist(), int(counts[IGNORE])
    share = f"; {100 * ignored / int(counts.sum()):.1f} % of the pixels do not count" if ignored else ""
    used = f"{len(pairs) - len(skipped):,} images of {shares(pairs.classes, pixels)}"
    print_plain(console, f"{split} masks: {used}{share}{f'; {pairs.left_out}' * bool(pairs.left_out)}")
    if len(skipped):
        print_plain(console, f"  {len(skipped):,} of {len(pairs):,} images are left out: {skipped.reasons}")
    empty = [name for name, count in zip(pairs.classes, pixels, strict=True) if not count]
    if len(pixels) - len(empty) < 2:
        values = f" The files contain {pairs.values()}." if pairs.values is not None else ""
        found = f"pixels of {len(pixels) - len(empty)} class; two are needed{share}"
        raise UserError(
            f"the masks of {pairs.spec} have {found}.{values} Add --foreground 255 if 255 is the object, or --ignore "
            "none if each value is a class"
        )
    if empty:
        mark, effect = ("warning: ", "cannot be learned") if split == "train" else ("  ", "have no IoU")
        print_plain(console, f"{mark}{len(empty)} classes without a pixel {effect}: {shortened_list(empty)}")
    return digest.hexdigest()


def iterate_pairs(
    pairs: SegmentationDataset, skipped: BadImageLog, threads: int = 0
) -> Iterator[tuple[int, Shaped[Tensor, "c h w"]]]:
    """Yield index, and image with mask, in order, read ahead by threads; log and skip what cannot be read."""

    def read(index: int) -> Tensor | None:
        with skipped.attempt(pairs, index):
            return pairs.image(index)
        return None

    with ThreadPool(threads, "pixmim-read") as pool:
        for index, pair in enumerate(ordered_map(pool, read, range(len(pairs)), 2 * num_threads(threads))):
            if pair is not None:
                yield index, pair


def confusion_matrix(
    predicted: Int[Tensor, "*shape"], true: Int[Tensor, "*shape"], classes: int, ignore: int = IGNORE
) -> Int[Tensor, "k k"]:
    """Count the pixels of each true class (row) by predicted class (column), without pixels whose truth is `ignore`."""
    counts = true != ignore
    pairs = true[counts].long() * classes + predicted[counts].long()
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def segmentation_metrics(matrix: Int[Tensor, "k k"], classes: Sequence[str]) -> dict[str, float]:
    """Compute metrics in per cent from a confusion matrix (rows true, columns predicted).

    mIoU: mean IoU of the classes with a true pixel. aAcc: pixel accuracy. mAcc: mean recall of these classes.
    majority: share of the most frequent class. iou/NAME: IoU of each class. Undefined values are NaN.
    """
    m = matrix.double()
    right, true, predicted = m.diagonal(), m.sum(dim=1), m.sum(dim=0)
    iou = torch.where(true > 0, right / (true + predicted - right), math.nan)
    recall = torch.where(true > 0, right / true, math.nan)
    values = {
        "mIoU": iou.nanmean(),
        "aAcc": right.sum() / m.sum(),
        "mAcc": recall.nanmean(),
        "majority": matrix.sum(dim=1).max() / matrix.sum(),
        **{f"iou/{name}": value for name, value in zip(classes, iou, strict=True)},
    }
    return {name: 100 * float(value) for name, value in values.items()}
