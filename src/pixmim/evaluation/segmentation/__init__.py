"""Semantic segmentation: a head on an encoder learns from pictures with masks, and is measured by mean IoU.

The defaults are MAE's protocol on ADE20K (arXiv 2111.06377, appendix A.4): UPerNet, end to end.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Shaped
from rich.console import Console
from torch import Tensor

from pixmim.data.bad_images import BadImageLog
from pixmim.data.dataset import BadImage
from pixmim.evaluation.classification import shares, shortened_list, warn_shared
from pixmim.evaluation.context import EvalContext, Values, discard
from pixmim.evaluation.segmentation.dataset import IGNORE, SegmentationDataset, open_segmentation
from pixmim.evaluation.segmentation.metrics import confusion_matrix, segmentation_metrics
from pixmim.evaluation.segmentation.sliding_window import segment
from pixmim.evaluation.segmentation.train import build, fit
from pixmim.evaluation.settings import SegmentationSettings
from pixmim.evaluation.visualize import draw_segmentations, to_rgb
from pixmim.utils.console import print_plain, progress
from pixmim.utils.errors import UserError
from pixmim.utils.threads import ThreadPool, num_threads, ordered_map

_SHOWN = 6  # test pictures in the report


@dataclass(frozen=True)
class CheckedPairs:
    """Train and test pairs, all of them read once.

    Attributes:
        train: Pairs to learn from.
        test: Pairs to measure on.
        train_skipped: Train pairs that are left out.
        test_skipped: Test pairs that are left out.
    """

    train: SegmentationDataset
    test: SegmentationDataset
    train_skipped: BadImageLog
    test_skipped: BadImageLog


def check_segmentation(context: EvalContext, settings: SegmentationSettings) -> CheckedPairs:
    """Open and read all pairs, and build the model, once for a context; trains nothing.

    Raises:
        UserError: For data or settings that do not go together.
    """

    def make() -> CheckedPairs:
        form = context.encoder.image_spec
        train = open_segmentation(
            settings.train, form, "training", ignore=settings.ignore, foreground=settings.foreground
        )
        test = open_segmentation(settings.test, form, "validation", train.classes, table=train.table)
        build(context.encoder, settings, len(train.classes))
        console = context.console or Console(quiet=True)
        warn_shared(train.source, test.source, console)
        found = CheckedPairs(train, test, context.skipped(train), context.skipped(test))
        for pairs, skipped, what in ((train, found.train_skipped, "train"), (test, found.test_skipped, "test")):
            check_masks(pairs, skipped, what, console)
        return found

    return context.cached(("segmentation", repr(settings)), make)


def evaluate_segmentation(context: EvalContext, settings: SegmentationSettings) -> Values:
    """Train a head, and yield mIoU, aAcc, mAcc and each class's IoU in per cent, over all test pixels together.

    Classes without a pixel in the test masks have no IoU, and are left out of the means. Raises UserError for data or
    settings that do not go together.
    """
    encoder, checked = context.encoder, check_segmentation(context, settings)
    train, test, skipped = checked.train, checked.test, checked.test_skipped
    model, size = build(encoder, settings, len(train.classes))
    folder = context.work_dir("segmentation", settings)
    fit(
        model,
        encoder,
        settings,
        train,
        size,
        folder=folder,
        skipped=checked.train_skipped,
        console=context.console,
    )
    model.eval()

    names, rows = train.classes, []
    wanted = set(np.linspace(0, len(test) - 1, _SHOWN).round().astype(int).tolist())
    matrix = torch.zeros(len(names), len(names), dtype=torch.int64, device=encoder.device)
    with progress(f"segments {test.spec}", len(test), context.console) as advance:
        for index, pair in one_by_one(test, skipped):
            truth = pair[-1].to(encoder.device, torch.int64)
            found = segment(model, encoder, pair[:-1], size)
            matrix += confusion_matrix(found, truth, len(names))
            if index in wanted:
                rows.append((to_rgb(pair[:-1], encoder.config), truth.cpu().numpy(), found.cpu().numpy()))
            advance(index + 1)
    if rows:
        caption = f"Segmentation with the {settings.head} head: the image, its mask, the prediction"
        context.images[caption] = draw_segmentations(rows, names)
    discard(folder)
    measured = segmentation_metrics(matrix.cpu())
    yield "mIoU", 100 * measured.mean_iou
    yield "aAcc", 100 * measured.pixel_accuracy
    yield "mAcc", 100 * measured.mean_accuracy
    yield "majority", 100 * float(matrix.sum(dim=1).max() / matrix.sum())
    for name, iou in zip(names, measured.iou.tolist(), strict=True):
        yield f"iou/{name}", 100 * iou
    yield "images", len(test) - len(skipped)


def check_masks(pairs: SegmentationDataset, skipped: BadImageLog, what: str, console: Console) -> None:
    """Read all pairs before training, and print the classes, their shares of the pixels, and what is left out.

    Raises UserError if fewer than two classes have pixels, or too many pairs cannot be used.
    """
    counts = torch.zeros(256, dtype=torch.int64)
    with progress(f"checks {pairs.spec}", len(pairs), console) as advance:
        for index, pair in one_by_one(pairs, skipped):
            counts += torch.bincount(pair[-1].to(torch.int64).flatten(), minlength=256)
            advance(index + 1)
    found, ignored = counts[: len(pairs.classes)].tolist(), int(counts[IGNORE])
    share = f"; {100 * ignored / int(counts.sum()):.1f} % of the pixels do not count" if ignored else ""
    print_plain(console, f"{what} masks: {len(pairs) - len(skipped):,} images of {shares(pairs.classes, found)}{share}")
    if len(skipped):
        print_plain(console, f"  {len(skipped):,} of {len(pairs):,} pairs are left out: {skipped.reasons}")
    there = [name for name, count in zip(pairs.classes, found, strict=True) if count]
    if len(there) < 2:
        held = f" They hold {pairs.values()}." if pairs.values is not None else ""
        raise UserError(
            f"the masks of {pairs.spec} have pixels of {len(there)} class: there is nothing to tell apart{share}."
            f"{held} --foreground 255 makes 255 the object, and --ignore none every value a class"
        )
    without = [name for name in pairs.classes if name not in there]
    if without:
        follows = "they cannot be learned" if what == "train" else "they have no IoU"
        print_plain(
            console,
            f"{'warning: ' if what == 'train' else '  '}{len(without)} classes without a pixel, {follows}: "
            f"{shortened_list(without)}",
        )


def one_by_one(
    pairs: SegmentationDataset, skipped: BadImageLog, threads: int = 0
) -> Iterator[tuple[int, Shaped[Tensor, "c h w"]]]:
    """Every pair in order, read ahead by threads, with its index; what cannot be read is left out and accounted for."""

    def read(index: int) -> Tensor | None:
        try:
            return pairs.image(index)
        except BadImage as error:
            skipped.record(index, pairs.path_of(index), str(error))
            return None

    with ThreadPool(threads, "pixmim-read") as pool:
        for index, pair in enumerate(ordered_map(pool, read, range(len(pairs)), 2 * num_threads(threads))):
            if pair is not None:
                skipped.mark_ok(index)
                yield index, pair
