"""Settings of the evaluations, as frozen dataclasses. The text below a field is its `--help`.

Imports no torch, so that `pixmim evaluate NAME --help` answers at once.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pixmim.evaluation.settings_finetune import (
    DetectionSettings,
    FinetuneOverrides,
    FinetuneRecipe,
    FinetuneSettings,
    SegmentationSettings,
)
from pixmim.utils.validation import Count, Data, Integer, LearningRate, Seed, Settings, Threads

DATA_FIELDS = (
    "train",
    "test",
    "data",
    "train_images",
    "test_images",
    "imagenet_c",
    "imagenet_a",
    "imagenet_r",
    "imagenet_sketch",
    "stimuli",
    "pairs",
    "coco",
)
"""Names of settings that hold data, as --data takes them."""

Severities = Annotated[tuple[int, ...], Integer(1, 5)]


@dataclass(frozen=True)
class KnnSettings(Settings):
    """k-NN as in DINO: cosine similarity of frozen features, votes weighted by exp(similarity / 0.07)."""

    train: Data
    """Labeled reference data: a folder with one subfolder per class, or anything else that --data takes."""
    test: Data
    """Labeled data to measure on."""
    k: Annotated[tuple[int, ...], Integer(1, 999_999_999)] = (1, 20)
    """Numbers of neighbors; each gives its own result."""


@dataclass(frozen=True)
class LinearSettings(Settings):
    """Linear probe on the frozen encoder: DINOv2's sweep, the best chosen on a held-out part; or MAE's protocol."""

    train: Data
    """Labeled data to train on."""
    test: Data
    """Labeled data to measure on."""
    protocol: Literal["sweep", "mae"] = "sweep"
    """sweep: many learning rates on cached features. mae: LARS and BatchNorm on augmented images, as published."""
    epochs: Annotated[int | None, Integer(1, 1_000_000)] = None
    """Epochs over the train data. Default: 100 for each member of the sweep; mae: 90."""
    seed: Seed = 0
    """Seed of the held-out part, the order and the crops."""
    batch_size: Annotated[int, Integer(2, 999_999_999)] = 16384
    """mae: images per step, at most the number of train images."""
    base_lr: LearningRate = 0.1
    """mae: learning rate per 256 images of a batch."""
    feature: Literal["auto", "cls", "mean"] = "auto"
    """mae: class token after the final norm, or mean of the patch tokens; auto: the token if there is one."""
    threads: Threads = 0
    """mae: threads that decode images; 0: one per core, at most 16."""


@dataclass(frozen=True)
class RobustnessSettings(Settings):
    """Robustness to corruptions: ImageNet-C, -A, -R, -Sketch, or any labeled images, corrupted in memory."""

    imagenet_c: str = ""
    """ImageNet-C: CORRUPTION/SEVERITY/WNID/*.JPEG. Needs a classifier of ImageNet, as the next three do."""
    imagenet_a: str = ""
    """ImageNet-A: WNID/*.jpg, 200 classes."""
    imagenet_r: str = ""
    """ImageNet-R: WNID/*.jpg, 200 classes."""
    imagenet_sketch: str = ""
    """ImageNet-Sketch: WNID/*.JPEG, 1000 classes."""
    test: str = ""
    """Labeled data to corrupt in memory and measure on."""
    train: str = ""
    """Labeled clean data to fit a linear probe to, if the encoder has no classifier of the test data."""
    classifier: Literal["auto", "head", "probe"] = "auto"
    """Classifier of the test data. head: the encoder's own, class folders in the order of its outputs. probe: a linear
    probe. auto: the head if it is one of ImageNet and the folders are named by WordNet ids, or without --train."""
    corruptions: tuple[str, ...] = ()
    """Names of corruptions, such as gaussian_noise or jpeg_compression. Default: all 15."""
    severities: Severities = (1, 2, 3, 4, 5)
    """Severities, from 1 to 5."""
    epochs: Count = 100
    """Epochs over the train data for each member of the probe's sweep."""
    seed: Seed = 0
    """Seed of the held-out part, the order and the corruptions."""


@dataclass(frozen=True)
class ShapeBiasSettings(Settings):
    """Shape bias: does shape or texture decide, if an image has the shape of one class and the texture of another?"""

    data: Data
    """Cue-conflict stimuli: SHAPE/SHAPE1-TEXTURE2.png; or shapes:texture=conflict."""
    train: str = ""
    """Labeled data of the same classes to fit a linear probe to. Default: the encoder's own classifier of ImageNet.
    For shapes: shapes:texture=match."""
    epochs: Count = 100
    """Epochs over the train data for each member of the probe's sweep."""
    seed: Seed = 0
    """Seed of the held-out part and the order."""


@dataclass(frozen=True)
class EvaluateAllSettings(Settings):
    """Run k-NN, linear probe, robustness, and what the other flags ask for, and write one page."""

    train: Data
    """Labeled data to train on."""
    test: Data
    """Labeled data to measure on."""
    severities: Severities = (1, 2, 3, 4, 5)
    """Severities of the corruptions made in memory, from 1 to 5."""
    stimuli: str = ""
    """Cue-conflict stimuli for shape bias. With shapes: as data, they are made."""
    imagenet_c: str = ""
    """ImageNet-C, as for robustness."""
    imagenet_a: str = ""
    """ImageNet-A, likewise."""
    imagenet_r: str = ""
    """ImageNet-R, likewise."""
    imagenet_sketch: str = ""
    """ImageNet-Sketch, likewise."""
    finetune: bool = False
    """Fine-tune by the published recipe as well. Takes long."""
    pairs: str = ""
    """A folder in ADE20K's layout: segmentation by MAE's protocol as well. Takes long."""
    coco: str = ""
    """The folder of COCO: detection by ViTDet's protocol as well. Takes long."""

    def parts(self) -> list[tuple[str, Any]]:
        """Return the evaluations by name, with their settings."""
        found: list[tuple[str, Any]] = [
            ("knn", KnnSettings(self.train, self.test)),
            ("linear", LinearSettings(self.train, self.test)),
            (
                "robustness",
                RobustnessSettings(
                    self.imagenet_c,
                    self.imagenet_a,
                    self.imagenet_r,
                    self.imagenet_sketch,
                    self.test,
                    self.train,
                    severities=self.severities,
                ),
            ),
        ]
        drawn = all(data.startswith("shapes:") and "texture=" not in data for data in (self.train, self.test))
        if self.stimuli:
            found.append(("shape-bias", ShapeBiasSettings(self.stimuli, self.train)))
        elif drawn:  # train where both cues agree, test where they conflict
            train, test = (f"{data}{'' if data.endswith(':') else ','}texture=" for data in (self.train, self.test))
            found.append(("shape-bias", ShapeBiasSettings(f"{test}conflict", f"{train}match")))
        if self.finetune:
            found.append(("finetune", FinetuneSettings(self.train, self.test)))
        if self.pairs:
            found.append(("segmentation", SegmentationSettings(self.pairs, self.pairs)))
        if self.coco:
            found.append(("detection", DetectionSettings(data=self.coco)))
        return found


__all__ = [
    "DATA_FIELDS",
    "DetectionSettings",
    "EvaluateAllSettings",
    "FinetuneOverrides",
    "FinetuneRecipe",
    "FinetuneSettings",
    "KnnSettings",
    "LinearSettings",
    "RobustnessSettings",
    "SegmentationSettings",
    "ShapeBiasSettings",
]
