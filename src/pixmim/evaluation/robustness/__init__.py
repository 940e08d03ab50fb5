"""Robustness: ImageNet-C, -A, -R and -Sketch as published, and corruptions made in memory of any images.

ImageNet-C: arXiv 1903.12261. -A: 1907.07174. -R: 2006.16241. -Sketch: 1905.13549.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Int
from rich.console import Console
from torch import Tensor

from pixmim.data.dataset import ImageDataset
from pixmim.evaluation import imagenet_classes as imagenet
from pixmim.evaluation.classification import (
    check_classes,
    labels_among,
    majority,
    open_labeled,
    rated,
    shortened_list,
    wilson_interval,
)
from pixmim.evaluation.classifiers import ImageClassifier, encoder_head, imagenet_head, probe_classifier
from pixmim.evaluation.context import EvalContext, Values, discard
from pixmim.evaluation.robustness.corruptions import CORRUPTIONS, SEVERITIES, check_channels
from pixmim.evaluation.robustness.count import CLEAN, CountsFile, count_correct
from pixmim.evaluation.settings import RobustnessSettings
from pixmim.transforms.crops import CenterCrop, evaluation_crop
from pixmim.utils.console import print_plain
from pixmim.utils.errors import UserError, did_you_mean

ALEXNET = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""AlexNet's error on each corruption of ImageNet-C, mean over the five severities (arXiv 1903.12261)."""


def check_robustness(context: EvalContext, settings: RobustnessSettings) -> None:
    """Raise UserError for data, settings or an encoder that `evaluate_robustness` would refuse; fits nothing.

    The folders of ImageNet-C are looked for, and their images not listed.
    """

    def make() -> None:
        corruptions, severities = _select(settings)
        relatives = _relatives(settings)
        if not (settings.imagenet_c or settings.test or relatives):
            raise UserError("no data given: pass --test, --imagenet-c, --imagenet-a, --imagenet-r or --imagenet-sketch")
        if settings.imagenet_c:
            _find_imagenet_c(context, settings.imagenet_c, corruptions, severities)
        for name, folder in relatives.items():
            _open_imagenet_relative(context, name, folder)
        if settings.test:
            _check_form(context)
            data = context.data(settings.test)
            if _classifier_kind(context, data, settings) == "probe":
                open_labeled(context, settings.train, settings.test)
            else:
                _head_labels(context, data)

    context.cached(("robustness", repr(settings)), make)


def evaluate_robustness(context: EvalContext, settings: RobustnessSettings) -> Values:
    """Evaluate on all data that the settings name; resumes an interrupted evaluation. Raises UserError."""
    check_robustness(context, settings)
    corruptions, severities = _select(settings)
    file = CountsFile(context.work_dir("robustness", settings), context.console)
    if settings.imagenet_c:
        yield from _imagenet_c(context, settings.imagenet_c, corruptions, severities, file)
    for name, folder in _relatives(settings).items():
        yield from _imagenet_relative(context, name, folder, file)
    if settings.test:
        yield from _in_memory(context, settings, corruptions, severities, file)
    discard(file.folder)


def corruption_errors(errors: Mapping[str, Sequence[float]]) -> tuple[dict[str, float], float | None]:
    """Compute ImageNet-C's CE of each corruption and their mean, mCE, in per cent of AlexNet's errors.

    CE is the sum of the errors over the severities, divided by the same sum for AlexNet.

    Args:
        errors: Errors in [0, 1] at each of the five severities, by corruption.

    Returns:
        The CEs, and the mCE; None unless all 15 corruptions are given, because a mean of some is another number.

    Raises:
        ValueError: For other than five severities.
    """
    for name, each in errors.items():
        if len(each) != 5:
            raise ValueError(f"CE takes the errors of five severities, and {name} has {len(each)}")
    ces = {name: 100 * sum(each) / (5 * ALEXNET[name]) for name, each in errors.items()}
    return ces, sum(ces.values()) / len(ces) if ces.keys() == ALEXNET.keys() else None


def _select(settings: RobustnessSettings) -> tuple[list[str], list[int]]:
    for name in settings.corruptions:
        if name not in CORRUPTIONS:
            known = ", ".join(CORRUPTIONS)
            raise UserError(f"there is no corruption '{name}'{did_you_mean(name, CORRUPTIONS)} Known: {known}")
    if not settings.severities:
        raise UserError("--severities takes some of 1, 2, 3, 4 and 5")
    corruptions = [name for name in CORRUPTIONS if name in (settings.corruptions or CORRUPTIONS)]
    return corruptions, sorted(set(settings.severities))


