"""How a backbone is measured: the settings of each evaluation, as frozen data, and what of its values is shown.

Imports no torch, so that `pixmim evaluate NAME --help` answers at once. The text under each field is its help. The code
of each evaluation stands under its name in `evaluate/`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

DATA = ("train", "test", "data", "train_images", "test_images")
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
class Detection:
    """Average precision of boxes and masks: Faster or Mask R-CNN on the encoder, fine-tuned as ViTDet on COCO."""

    train: str = ""
    """Objects to learn from: a JSON file in COCO's format, or shapes:."""
    test: str = ""
    """Objects to be measured on, likewise."""
    data: str = ""
    """In place of both: the folder of COCO, with annotations/, train2017/ and val2017/."""
    train_images: str = ""
    """Folder of the train images; otherwise ROOT/NAME for ROOT/annotations/instances_NAME.json, or the file's own."""
    test_images: str = ""
    """Folder of the test images, likewise."""
    masks: Literal["auto", "yes", "no"] = "auto"
    """Learn masks as well (Mask R-CNN); auto: if every object has one."""
    size: int = 1024
    """Side in pixels of the square that the network sees."""
    epochs: float = 100.0
    """Passes over the train data."""
    steps: int | None = None
    """Updates, in place of epochs."""
    batch_size: int = 64
    """Images in an update."""
    accumulate: int = 1
    """Parts a batch is computed in, one after another, to fit into memory."""
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.1
    """Of matrices; none on norms, biases and absolute positions."""
    layer_decay: float = 0.7
    """Each layer of the encoder learns at this share of the rate of the one above it."""
    drop_path: float = 0.1
    """Stochastic depth of the encoder's last block; 0 at the first."""
    warmup: int = 250
    """Updates of linear warm-up, at most a fifth of all."""
    drops: tuple[float, float] = (0.889, 0.963)
    """Shares of the training after which the rate is a tenth of what it was."""
    jitter: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest scale of a train image: 1 fits it into the square."""
    window: int = 14
    """Side in patches of the windows that most of a ViT's blocks attend in."""
    global_blocks: int = 4
    """Blocks of a ViT that attend to the whole image, evenly spread."""
    relative_positions: bool = True
    """Add relative positions to a ViT that has none; they begin at zero."""
    width: int = 256
    """Channels of pyramid and heads."""
    regions: int = 512
    """Regions of an image that the heads learn from in an update."""
    seed: int = 0
    """Decides heads, order, jitter and the regions learnt from."""
    threads: int = 0
    """Threads that read images; 0: one for each core, at most 16."""
    pictures: int = 8
    """Test images that are drawn with what was found in them."""


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
    "detection": Protocol(
        Detection,
        "images with boxes in COCO's format: --data, or --train and --test; and pixmim[detection]",
        {
            "box/AP": "boxes, AP",
            "box/AP50": "boxes, AP50",
            "box/AP75": "boxes, AP75",
            "mask/AP": "masks, AP",
            "mask/AP50": "masks, AP50",
            "mask/AP75": "masks, AP75",
            "ap/*": "boxes, AP: *",
        },
    ),
}
