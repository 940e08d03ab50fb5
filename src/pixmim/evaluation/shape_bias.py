"""Shape bias on stimuli with the shape of one class and the texture of another (Geirhos et al., arXiv 1811.12231)."""

import re
import warnings
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from pixmim.data.dataset import Source
from pixmim.data.loader import iterate_in_order
from pixmim.data.synthetic import Shapes
from pixmim.evaluation.classification import check_classes
from pixmim.evaluation.classifiers import Judge, imagenet_head, labels_among, probe
from pixmim.evaluation.context import Bench, Values
from pixmim.evaluation.imagenet_classes import CATEGORIES, wnids
from pixmim.evaluation.metrics import shape_decisions
from pixmim.evaluation.settings import ShapeBias
from pixmim.transforms.crops import CentreCrop, evaluation_crop
from pixmim.utils.console import plot_label
from pixmim.utils.errors import UserError
from pixmim.utils.plotting import Figure, FigureCanvasAgg
from pixmim.utils.progress import progress

_ITSELF = "shape bias without --train"
_STIMULUS = re.compile(r"([a-z]+)\d*-([a-z]+)\d*", re.IGNORECASE)


def check(bench: Bench, settings: ShapeBias) -> None:
    """Raise UserError now for stimuli, train data or an encoder that `measure` would refuse. Fits nothing."""
    data = bench.data(settings.data)
    if settings.train:
        train = bench.data(settings.train)
        check_classes(train)
        names = train.classes
    else:
        imagenet_head(bench, _ITSELF)
        names = list(CATEGORIES)
    shapes, textures = cues(data, names)
    _check_conflict(data, shapes, textures)


def _check_conflict(data: Source, shapes: Int[Tensor, " n"], textures: Int[Tensor, " n"]) -> None:
    if not bool((shapes != textures).any()):
        raise UserError(f"in {data.spec} shape and texture agree in every stimulus: there is nothing to decide")


def measure(bench: Bench, settings: ShapeBias) -> Values:
    """Shape bias and the decisions behind it, in per cent, for all stimuli and for those of each shape.

    With an encoder's own classifier of ImageNet a category's probability is the mean of its classes', and the whole
    stimulus is seen. A probe ("probe/" before the names: an adaptation of the protocol) sees the evaluation crop, as
    it did in fitting. Draws the plot of categories. Raises UserError.
    """
    data = bench.data(settings.data)
    if settings.train:
        judge = probe(bench, settings.train, epochs=settings.epochs, seed=settings.seed)
        names, groups, crop = judge.classes, None, evaluation_crop(bench.encoder.size)
    else:
        judge = imagenet_head(bench, _ITSELF)
        place = {name: i for i, name in enumerate(judge.classes)}
        ours = [place[wnid] for wnid in wnids()]
        groups = [tuple(ours[number] for number in group) for group in CATEGORIES.values()]
        names, crop = list(CATEGORIES), CentreCrop(bench.encoder.size)
    shapes, textures = cues(data, names)
    seen, answers = [], []
    with progress(data.spec, len(data), bench.console) as advance:
        for images, indices, end in iterate_in_order(data, crop, skipped=bench.skipped(data), batch=256):
            if len(indices):
                answers.append(_answers(judge, images, groups))
                seen.append(torch.from_numpy(indices))
            advance(end)
    if not seen:
        raise UserError(f"not one stimulus of {data.spec} can be read")
    order, given = torch.cat(seen), torch.cat(answers)
    shapes, textures = shapes[order], textures[order]
    _check_conflict(data, shapes, textures)
    by_shape, by_texture, bias = shape_decisions(given, shapes, textures)
    yield f"{judge.kind}/shape_bias", 100 * bias
    yield f"{judge.kind}/shape", 100 * by_shape
    yield f"{judge.kind}/texture", 100 * by_texture
    yield f"{judge.kind}/stimuli", float((shapes != textures).sum())
    counts = torch.bincount(shapes[shapes != textures])
    yield f"{judge.kind}/majority", 100 * float(counts.max() / counts.sum())
    each: dict[str, float] = {}
    for i, name in enumerate(names):
        mine = shapes == i
        if bool((mine & (shapes != textures)).any()):
            by_shape, by_texture, each[name] = shape_decisions(given[mine], shapes[mine], textures[mine])
            yield f"{judge.kind}/category/{name}/shape_bias", 100 * each[name]
            yield f"{judge.kind}/category/{name}/shape", 100 * by_shape
            yield f"{judge.kind}/category/{name}/texture", 100 * by_texture
    yield f"{judge.kind}/balanced", 100 * float(torch.tensor(list(each.values()), dtype=torch.float64).nanmean())
    who = "its own classifier" if judge.kind == "head" else "a linear probe"
    bench.pictures[f"Shape bias by category, {who}"] = draw(each, bias)


def cues(data: Source, names: list[str]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """Shape and texture of each stimulus, as indices into `names`: from the names of files, or from what drew them.

    Raises UserError for a folder or file that is named otherwise, naming it.
    """
    shapes = labels_among(data, names)
    if isinstance(data, Shapes):  # shape and texture with the same number are one class where they agree
        place = torch.tensor([names.index(name) for name in data.classes])
        return shapes, place[torch.from_numpy(data.texture_labels)]
    textures = []
    for index in range(len(data)):
        path = Path(data.locate(index))
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


def _answers(judge: Judge, images: Tensor, groups: list[tuple[int, ...]] | None) -> Int[Tensor, " b"]:
    return judge.answers(images) if groups is None else categories(judge.scores(images), groups).argmax(dim=1)


def categories(scores: Float[Tensor, "b c"], groups: list[tuple[int, ...]]) -> Float[Tensor, "b k"]:
    """The mean probability of each group of classes."""
    probabilities = scores.softmax(dim=1)
    return torch.stack([probabilities[:, list(group)].mean(dim=1) for group in groups], dim=1)


def draw(each: dict[str, float], bias: float) -> Image.Image:
    """The field's plot: a row for each category, a dot at its share of shape decisions, a line at that of all."""
    figure = Figure(figsize=(5.2, 0.9 + 0.26 * len(each)), dpi=110, layout="constrained")
    axes = figure.add_subplot()
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
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a glyph is missing, or names are long
        canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
