"""Robustness: ImageNet-C, -A, -R and -Sketch as published, and any labeled images corrupted in memory.

ImageNet-C: arXiv 1903.12261. -A: 1907.07174. -R: 2006.16241. -Sketch: 1905.13549.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from pixmim.data import open_dataset
from pixmim.evaluation.classification import (
    check_classes,
    labels_among,
    majority,
    open_labeled,
    rated,
    shortened_list,
    wilson_interval,
)
from pixmim.evaluation.classifiers import (
    ImageClassifier,
    Kind,
    encoder_head,
    imagenet_head,
    probe_classifier,
    subset_wnids,
)
from pixmim.evaluation.context import EvalContext, Values, checked_once, describe_labels, discard
from pixmim.evaluation.robustness.corruptions import CORRUPTIONS, SEVERITIES, check_corruption
from pixmim.evaluation.robustness.count import CLEAN, CountsFile, LabeledImages, count_correct
from pixmim.evaluation.settings import RobustnessSettings
from pixmim.transforms.crops import CenterCrop, evaluation_crop
from pixmim.utils.errors import UserError

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
"""AlexNet's error on each corruption of ImageNet-C, averaged over the five severities (arXiv 1903.12261)."""


@checked_once
def check_robustness(context: EvalContext, settings: RobustnessSettings) -> tuple[Kind, LabeledImages] | None:
    """Check data, settings and encoder without fitting or measuring; images of ImageNet-C are not listed.

    If --test is given, returns the kind of classifier and the images to corrupt in memory. Raises UserError.
    """
    _select(settings)
    if settings.imagenet_c:
        _find_imagenet_c(context, settings)
    for name, folder in _relatives(settings).items():
        _open_relative(context, name, folder)
    if settings.test:
        return _open_test(context, settings)
    if not (settings.imagenet_c or _relatives(settings)):
        raise UserError("no data given: pass --test, --imagenet-c, --imagenet-a, --imagenet-r or --imagenet-sketch")
    return None


def evaluate_robustness(context: EvalContext, settings: RobustnessSettings) -> Values:
    """Evaluate on all data of the settings; resumes an interrupted evaluation. Raises UserError."""
    in_memory = check_robustness(context, settings)
    truth = describe_labels(context.data(settings.train)) if settings.train else ""
    file = CountsFile(context.work_dir("robustness", settings, truth), context.console)
    if settings.imagenet_c:
        yield from _imagenet_c(context, settings, file)
    for name, folder in _relatives(settings).items():
        classifier, relative = _open_relative(context, name, folder)
        (correct,), total = count_correct(context, relative, classifier, evaluation_crop(context.encoder.size), file)
        counts = torch.stack([correct, total])
        yield from rated(counts, relative.classes, f"imagenet_{name}/")
        yield f"imagenet_{name}/majority", majority(counts)
    if in_memory is not None:
        yield from _in_memory(context, settings, *in_memory, file)
    discard(file.folder)


def corruption_errors(errors: Mapping[str, Sequence[float]]) -> tuple[dict[str, float], float | None]:
    """Compute the CE of each corruption and their mean, mCE, in per cent of AlexNet's errors (arXiv 1903.12261).

    CE is the sum of the errors, in [0, 1], over the five severities, divided by the same sum for AlexNet. Of fewer than
    15 corruptions there is no mCE, because the mean of a part is not comparable. Raises ValueError for others.
    """
    for name, values in errors.items():
        if len(values) != 5:
            raise ValueError(f"CE takes the errors of five severities, and {name} has {len(values)}")
    ces = {name: 100 * sum(values) / (5 * ALEXNET[name]) for name, values in errors.items()}
    return ces, sum(ces.values()) / len(ces) if ces.keys() == ALEXNET.keys() else None


def _select(settings: RobustnessSettings) -> tuple[list[str], list[int]]:
    """Return corruptions in the order of CORRUPTIONS, and sorted severities."""
    for name in settings.corruptions:
        check_corruption(name)
    if not settings.severities:
        raise UserError("--severities takes some of 1, 2, 3, 4 and 5")
    corruptions = [name for name in CORRUPTIONS if name in (settings.corruptions or CORRUPTIONS)]
    return corruptions, sorted(set(settings.severities))


