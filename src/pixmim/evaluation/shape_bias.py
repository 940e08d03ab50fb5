"""Shape bias on stimuli with the shape of one class and the texture of another (Geirhos et al., arXiv 1811.12231)."""

import math
import re
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from pixmim.data.dataset import ImageDataset
from pixmim.data.synthetic import SyntheticShapes
from pixmim.evaluation.classification import check_classes, labels_among, shortened_list
from pixmim.evaluation.classifiers import CATEGORIES, imagenet_head, probe_classifier, wnids
from pixmim.evaluation.context import EvalContext, Values, read_batches
from pixmim.evaluation.settings import ShapeBiasSettings
from pixmim.transforms.crops import CenterCrop, evaluation_crop
from pixmim.utils.console import plot_label
from pixmim.utils.errors import UserError
from pixmim.utils.plotting import new_plot, plot_image, plot_style

_WITH_HEAD = "shape bias without --train"


def check_shape_bias(context: EvalContext, settings: ShapeBiasSettings) -> None:
    """Raise UserError for stimuli, train data or an encoder that `evaluate_shape_bias` would refuse; fits nothing."""
    if settings.train:
        train = context.data(settings.train)
        check_classes(train)
        names = train.classes
    else:
        imagenet_head(context, _WITH_HEAD)
        names = list(CATEGORIES)
    data = context.data(settings.data)
    _check_conflict(data, *cues(data, names))


def evaluate_shape_bias(context: EvalContext, settings: ShapeBiasSettings) -> Values:
    """Yield the shape bias and the decisions behind it, in per cent, for all stimuli and for those of each shape.

    With the encoder's own classifier of ImageNet, a category's probability is the mean over its classes, and the
    complete stimulus is used. A probe ("probe/" before the names: an adaptation of the protocol) uses the evaluation
    crop, as in fitting. Draws the plot of categories. Raises UserError.
    """
    data = context.data(settings.data)
    if settings.train:
        classifier = probe_classifier(context, settings.train, epochs=settings.epochs, seed=settings.seed)
        names, groups, crop = classifier.classes, None, evaluation_crop(context.encoder.size)
    else:
        classifier = imagenet_head(context, _WITH_HEAD)
        output = {name: i for i, name in enumerate(classifier.classes)}
        outputs = [output[wnid] for wnid in wnids()]
        groups = [tuple(outputs[index] for index in category) for category in CATEGORIES.values()]
        names, crop = list(CATEGORIES), CenterCrop(context.encoder.size)
    shapes, textures = cues(data, names)
    readable, predictions = [], []
    for images, indices, _ in read_batches(data, crop, context.skipped(data), "shape bias on", context.console):
        scores = classifier.scores(images)
        predictions.append((scores if groups is None else categories(scores, groups)).argmax(dim=1))
        readable.append(torch.from_numpy(indices))
    order, predicted = torch.cat(readable), torch.cat(predictions)
    shapes, textures = shapes[order], textures[order]
    _check_conflict(data, shapes, textures)
    kind, conflict = classifier.kind, shapes != textures
    decisions = shape_decisions(predicted, shapes, textures)
    yield from _decided(kind, *decisions)
    yield f"{kind}/stimuli", float(conflict.sum())
    counts = torch.bincount(shapes[conflict])
    yield f"{kind}/majority", 100 * float(counts.max() / counts.sum())
    biases: dict[str, float] = {}
    for i, name in enumerate(names):
        rows = shapes == i
        if bool((rows & conflict).any()):
            by_shape, by_texture, biases[name] = shape_decisions(predicted[rows], shapes[rows], textures[rows])
            yield from _decided(f"{kind}/category/{name}", by_shape, by_texture, biases[name])
    yield f"{kind}/balanced", 100 * float(torch.tensor(list(biases.values()), dtype=torch.float64).nanmean())
    title = "its own classifier" if kind == "head" else "a linear probe"
    context.images[f"Shape bias by category, {title}"] = draw(biases, decisions[2])


def _decided(key: str, by_shape: float, by_texture: float, bias: float) -> Values:
    yield f"{key}/shape_bias", 100 * bias
    yield f"{key}/shape", 100 * by_shape
    yield f"{key}/texture", 100 * by_texture


