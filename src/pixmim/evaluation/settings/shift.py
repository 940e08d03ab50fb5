"""Settings of what shows an encoder other pictures than it learnt from."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pixmim.utils.validation import Count, Data, Seed, Settings, Whole

Severities = Annotated[tuple[int, ...], Whole(1, 5)]


@dataclass(frozen=True)
class Robustness(Settings):
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
    severities: Severities = (1, 2, 3, 4, 5)
    """Some of the 5."""
    epochs: Count = 100
    """Passes over the train data for each member of the probe's sweep."""
    seed: Seed = 0
    """Decides the part held out, the order, and what is random in the corruptions."""


@dataclass(frozen=True)
class ShapeBias(Settings):
    """Whether shape or texture decides, where a picture has the shape of one class and the texture of another."""

    data: Data
    """Cue-conflict stimuli: SHAPE/SHAPE1-TEXTURE2.png; or shapes:texture=conflict."""
    train: str = ""
    """Labelled data of the same classes that a linear probe is fitted to; without, the encoder's own classifier of
    ImageNet decides. For shapes: shapes:texture=match."""
    epochs: Count = 100
    """Passes over the train data for each member of the probe's sweep."""
    seed: Seed = 0
    """Decides the part held out, and the order."""