def _relatives(settings: RobustnessSettings) -> dict[str, str]:
    """Return the given folders of ImageNet-A, -R and -Sketch by name."""
    folders = {"a": settings.imagenet_a, "r": settings.imagenet_r, "sketch": settings.imagenet_sketch}
    return {name: folder for name, folder in folders.items() if folder}


def _find_imagenet_c(context: EvalContext, settings: RobustnessSettings) -> tuple[ImageClassifier, Path]:
    classifier = imagenet_head(context, "ImageNet-C")
    root, (corruptions, severities) = Path(settings.imagenet_c).expanduser(), _select(settings)
    parts = [f"{name}/{severity}" for name in corruptions for severity in severities]
    missing = [part for part in parts if not (root / part).is_dir()]
    if missing:
        raise UserError(
            f"{root} lacks {len(missing)} of {len(parts)} parts of ImageNet-C: {shortened_list(missing)}. "
            "--corruptions and --severities select a part, which has no mCE"
        )
    return classifier, root


def _imagenet_c(context: EvalContext, settings: RobustnessSettings, file: CountsFile) -> Values:
    """Yield errors, CE and mCE on stored images of 224 px, which are resized for an encoder of another size.

    CE needs all severities and classes, as AlexNet's errors were measured; mCE also needs all corruptions.
    """
    (classifier, root), (corruptions, severities) = _find_imagenet_c(context, settings), _select(settings)
    errors: dict[str, list[float]] = {name: [] for name in corruptions}
    classes, crop = classifier.classes, CenterCrop(context.encoder.size)
    counts, complete = torch.zeros(2, len(classes), dtype=torch.int64), severities == list(SEVERITIES)
    for name in corruptions:
        for severity in severities:
            data = open_dataset(str(root / name / str(severity)), context.encoder.image_spec)
            images = LabeledImages(data, labels_among(data, classes), classes)
            complete = complete and len(data.classes) == len(classes)
            (correct,), total = count_correct(context, images, classifier, crop, file)
            errors[name].append(1 - float(correct.sum() / total.sum()))
            counts += torch.stack([correct, total])
            yield f"imagenet_c/severity/{name}/{severity}", 100 * errors[name][-1]
    yield from _class_values(counts, classes, "imagenet_c/")
    means = {name: sum(values) / len(values) for name, values in errors.items()}
    yield "imagenet_c/error", 100 * sum(means.values()) / len(means)
    yield from ((f"imagenet_c/corruption/{name}", 100 * mean) for name, mean in means.items())
    if complete:
        ces, mce = corruption_errors(errors)
        yield from ((f"imagenet_c/ce/{name}", ce) for name, ce in ces.items())
        if mce is not None:
            yield "imagenet_c/mce", mce


def _open_relative(context: EvalContext, name: str, folder: str) -> tuple[ImageClassifier, LabeledImages]:
    """Open ImageNet-A, -R or -Sketch; for A and R only the outputs of their 200 classes compete."""
    title = f"ImageNet-{name.upper() if len(name) == 1 else name.title()}"
    classifier, data = imagenet_head(context, title), context.data(folder)
    classes = classifier.classes if name == "sketch" else subset_wnids("a" if name == "a" else "r")
    labels = labels_among(data, classes)
    missing = [wnid for wnid in classes if wnid not in data.classes]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of the {len(classes)} class folders of {title}: {shortened_list(missing)}"
        )
    return classifier, LabeledImages(data, labels, classes, [classifier.classes.index(wnid) for wnid in classes])


