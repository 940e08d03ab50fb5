"""How a backbone is measured: the settings of each evaluation, as frozen data, and what of its values is shown.

Imports no torch, so that `pixmim evaluate NAME --help` answers at once. The text under each field is its help. The code
of each evaluation stands under its name in `evaluate/`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

DATA = ("train", "test", "data")
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
class Segmentation:
    """A class for each pixel, by UPerNet end to end or by a linear head: mean IoU. The defaults are MAE's on ADE20K."""

    train: str
    """A folder with images/ and masks/ of the same names, or ADE20K's with training/ and validation/ in both."""
    test: str
    """The same to be measured on; of ADE20K's layout, validation/ is taken."""
    head: Literal["uper", "linear"] = "uper"
    """uper: UPerNet with an auxiliary head. linear: BatchNorm and one linear map of the last map's places."""
    frozen: bool | None = None
    """Leave the encoder as it is; otherwise so with the linear head, and not with uper."""
    size: str = "512"
    """Side of the crops and of the test's windows in pixels, or HEIGHTxWIDTH."""
    steps: int = 160_000
    """Updates."""
    batch: int = 16
    """Images in an update."""
    accumulate: int = 1
    """Parts a batch is computed in, one after another, to fit into memory."""
    lr: float | None = None
    """Learning rate; otherwise 1e-4 with uper, and 1e-3 with the linear head."""
    warmup: int = 1500
    """Updates of warm-up, at most a fifth of all; then a straight line to zero."""
    weight_decay: float = 0.05
    """Of AdamW; not applied to norms, biases, positions and single tokens."""
    layer_decay: float = 0.65
    """Each layer of the encoder learns at this share of the rate of the one above it."""
    drop_path: float = 0.1
    """Rate at which the last block is left out in training; from zero at the first one it rises evenly."""
    width: int = 512
    """Channels of UPerNet."""
    threads: int = 0
    """Threads that read and decode images; 0: one for each core, at most 16."""
    seed: int = 0
    """Decides the head's first weights, order, crops and colours."""

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return self.lr if self.lr is not None else 1e-4 if self.head == "uper" else 1e-3


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
    "segmentation": Protocol(
        Segmentation,
        "images with masks: --train, --test",
        {
            "mIoU": "segmentation, mean IoU",
            "aAcc": "segmentation, pixel accuracy",
            "mAcc": "segmentation, mean class accuracy",
        },
    ),
}