def _check_conflict(data: ImageDataset, shapes: Int[Tensor, " n"], textures: Int[Tensor, " n"]) -> None:
    if not bool((shapes != textures).any()):
        raise UserError(f"in {data.spec} shape and texture agree in every stimulus: pass stimuli with conflicting cues")


def shape_decisions(
    predictions: Int[Tensor, " n"], shapes: Int[Tensor, " n"], textures: Int[Tensor, " n"]
) -> tuple[float, float, float]:
    """Return the shares of predictions of the shape and of the texture, and the shape bias: shape / (shape + texture).

    All in [0, 1]. Stimuli whose shape and texture agree are left out. Shape bias is NaN without predictions of either;
    all three are NaN if no stimulus is left (arXiv 1811.12231).
    """
    conflict = shapes != textures
    total = int(conflict.sum())
    by_shape = int((conflict & (predictions == shapes)).sum())
    by_texture = int((conflict & (predictions == textures)).sum())
    decisions = by_shape + by_texture
    if not total:
        return math.nan, math.nan, math.nan
    return by_shape / total, by_texture / total, by_shape / decisions if decisions else math.nan


def cues(data: ImageDataset, names: list[str]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Return shape and texture of each stimulus as indices into `names`, by file names or shapes:. Raises UserError."""
    shapes = labels_among(data, names)
    number = {name.lower(): i for i, name in enumerate(names)} | {name: i for i, name in enumerate(names)}
    longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    after_shape, textures = re.compile(rf"\d*-({longest_first})\d*", re.IGNORECASE), []
    drawn = lru_cache(lambda source: source.texture_labels)  # computed on each access
    for i in range(len(data)):
        source, inside = data.locate(i)
        if isinstance(source, SyntheticShapes):  # shape and texture with the same number are one class where they agree
            textures.append(number[source.classes[drawn(source)[inside]]])
            continue
        path, shape = Path(data.path_of(i)), names[int(shapes[i])]
        named = path.stem.lower().startswith(shape.lower())
        match = after_shape.fullmatch(path.stem[len(shape) :]) if named else None
        if match is None:
            raise UserError(
                f"{path}: a stimulus of the shape {shape} is named {shape}1-TEXTURE2.png, with one of the classes as "
                f"texture: {shortened_list(names)}"
            )
        textures.append(number[match[1]] if match[1] in number else number[match[1].lower()])
    return shapes, torch.tensor(textures)


def categories(scores: Float[Tensor, "b c"], groups: list[tuple[int, ...]]) -> Float[Tensor, "b k"]:
    """Return the mean probability of each group of classes."""
    probabilities = scores.softmax(dim=1)
    return torch.stack([probabilities[:, list(group)].mean(dim=1) for group in groups], dim=1)


@plot_style()
def draw(biases: dict[str, float], bias: float) -> Image.Image:
    """Draw one row per category with a dot at its shape bias, and a line at the shape bias of all."""
    figure, axes = new_plot(5.2, 0.9 + 0.26 * len(biases))
    axes.grid(visible=False)
    rows = range(len(biases))
    axes.hlines(rows, 0, 100, color="#e6e6e6", linewidth=1, zorder=0)
    axes.scatter([100 * value for value in biases.values()], rows, color="#1f5fbf", s=34, zorder=2)
    axes.axvline(100 * bias, color="#d1495b", linewidth=1.6, zorder=1)
    axes.annotate(
        f"all: {100 * bias:.1f} %", (100 * bias, 1), xycoords=("data", "axes fraction"), xytext=(4, 3),
        textcoords="offset points", color="#d1495b", fontsize=9, annotation_clip=False,
    )  # fmt: skip
    axes.set(xlim=(-2, 102), xlabel="share of shape in decisions for shape or texture (%)", yticks=list(rows))
    axes.set_yticklabels([plot_label(name) for name in biases])
    axes.invert_yaxis()
    axes.spines["left"].set_visible(False)
    axes.tick_params(left=False)
    return plot_image(figure)