def _relatives(settings: RobustnessSettings) -> dict[str, str]:
    """Return the folders of ImageNet-A, -R and -Sketch that are given, by name."""
    given = {"a": settings.imagenet_a, "r": settings.imagenet_r, "sketch": settings.imagenet_sketch}
    return {name: folder for name, folder in given.items() if folder}


def _find_imagenet_c(
    context: EvalContext, folder: str, corruptions: list[str], severities: list[int]
) -> tuple[ImageClassifier, Path]:
    """Return the classifier and the root of ImageNet-C. Raises UserError for a missing part."""
    classifier = imagenet_head(context, "ImageNet-C")
    root = Path(folder).expanduser()
    missing = [f"{c}/{s}" for c in corruptions for s in severities if not (root / c / str(s)).is_dir()]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of {len(corruptions) * len(severities)} parts of ImageNet-C: "
            f"{shortened_list(missing)}. --corruptions and --severities measure a part; a part has no mCE"
        )
    return classifier, root


def _imagenet_c(
    context: EvalContext, folder: str, corruptions: list[str], severities: list[int], file: CountsFile
) -> Values:
    """Yield errors, CE and mCE on stored images, cropped at the center to the encoder's size without resizing.

    CE needs all severities and classes, because AlexNet's errors were measured so; mCE also needs all corruptions.
    """
    classifier, root = _find_imagenet_c(context, folder, corruptions, severities)
    errors: dict[str, list[float]] = {name: [] for name in corruptions}
    classes, crop = classifier.classes, CenterCrop(context.encoder.size)
    counts, complete = torch.zeros(2, len(classes), dtype=torch.int64), True
    for name in corruptions:
        for severity in severities:
            data = context.data(str(root / name / str(severity)))
            labels = labels_among(data, classes)
            complete = complete and len(data.classes) == len(classes)
            (right,), total = count_correct(context, data, crop, classifier, labels, len(classes), file)
            errors[name].append(1 - float(right.sum() / total.sum()))
            counts += torch.stack([right, total])
            yield f"imagenet_c/severity/{name}/{severity}", 100 * errors[name][-1]
    yield from _by_class(counts, classes, "imagenet_c/")
    means = {name: sum(each) / len(each) for name, each in errors.items()}
    yield "imagenet_c/error", 100 * sum(means.values()) / len(means)
    for name, mean in means.items():
        yield f"imagenet_c/corruption/{name}", 100 * mean
    if complete and severities == list(SEVERITIES):
        ces, mce = corruption_errors(errors)
        for name, ce in ces.items():
            yield f"imagenet_c/ce/{name}", ce
        if mce is not None:
            yield "imagenet_c/mce", mce


def _imagenet_relative(context: EvalContext, name: str, folder: str, file: CountsFile) -> Values:
    """Yield top-1 on ImageNet-A, -R or -Sketch at the evaluation crop; for A and R only their 200 outputs compete."""
    classifier, classes, data, labels = _open_imagenet_relative(context, name, folder)
    among = [classifier.classes.index(wnid) for wnid in classes]
    crop = evaluation_crop(context.encoder.size)
    (right,), total = count_correct(context, data, crop, classifier, labels, len(classes), file, among=among)
    counts = torch.stack([right, total])
    yield from rated(counts, classes, f"imagenet_{name}/")
    yield f"imagenet_{name}/majority", majority(counts)


def _open_imagenet_relative(
    context: EvalContext, name: str, folder: str
) -> tuple[ImageClassifier, list[str], ImageDataset, Int[Tensor, " n"]]:
    """Return the classifier, the classes, the data and their labels. Raises UserError."""
    title = f"ImageNet-{name.upper() if len(name) == 1 else name.title()}"
    classifier = imagenet_head(context, title)
    classes = classifier.classes if name == "sketch" else imagenet.part(name)
    data = context.data(folder)
    labels = labels_among(data, classes)
    missing = [wnid for wnid in classes if wnid not in data.classes]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of the {len(classes)} class folders of {title}: {shortened_list(missing)}"
        )
    return classifier, classes, data, labels


def _by_class(counts: Tensor, names: list[str], key: str) -> Values:
    """Yield the error with all classes weighted alike, each class's recall, and the majority share, in per cent."""
    for name, value in rated(counts, names, key):
        if name == f"{key}balanced":
            yield name, 100 - value
        elif not name.startswith(f"{key}top1"):
            yield name, value
    yield f"{key}majority", majority(counts)


