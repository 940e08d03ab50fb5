"""How a backbone is measured: the settings of each evaluation, as frozen data, and what of its values is shown.

Imports no torch, so that `pixmim evaluate NAME --help` answers at once. The text under each field is its help. The code
of each evaluation stands under its name in `evaluate/`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

DATA = ("train", "test", "data", "imagenet_c", "imagenet_a", "imagenet_r", "imagenet_sketch")
"""Names of settings that hold data, as --data takes them."""


@dataclass(frozen=True)
class Knn:
    """k nearest neighbours vote, as in DINO: cosine similarity of frozen features, votes weighted exp(s / 0.07)."""

    train: str
    """Labelled data that vote: a folder with one subfolder for each class, or whatever else --data takes."""
    test: str
    """Labelled data to be measured on."""
    k: int = 20
    """Neighbours that vote."""


@dataclass(frozen=True)
class Linear:
    """A linear probe on frozen features: DINOv2's sweep, its setting chosen on a part held out from train."""

    train: str
    """Labelled data to learn from."""
    test: str
    """Labelled data to be measured on."""
    epochs: int = 100
    """Passes over the train data for each member of the sweep."""
    seed: int = 0
    """Decides the part held out, and the order."""


@dataclass(frozen=True)
class Robustness:
    """What corruption costs: ImageNet-C, -A, -R, -Sketch, and any labelled images with corruptions made in memory."""

    imagenet_c: str = ""
    """ImageNet-C: CORRUPTION/SEVERITY/WNID/*.JPEG. Needs a classifier of ImageNet, as the next three do."""
    imagenet_a: str = ""
    """ImageNet-A: WNID/*.jpg, 200 classes."""
    imagenet_r: str = ""
    """ImageNet-R: WNID/*.jpg, 200 classes."""
    imagenet_sketch: str = ""
    """ImageNet-Sketch: WNID/*.JPEG, 1000 classes."""
    test: str = ""
    """Labelled data to be corrupted in memory, and measured on."""
    train: str = ""
    """Labelled clean data that a linear probe is fitted to, where the encoder has no classifier of the test data."""
    classifier: Literal["auto", "head", "probe"] = "auto"
    """Of the test data: the encoder's own (their class folders in the order of its outputs), or a probe; auto: its
    own if it is one of ImageNet and the folders are named by WordNet ids, or if no train data are given."""
    corruptions: tuple[str, ...] = ()
    """Some of the 15, by name: gaussian_noise, jpeg_compression ...; otherwise all."""
    severities: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Some of the 5."""
    epochs: int = 100
    """Passes over the train data for each member of the probe's sweep."""
    seed: int = 0
    """Decides the part held out, the order, and what is random in the corruptions."""


@dataclass(frozen=True)
class ShapeBias:
    """Whether shape or texture decides, where a picture has the shape of one class and the texture of another."""

    data: str
    """Cue-conflict stimuli: SHAPE/SHAPE1-TEXTURE2.png; or shapes:texture=conflict."""
    train: str = ""
    """Labelled data of the same classes that a linear probe is fitted to; without, the encoder's own classifier of
    ImageNet decides. For shapes: shapes:texture=match."""
    epochs: int = 100
    """Passes over the train data for each member of the probe's sweep."""
    seed: int = 0
    """Decides the part held out, and the order."""


@dataclass(frozen=True)
class Protocol:
    """An evaluation: its settings, and what a reader is shown of its values.

    shown  labels of values by their keys; a key that ends with * stands for all that begin so, and in its label * is
           the rest. `KEY/low` and `KEY/high`, where given, are the ends of its 95 % interval.
    needs  what a user must have
    """

    settings: type[Any]
    needs: str
    shown: dict[str, str] = field(default_factory=dict)
    unit: str = "%"


PROTOCOLS: dict[str, Protocol] = {
    "knn": Protocol(
        Knn,
        "labelled images: --train, --test",
        {"top1/mean": "k-NN, mean of patch tokens", "top1/cls": "k-NN, class token"},
    ),
    "linear": Protocol(Linear, "labelled images: --train, --test", {"top1": "linear probe"}),
    "robustness": Protocol(
        Robustness,
        "labelled images: --test, --train; or --imagenet-c, -a, -r, -sketch and a classifier of ImageNet",
        {
            "imagenet_c/mce": "ImageNet-C, mCE",
            "imagenet_c/ce/*": "ImageNet-C, CE: *",
            "imagenet_c/error": "ImageNet-C, error",
            "imagenet_a/top1": "ImageNet-A",
            "imagenet_r/top1": "ImageNet-R",
            "imagenet_sketch/top1": "ImageNet-Sketch",
            "in_memory/probe/clean": "error of a probe, clean",
            "in_memory/probe/error": "error of a probe, corrupted in memory",
            "in_memory/probe/corruption/*": "  *",
            "in_memory/head/clean": "error, clean",
            "in_memory/head/error": "error, corrupted in memory",
            "in_memory/head/corruption/*": "  *",
        },
    ),
    "shape-bias": Protocol(
        ShapeBias,
        "cue-conflict stimuli: --data, and for encoders without a classifier of ImageNet: --train",
        {
            "head/shape_bias": "shape bias",
            "head/shape": "decisions for the shape",
            "head/texture": "decisions for the texture",
            "probe/shape_bias": "shape bias of a probe",
            "probe/shape": "decisions of a probe for the shape",
            "probe/texture": "decisions of a probe for the texture",
        },
    ),
}
