"""Who decides what a picture shows: an encoder's own classifier, or a linear probe fitted to its frozen features."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pixmim.data.source import Source
from pixmim.engine.device import autocast
from pixmim.errors import UserError, nearest
from pixmim.evaluate.bench import Bench
from pixmim.evaluate.encoder import Encoder
from pixmim.evaluate.features import BLOCKS
from pixmim.evaluate.imagenet import wnids
from pixmim.evaluate.linear import fitted
from pixmim.models import features


@dataclass(frozen=True)
class Judge:
    """A classifier of pictures.

    kind     "head": the encoder's own; "probe": fitted here
    classes  names of what it tells apart, in the order of its scores; empty if nobody knows them
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
    return Judge("head", wnids(), _head(bench.encoder))


def own_head(bench: Bench) -> Judge:
    """The encoder's own classifier; what its classes are called is known for ImageNet's alone."""
    return Judge("head", wnids() if bench.encoder.classes == 1000 else [], _head(bench.encoder))


def probe(bench: Bench, train: str, *, epochs: int, seed: int) -> Judge:
    """A linear probe of the frozen encoder, chosen and fitted on clean pictures: see `linear.choose`."""
    found = fitted(bench, train, epochs, seed)
    encoder = bench.encoder

    def scores(images: Tensor) -> Tensor:
        with torch.no_grad(), autocast(encoder.device, encoder.precision):
            return found.scores(features(encoder.module, encoder.ready(images), BLOCKS))

    encoder.module.eval()
    return Judge("probe", found.classes, scores)


def labels_among(data: Source, classes: list[str]) -> Int[Tensor, " n"]:
    """The label of each picture in the numbers of `classes`. Raises UserError for a class that is not among them."""
    if data.labels is None:
        raise UserError(data.no_labels)
    place = {name: i for i, name in enumerate(classes)}
    for name in data.classes:
        if name not in place:
            raise UserError(
                f"{data.spec} has a class '{name}', which is none of the {len(classes)} that are told apart"
                f"{nearest(name, classes)}"
            )
    return torch.tensor([place[name] for name in data.classes])[torch.from_numpy(data.labels)]


def _head(encoder: Encoder) -> Callable[[Tensor], Tensor]:
    def scores(images: Tensor) -> Tensor:
        with torch.no_grad(), autocast(encoder.device, encoder.precision):
            return encoder.module(encoder.ready(images)).float().cpu()

    encoder.module.eval()
    return scores
