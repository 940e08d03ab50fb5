"""How a backbone is measured: the settings of each evaluation, as frozen data, and what of its values is shown.

Imports no torch, so that `pixmim evaluate NAME --help` answers at once. The text under each field is its help. The code
of each evaluation stands under its name in `evaluate/`.
"""

from dataclasses import dataclass, field
from typing import Any

from pixmim.protocols.frozen import Knn, Linear
from pixmim.protocols.shifted import Robustness, ShapeBias
from pixmim.protocols.together import All
from pixmim.protocols.tuned import Changes, Detection, Finetune, Segmentation

DATA = (
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
    "linear": Protocol(
        Linear,
        "labelled images: --train, --test",
        {"top1": "linear probe", "mae/top1": "linear probe, MAE's protocol"},
    ),
    "finetune": Protocol(
        Finetune,
        "labelled images: --train, --test",
        {"top1": "fine-tuned", "top5": "fine-tuned, top 5"},
    ),
    "segmentation": Protocol(
        Segmentation,
        "images with masks: --train, --test",
        {
            "mIoU": "segmentation, mean IoU",
            "aAcc": "segmentation, pixel accuracy",
            "mAcc": "segmentation, mean class accuracy",
        },
    ),
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

__all__ = [
    "DATA",
    "PROTOCOLS",
    "All",
    "Changes",
    "Detection",
    "Finetune",
    "Knn",
    "Linear",
    "Protocol",
    "Robustness",
    "Segmentation",
    "ShapeBias",
]