def _open_test(context: EvalContext, settings: RobustnessSettings) -> tuple[Kind, LabeledImages]:
    """Open the images to corrupt, and print their classes.

    The encoder's head is preferred to a probe if it has all classes of the data by name. Raises UserError.
    """
    encoder = context.encoder
    spec = encoder.image_spec
    if spec.channels not in (1, 3) or spec.dtype != "uint8":
        raise UserError(
            f"corruptions need images of 1 or 3 channels of 8 bits, and this encoder reads {spec.channels} of "
            f"{spec.dtype}: leave them out of `evaluate all` with --no-corruptions"
        )
    data, names = context.data(settings.test), encoder_head(context).classes
    used = set[str]() if data.labels is None else {data.classes[label] for label in np.unique(data.labels)}
    named, kind = bool(names) and used <= set(names), settings.classifier
    if kind == "probe" or (kind == "auto" and settings.train and not named):
        if not settings.train:
            raise UserError("a probe needs labeled clean data: pass --train")
        splits = open_labeled(context, settings.train, settings.test)
        return "probe", LabeledImages(data, splits.test_labels, splits.classes)
    line, labels = check_classes(data), torch.from_numpy(cast(np.ndarray, data.labels))
    if encoder.names and not named:
        labels_among(data, names)  # raises UserError with the name of the missing class
    if not named and encoder.classes != len(data.classes):
        actual = f"a classifier of {encoder.classes}" if encoder.classes else "no classifier"
        raise UserError(
            f"{data.spec} has {len(data.classes)} classes, and this encoder has {actual}: pass --train, labeled data "
            "of the same classes to fit a probe to"
        )
    context.print(f"test data: {line}")
    if not named:
        context.print("warning: the classifier does not name its classes; using the class folders in sorted order")
        return "head", LabeledImages(data, labels, data.classes)
    known = [name for name in data.classes if name in names]
    if len(known) < len(names):
        context.print(f"only the outputs of these classes compete, of {len(names):,} outputs of the classifier")
    return "head", LabeledImages(data, labels_among(data, known), known, [names.index(name) for name in known])


def _in_memory(
    context: EvalContext, settings: RobustnessSettings, kind: Kind, images: LabeledImages, file: CountsFile
) -> Values:
    """Yield errors on clean images and on images corrupted after the evaluation crop, in per cent.

    Below in_memory/head or in_memory/probe: clean; corruption/NAME, the mean over the severities; error, their mean;
    lost, error minus clean in points; times, error over clean; severity/NAME/SEVERITY.
    """
    if kind == "head":
        classifier = encoder_head(context)
    else:
        classifier = probe_classifier(context, settings.train, epochs=settings.epochs, seed=settings.seed)
    corruptions, severities = _select(settings)
    variants = [CLEAN, *((name, severity) for name in corruptions for severity in severities)]
    crop = evaluation_crop(context.encoder.size)
    correct, total = count_correct(context, images, classifier, crop, file, variants, settings.seed)
    count = int(total.sum())
    errors = {variant: 100 * (1 - int(c.sum()) / count) for variant, c in zip(variants, correct, strict=True)}
    clean, key = errors[CLEAN], f"in_memory/{kind}"
    means = {name: sum(errors[name, s] for s in severities) / len(severities) for name in corruptions}
    error = sum(means.values()) / len(means)
    low, high = wilson_interval(count - int(correct[0].sum()), count)
    yield f"{key}/clean", clean
    yield f"{key}/clean/low", 100 * low
    yield f"{key}/clean/high", 100 * high
    yield from _class_values(torch.stack([correct[0], total]), images.classes, f"{key}/clean/")
    all_corrupted = torch.stack([correct[1:].sum(dim=0), total * (len(variants) - 1)])
    yield from _class_values(all_corrupted, images.classes, f"{key}/corrupted/")
    yield f"{key}/error", error
    yield f"{key}/lost", error - clean
    yield f"{key}/times", error / clean if clean else float("inf")
    yield from ((f"{key}/corruption/{name}", mean) for name, mean in means.items())
    yield from ((f"{key}/severity/{name}/{severity}", errors[name, severity]) for name, severity in variants[1:])


def _class_values(counts: Tensor, names: list[str], key: str) -> Values:
    """Yield the error with all classes weighted equally, the recall of each class, and the majority share."""
    for name, value in rated(counts, names, key):
        if name == f"{key}balanced":
            yield name, 100 - value
        elif not name.startswith(f"{key}top1"):
            yield name, value
    yield f"{key}majority", majority(counts)
