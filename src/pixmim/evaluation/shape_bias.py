"""Shape bias on stimuli with the shape of one class and the texture of another (Geirhos et al., arXiv 1811.12231)."""

import math
import re
from pathlib import Path

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from pixmim.data.dataset import ImageDataset
from pixmim.data.loader import iterate_in_order
from pixmim.data.synthetic import SyntheticShapes
from pixmim.evaluation.classification import check_classes, labels_among
from pixmim.evaluation.classifiers import ImageClassifier, imagenet_head, probe_classifier
from pixmim.evaluation.context import EvalContext, Values
from pixmim.evaluation.imagenet_classes import CATEGORIES, wnids
from pixmim.evaluation.settings import ShapeBiasSettings
from pixmim.transforms.crops import CenterCrop, evaluation_crop
from pixmim.utils.console import plot_label, progress
from pixmim.utils.errors import UserError
from pixmim.utils.plotting import new_plot, plot_image

_WITH_HEAD = "shape bias without --train"
_STIMULUS = re.compile(r"([a-z]+)\d*-([a-z]+)\d*", re.IGNORECASE)


def check_shape_bias(context: EvalContext, settings: ShapeBiasSettings) -> None:
    """Raise UserError for stimuli, train data or an encoder that `evaluate_shape_bias` would refuse; fits nothing."""
    data = context.data(settings.data)
    if settings.train:
        train = context.data(settings.train)
        check_classes(train)
        names = train.classes
    else:
        imagenet_head(context, _WITH_HEAD)
        names = list(CATEGORIES)
    _check_conflict(data, *cues(data, names))


def evaluate_shape_bias(context: EvalContext, settings: ShapeBiasSettings) -> Values:
    """Yield the shape bias and the decisions behind it, in per cent, for all stimuli and for those of each shape.

    With the encoder's own classifier of ImageNet, a category's probability is the mean over its classes, and the
    complete stimulus is seen. A probe ("probe/" before the names: an adaptation of the protocol) sees the evaluation
    crop, as in fitting. Draws the plot of categories. Raises UserError.
    """
    data = context.data(settings.data)
    if settings.train:
        classifier = probe_classifier(context, settings.train, epochs=settings.epochs, seed=settings.seed)
        names, groups, crop = classifier.classes, None, evaluation_crop(context.encoder.size)
    else:
        classifier = imagenet_head(context, _WITH_HEAD)
        place = {name: i for i, name in enumerate(classifier.classes)}
        ours = [place[wnid] for wnid in wnids()]
        groups = [tuple(ours[number] for number in group) for group in CATEGORIES.values()]
        names, crop = list(CATEGORIES), CenterCrop(context.encoder.size)
    shapes, textures = cues(data, names)
    seen, answers = [], []
    with progress(data.spec, len(data), context.console) as advance:
        for images, indices, end in iterate_in_order(data, crop, skipped=context.skipped(data), batch=256):
            if len(indices):
                answers.append(_answers(classifier, images, groups))
                seen.append(torch.from_numpy(indices))
            advance(end)
    if not seen:
        raise UserError(f"not one stimulus of {data.spec} can be read")
    order, given = torch.cat(seen), torch.cat(answers)
    shapes, textures = shapes[order], textures[order]
    _check_conflict(data, shapes, textures)
    by_shape, by_texture, bias = shape_decisions(given, shapes, textures)
    yield f"{classifier.kind}/shape_bias", 100 * bias
    yield f"{classifier.kind}/shape", 100 * by_shape
    yield f"{classifier.kind}/texture", 100 * by_texture
    yield f"{classifier.kind}/stimuli", float((shapes != textures).sum())
    counts = torch.bincount(shapes[shapes != textures])
    yield f"{classifier.kind}/majority", 100 * float(counts.max() / counts.sum())
    each: dict[str, float] = {}
    for i, name in enumerate(names):
        mine = shapes == i
        if bool((mine & (shapes != textures)).any()):
            by_shape, by_texture, each[name] = shape_decisions(given[mine], shapes[mine], textures[mine])
            yield f"{classifier.kind}/category/{name}/shape_bias", 100 * each[name]
            yield f"{classifier.kind}/category/{name}/shape", 100 * by_shape
            yield f"{classifier.kind}/category/{name}/texture", 100 * by_texture
    yield f"{classifier.kind}/balanced", 100 * float(torch.tensor(list(each.values()), dtype=torch.float64).nanmean())
    who = "its own classifier" if classifier.kind == "head" else "a linear probe"
    context.images[f"Shape bias by category, {who}"] = draw(each, bias)


