"""All evaluations that suit the data, in one call."""

from dataclasses import dataclass
from typing import Any

from pixmim.evaluation.settings.finetune import Detection, Finetune, Segmentation
from pixmim.evaluation.settings.frozen import Knn, Linear
from pixmim.evaluation.settings.shift import Robustness, Severities, ShapeBias
from pixmim.utils.validation import Data, Settings


@dataclass(frozen=True)
class All(Settings):
    """All that the data given allow: k-NN, linear probe, robustness, and what the other flags ask for, on one page."""

    train: Data
    """Labelled data to learn from."""
    test: Data
    """Labelled data to be measured on."""
    severities: Severities = (1, 2, 3, 4, 5)
    """Of the corruptions made in memory: some of the 5."""
    stimuli: str = ""
    """Cue-conflict stimuli for shape bias; with drawn data (shapes:) they are drawn as well."""
    imagenet_c: str = ""
    """ImageNet-C, as for robustness."""
    imagenet_a: str = ""
    """ImageNet-A, likewise."""
    imagenet_r: str = ""
    """ImageNet-R, likewise."""
    imagenet_sketch: str = ""
    """ImageNet-Sketch, likewise."""
    finetune: bool = False
    """Fine-tune by the published recipe as well: long."""
    pairs: str = ""
    """A folder in ADE20K's layout: segmentation by MAE's protocol as well, long."""
    coco: str = ""
    """The folder of COCO: detection by ViTDet's protocol as well, long."""

    def parts(self) -> list[tuple[str, Any]]:
        """The evaluations that it stands for, by name, with their settings."""
        found: list[tuple[str, Any]] = [
            ("knn", Knn(self.train, self.test)),
            ("linear", Linear(self.train, self.test)),
            (
                "robustness",
                Robustness(
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
            found.append(("shape-bias", ShapeBias(self.stimuli, self.train)))
        elif drawn:  # what either cue solves teaches, and what sets them against each other asks
            train, test = (f"{data}{'' if data.endswith(':') else ','}texture=" for data in (self.train, self.test))
            found.append(("shape-bias", ShapeBias(f"{test}conflict", f"{train}match")))
        if self.finetune:
            found.append(("finetune", Finetune(self.train, self.test)))
        if self.pairs:
            found.append(("segmentation", Segmentation(self.pairs, self.pairs)))
        if self.coco:
            found.append(("detection", Detection(data=self.coco)))
        return found