def _in_memory(
    context: EvalContext, settings: RobustnessSettings, corruptions: list[str], severities: list[int], file: CountsFile
) -> Values:
    """Yield errors on images that are corrupted after the evaluation crop, and on clean ones, in per cent.

    Below in_memory/head or in_memory/probe: clean; corruption/NAME, the mean over the severities; error, the mean of
    those; lost, error minus clean in points; times, error over clean; severity/NAME/SEVERITY.
    """
    _check_form(context)
    data = context.data(settings.test)
    classifier, labels, among, names = _select_classifier(context, data, settings)
    variants = [CLEAN, *((name, severity) for name in corruptions for severity in severities)]
    right, total = count_correct(
        context,
        data,
        evaluation_crop(context.encoder.size),
        classifier,
        labels,
        len(names),
        file,
        among=among,
        variants=variants,
        seed=settings.seed,
    )
    images = int(total.sum())
    errors = {variant: 100 * (1 - int(count.sum()) / images) for variant, count in zip(variants, right, strict=True)}
    clean = errors[CLEAN]
    means = {name: sum(errors[name, s] for s in severities) / len(severities) for name in corruptions}
    error = sum(means.values()) / len(means)
    key = f"in_memory/{classifier.kind}"
    low, high = wilson_interval(images - int(right[0].sum()), images)
    yield f"{key}/clean", clean
    yield f"{key}/clean/low", 100 * low
    yield f"{key}/clean/high", 100 * high
    yield from _by_class(torch.stack([right[0], total]), names, f"{key}/clean/")
    yield from _by_class(torch.stack([right[1:].sum(dim=0), total * (len(variants) - 1)]), names, f"{key}/corrupted/")
    yield f"{key}/error", error
    yield f"{key}/lost", error - clean
    yield f"{key}/times", error / clean if clean else float("inf")
    for name, mean in means.items():
        yield f"{key}/corruption/{name}", mean
    for name, severity in variants[1:]:
        yield f"{key}/severity/{name}/{severity}", errors[name, severity]


def _check_form(context: EvalContext) -> None:
    """Raise UserError if the encoder's images cannot be corrupted."""
    form = context.encoder.image_spec
    check_channels(form.channels)
    if form.dtype != "uint8":
        raise UserError(f"corruptions are defined for 8-bit images, and this encoder reads {form.dtype}")


def _classifier_kind(context: EvalContext, data: ImageDataset, settings: RobustnessSettings) -> str:
    """Return "head" or "probe", whichever classifies the test data. Raises UserError for a probe without train data."""
    kind = settings.classifier
    if kind == "auto":
        kind = "head" if _head_knows(context, data) or not settings.train else "probe"
    if kind == "probe" and not settings.train:
        raise UserError("a probe needs labeled clean data: pass --train")
    return kind


def _head_knows(context: EvalContext, data: ImageDataset) -> bool:
    """Return whether the encoder's own classifier has all classes of the data by name."""
    head = encoder_head(context)
    return bool(head.classes) and set(data.classes) <= set(head.classes)


def _head_labels(context: EvalContext, data: ImageDataset) -> tuple[Int[Tensor, " n"], str]:
    """Return the labels of data for the encoder's own classifier, and a line about their classes.

    Raises:
        UserError: If that classifier does not have these classes.
    """
    line = check_classes(data)
    if not _head_knows(context, data):
        if context.encoder.names:
            labels_among(data, encoder_head(context).classes)  # names the class that is missing
        if context.encoder.classes != len(data.classes):
            has = f"a classifier of {context.encoder.classes}" if context.encoder.classes else "no classifier"
            raise UserError(
                f"{data.spec} has {len(data.classes)} classes, and this encoder has {has}: give --train, labeled data "
                "of the same classes to fit a probe to"
            )
    return torch.from_numpy(cast(np.ndarray, data.labels)), line


def _select_classifier(
    context: EvalContext, data: ImageDataset, settings: RobustnessSettings
) -> tuple[ImageClassifier, Int[Tensor, " n"], list[int] | None, list[str]]:
    """Return the classifier of the test data, their labels, the outputs that compete (None: all), and the classes."""
    if _classifier_kind(context, data, settings) == "probe":
        labeled = open_labeled(context, settings.train, settings.test)
        probe = probe_classifier(context, settings.train, epochs=settings.epochs, seed=settings.seed)
        return probe, labeled.wanted, None, labeled.classes
    labels, line = _head_labels(context, data)
    head, console = encoder_head(context), context.console or Console(quiet=True)
    print_plain(console, f"test data: {line}")
    if _head_knows(context, data):
        if len(data.classes) < len(head.classes):
            print_plain(
                console, f"of the {len(head.classes):,} outputs of the classifier, only those of these classes compete"
            )
        return head, labels, [head.classes.index(name) for name in data.classes], data.classes
    print_plain(
        console, "warning: the classifier does not name its classes: its outputs are taken for these in sorted order"
    )
    return head, labels, None, data.classes