def _check_conflict(data: ImageDataset, shapes: Int[Tensor, " n"], textures: Int[Tensor, " n"]) -> None:
    if not bool((shapes != textures).any()):
        raise UserError(f"in {data.spec} shape and texture agree in every stimulus: there is nothing to decide")


def shape_decisions(
    answers: Int[Tensor, " n"], shapes: Int[Tensor, " n"], textures: Int[Tensor, " n"]
) -> tuple[float, float, float]:
    """Return the shares of predictions of the shape and of the texture, and the shape bias: shape / (shape + texture).

    All in [0, 1]. Stimuli whose shape and texture agree are left out. Shape bias is NaN if no prediction names either;
    all three are NaN if no stimulus is left (arXiv 1811.12231).
    """
    conflict = shapes != textures
    total = int(conflict.sum())
    by_shape = int((conflict & (answers == shapes)).sum())
    by_texture = int((conflict & (answers == textures)).sum())
    named = by_shape + by_texture
    if not total:
        return math.nan, math.nan, math.nan
    return by_shape / total, by_texture / total, by_shape / named if named else math.nan


def cues(data: ImageDataset, names: list[str]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Return shape and texture of each stimulus as indices into `names`, from file names or from synthetic shapes.

    Raises:
        UserError: If a folder or file is named otherwise.
    """
    shapes = labels_among(data, names)
    if isinstance(data, SyntheticShapes):  # shape and texture with the same number are one class where they agree
        place = torch.tensor([names.index(name) for name in data.classes])
        return shapes, place[torch.from_numpy(data.texture_labels)]
    textures = []
    for index in range(len(data)):
        path = Path(data.path_of(index))
        found = _STIMULUS.fullmatch(path.stem)
        if found is None:
            raise UserError(f"{path}: a stimulus is named SHAPE1-TEXTURE2.png, as cat4-elephant2.png")
        shape, texture = found[1].lower(), found[2].lower()
        if shape != names[int(shapes[index])]:
            raise UserError(f"{path}: its name says the shape is {shape}, and its folder {names[int(shapes[index])]}")
        if texture not in names:
            raise UserError(f"{path}: the texture {texture} is none of the classes: {', '.join(names)}")
        textures.append(names.index(texture))
    return shapes, torch.tensor(textures)


def _answers(classifier: ImageClassifier, images: Tensor, groups: list[tuple[int, ...]] | None) -> Int[Tensor, " b"]:
    return classifier.predict(images) if groups is None else categories(classifier.scores(images), groups).argmax(dim=1)


def categories(scores: Float[Tensor, "b c"], groups: list[tuple[int, ...]]) -> Float[Tensor, "b k"]:
    """Return the mean probability of each group of classes."""
    probabilities = scores.softmax(dim=1)
    return torch.stack([probabilities[:, list(group)].mean(dim=1) for group in groups], dim=1)


def draw(each: dict[str, float], bias: float) -> Image.Image:
    """Draw a row per category, a dot at its share of shape decisions, and a line at the share of all."""
    figure, axes = new_plot(5.2, 0.9 + 0.26 * len(each))
    axes.grid(visible=False)
    rows = range(len(each))
    axes.hlines(rows, 0, 100, color="#e6e6e6", linewidth=1, zorder=0)
    axes.scatter([100 * value for value in each.values()], rows, color="#1f5fbf", s=34, zorder=2)
    axes.axvline(100 * bias, color="#d1495b", linewidth=1.6, zorder=1)
    axes.annotate(
        f"all: {100 * bias:.1f} %", (100 * bias, 1), xycoords=("data", "axes fraction"), xytext=(4, 3),
        textcoords="offset points", color="#d1495b", fontsize=9, annotation_clip=False,
    )  # fmt: skip
    axes.set(xlim=(-2, 102), xlabel="share of shape in decisions for shape or texture (%)", yticks=list(rows))
    axes.set_yticklabels([plot_label(name) for name in each])
    axes.invert_yaxis()
    axes.spines["left"].set_visible(False)
    axes.tick_params(left=False)
    return plot_image(figure)
