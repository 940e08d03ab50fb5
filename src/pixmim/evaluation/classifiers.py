"""Image classifiers: an encoder's own head, or a linear probe on its features; and the classes of ImageNet."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor

from pixmim.evaluation.classification import check_classes
from pixmim.evaluation.context import BLOCKS, EvalContext, check_finite
from pixmim.evaluation.frozen_encoder import FrozenEncoder
from pixmim.evaluation.linear_probe import cached_probe
from pixmim.models import features
from pixmim.utils.errors import UserError


def _ranges(*ranges: tuple[int, int]) -> tuple[int, ...]:
    return tuple(index for first, last in ranges for index in range(first, last + 1))


CATEGORIES: dict[str, tuple[int, ...]] = {
    "airplane": (404,),
    "bear": _ranges((294, 297)),
    "bicycle": (444, 671),
    "bird": _ranges((8, 8), (10, 16), (18, 20), (22, 24), (80, 83), (87, 96), (98, 100), (127, 133), (135, 145)),
    "boat": (472, 554, 625, 814, 914),
    "bottle": (440, 720, 737, 898, 899, 901, 907),
    "car": (436, 511, 817),
    "cat": _ranges((281, 286)),
    "chair": (423, 559, 765, 857),
    "clock": (409, 530, 892),
    "dog": _ranges(
        (152, 191), (193, 203), (205, 226), (228, 241), (243, 250), (252, 257), (259, 259), (261, 263), (265, 268)
    ),
    "elephant": (385, 386),
    "keyboard": (508, 878),
    "knife": (499,),
    "oven": (766,),
    "truck": (555, 569, 656, 675, 717, 734, 864, 867),
}
"""The 16 categories of the cue-conflict stimuli (arXiv 1811.12231), each with its ImageNet classes."""


def wnids() -> list[str]:
    """Return the 1000 WordNet ids of ImageNet in the order of a classifier's outputs, which is sorted."""
    return _timm_info("imagenet_synsets.txt")


def subset_wnids(name: Literal["a", "r"]) -> list[str]:
    """Return the 200 WordNet ids of ImageNet-A or -R, sorted."""
    ids = wnids()
    return [ids[int(index)] for index in _timm_info(f"imagenet_{name}_indices.txt")]


def _timm_info(name: str) -> list[str]:
    return files("timm.data").joinpath("_info", name).read_text().split()


Kind = Literal["head", "probe"]  # classifier of images: the encoder's own head, or a probe that is fitted here


@dataclass(frozen=True)
class ImageClassifier:
    """A classifier of images."""

    kind: Kind
    # names of its outputs, in order, by which datasets are matched; empty if they are unknown
    classes: list[str]
    # logits (b c) of images as the evaluation crop returns them; raises UserError if they are not finite
    scores: Callable[[Tensor], Float[Tensor, "b c"]]

    def predict(self, images: Tensor, outputs: Sequence[int] | None = None) -> Int[Tensor, " b"]:
        """Return the output with the highest score; with `outputs`, the position in that list."""
        scores = self.scores(images)
        return (scores if outputs is None else scores[:, list(outputs)]).argmax(dim=1)


def encoder_head(context: EvalContext) -> ImageClassifier:
    """Return the encoder's own classifier. 1000 outputs without names are taken to be ImageNet's classes."""
    encoder = context.encoder
    names = list(encoder.names) or (wnids() if encoder.classes == 1000 else [])
    return ImageClassifier("head", names, _scores(encoder, lambda images: encoder.module(images).float().cpu()))


def imagenet_head(context: EvalContext, evaluation: str) -> ImageClassifier:
    """Return the encoder's own classifier of ImageNet. Raises UserError, naming the evaluation, if it has none."""
    outputs, head = context.encoder.classes, encoder_head(context)
    if outputs != 1000:
        actual = f"one of {outputs} classes" if outputs else "none"
        raise UserError(
            f"{evaluation} needs a classifier of ImageNet's 1000 classes, and this encoder has {actual}: pass "
            "fine-tuned weights, or a classifier of timm (timm:NAME)"
        )
    if set(head.classes) != set(ids := wnids()):
        name = next((name for name in head.classes if name not in ids), head.classes[0])
        raise UserError(f"{evaluation} needs a classifier of ImageNet's WordNet ids, and this one has '{name}'")
    return head


def probe_classifier(context: EvalContext, train: str, *, epochs: int, seed: int) -> ImageClassifier:
    """Return a linear probe fitted to features of clean images: see `linear_probe.fit_sweep`."""
    check_classes(context.data(train))
    probe, encoder = cached_probe(context, train, epochs, seed), context.encoder
    scores = _scores(encoder, lambda images: probe.scores(features(encoder.module, images, BLOCKS)))
    return ImageClassifier("probe", probe.classes, scores)


def _scores(encoder: FrozenEncoder, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def scores(images: Tensor) -> Tensor:
        with encoder.evaluating():
            result = function(encoder.preprocess(images))
        check_finite(result, "scores of the classifier")
        return result

    return scores
