"""Who decides what a picture shows: an encoder's own classifier, or a linear probe fitted to its frozen features."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from pixmim.data.dataset import Source
from pixmim.evaluation.classification import check_classes
from pixmim.evaluation.context import Bench
from pixmim.evaluation.features import BLOCKS
from pixmim.evaluation.frozen_encoder import Encoder
from pixmim.evaluation.imagenet_classes import wnids
from pixmim.evaluation.linear_probe import fitted
from pixmim.models import features
from pixmim.training.precision import autocast
from pixmim.utils.errors import UserError, nearest


@dataclass(frozen=True)
class Judge:
    """A classifier of pictures.

    kind     "head": the encoder's own; "probe": fitted here
    classes  names of what it tells apart, in the order of its scores; empty if nobody knows them. Data are matched to
             them by name
    scores   a score of each class (b c) for pictures as they come out of the evaluation crop; a softmax makes
             probabilities of them
    """

    kind: Literal["head", "probe"]
    classes: list[str]
    scores: Callable[[Tensor], Float[Tensor, "b c"]]

    def answers(self, images: Tensor, among: Sequence[int] | None = None) -> Int[Tensor, " b"]:
        """The class with the highest score; of `among`, the place in it: the others do not take part."""
        scores = self.scores(images)
        return (scores if among is None else scores[:, list(among)]).argmax(dim=1)


def imagenet_head(bench: Bench, what: str) -> Judge:
    """The encoder's own classifier of ImageNet's classes. Raises UserError if it has none."""
    found = bench.encoder.classes
    if found != 1000:
        has = f"one of {found} classes" if found else "none"
        raise UserError(
            f"{what} needs a classifier of ImageNet's 1000 classes, and this encoder has {has}: give fine-tuned "
            "weights, or a classifier of timm's (timm:NAME)"
        )
    names, own = wnids(), list(bench.encoder.names)
    if own and set(own) != set(names):
        odd = next(name for name in own if name not in set(names))
        raise UserError(
            f"{what} needs a classifier of ImageNet's classes by their WordNet ids, and one here is '{odd}'"
        )
    return Judge("head", own or names, _head(bench.encoder))


def own_head(bench: Bench) -> Judge:
    """The encoder's own classifier. Its file names its classes, or 1000 of them are taken for ImageNet's."""
    names = list(bench.encoder.names) or (wnids() if bench.encoder.classes == 1000 else [])
    return Judge("head", names, _head(bench.encoder))


def probe(bench: Bench, train: str, *, epochs: int, seed: int) -> Judge:
    """A linear probe of the frozen encoder, chosen and fitted on clean pictures: see `linear.choose`."""
    check_classes(bench.data(train))
    found = fitted(bench, train, epochs, seed)
    encoder = bench.encoder

    def scores(images: Tensor) -> Tensor:
        with torch.no_grad(), autocast(encoder.device, encoder.precision):
            return found.scores(features(encoder.module, encoder.ready(images), BLOCKS))

    encoder.module.eval()
    return Judge("probe", found.classes, scores)


def labels_among(data: Source, classes: list[str]) -> Int[Tensor, " n"]:
    """The label of each picture in the numbers of `classes`.

    Raises UserError for data that `check_classes` refuses, and for classes that are not among them.
    """
    check_classes(data)
    place = {name: i for i, name in enumerate(classes)}
    odd = [name for name in data.classes if name not in place]
    if odd:
        more = f" and {len(odd) - 1:,} more" if len(odd) > 1 else ""
        raise UserError(
            f"{data.spec} has a class '{odd[0]}'{more}, which is none of the {len(classes)} that are told apart"
            f"{nearest(odd[0], classes)}"
        )
    return torch.tensor([place[name] for name in data.classes])[torch.from_numpy(cast(np.ndarray, data.labels))]


def _head(encoder: Encoder) -> Callable[[Tensor], Tensor]:
    def scores(images: Tensor) -> Tensor:
        with torch.no_grad(), autocast(encoder.device, encoder.precision):
            return encoder.module(encoder.ready(images)).float().cpu()

    encoder.module.eval()
    return scores
