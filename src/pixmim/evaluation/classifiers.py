"""Image classifiers: an encoder's own head, or a linear probe fitted to its frozen features."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pixmim.evaluation.classification import check_classes
from pixmim.evaluation.context import EvalContext
from pixmim.evaluation.features import BLOCKS
from pixmim.evaluation.frozen_encoder import FrozenEncoder
from pixmim.evaluation.imagenet_classes import wnids
from pixmim.evaluation.linear_probe import cached_probe
from pixmim.models import features
from pixmim.training.precision import autocast
from pixmim.utils.errors import UserError


@dataclass(frozen=True)
class ImageClassifier:
    """A classifier of images.

    Attributes:
        kind: "head": the encoder's own; "probe": fitted here.
        classes: Names of its outputs, in order; empty if they are unknown. Data are matched to them by name.
        scores: Returns the logits (b c) of images as the evaluation crop gives them.
    """

    kind: Literal["head", "probe"]
    classes: list[str]
    scores: Callable[[Tensor], Float[Tensor, "b c"]]

    def predict(self, images: Tensor, among: Sequence[int] | None = None) -> Int[Tensor, " b"]:
        """Return the output with the highest score; with `among`, the position in that list of outputs."""
        scores = self.scores(images)
        return (scores if among is None else scores[:, list(among)]).argmax(dim=1)


def imagenet_head(context: EvalContext, what: str) -> ImageClassifier:
    """Return the encoder's own classifier of ImageNet's classes. Raises UserError, naming `what`, if it has none."""
    outputs = context.encoder.classes
    if outputs != 1000:
        has = f"one of {outputs} classes" if outputs else "none"
        raise UserError(
            f"{what} needs a classifier of ImageNet's 1000 classes, and this encoder has {has}: give fine-tuned "
            "weights, or a classifier of timm (timm:NAME)"
        )
    names, own = wnids(), list(context.encoder.names)
    if own and set(own) != set(names):
        unknown = next(name for name in own if name not in set(names))
        raise UserError(f"{what} needs a classifier of ImageNet's classes by WordNet id, and this one has '{unknown}'")
    return ImageClassifier("head", own or names, _head_scores(context.encoder))


def encoder_head(context: EvalContext) -> ImageClassifier:
    """Return the encoder's own classifier. If its file does not name 1000 classes, they are taken for ImageNet's."""
    names = list(context.encoder.names) or (wnids() if context.encoder.classes == 1000 else [])
    return ImageClassifier("head", names, _head_scores(context.encoder))


def probe_classifier(context: EvalContext, train: str, *, epochs: int, seed: int) -> ImageClassifier:
    """Fit a linear probe to the encoder's features of clean images: see `linear_probe.fit_sweep`."""
    check_classes(context.data(train))
    probe = cached_probe(context, train, epochs, seed)
    encoder = context.encoder

    def scores(images: Tensor) -> Tensor:
        with torch.no_grad(), autocast(encoder.device, encoder.precision):
            return probe.scores(features(encoder.module, encoder.preprocess(images), BLOCKS))

    encoder.module.eval()
    return ImageClassifier("probe", probe.classes, scores)


def _head_scores(encoder: FrozenEncoder) -> Callable[[Tensor], Tensor]:
    def scores(images: Tensor) -> Tensor:
        with torch.no_grad(), autocast(encoder.device, encoder.precision):
            return encoder.module(encoder.preprocess(images)).float().cpu()

    encoder.module.eval()
    return scores
