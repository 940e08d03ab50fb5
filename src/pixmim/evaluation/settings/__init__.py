"""How a backbone is measured: the settings of each evaluation, as frozen data, and what of its values is shown.

Imports no torch, so that `pixmim evaluate NAME --help` answers at once. The text under each field is its help. The code
of each evaluation stands under its name in `evaluate/`.
"""

from dataclasses import dataclass, field
from typing import Any

from pixmim.evaluation.settings.all import All
from pixmim.evaluation.settings.finetune import Detection, Finetune, FinetuneOverrides, FinetuneRecipe, Segmentation
from pixmim.evaluation.settings.frozen import Knn, Linear
from pixmim.evaluation.settings.shift import Robustness, ShapeBias

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

    shown  labels of values by their keys; * in a key stands for any text, and * in its label for the same.
           `KEY/low` and `KEY/high`, where given, are the ends of its 95 % interval.
    each   the same of the values of each class, which only the page shows
    needs  what a user must have
    """

    settings: type[Any]
    needs: str
    shown: dict[str, str] = field(default_factory=dict)
    each: dict[str, str] = field(default_factory=dict)
    unit: str = "%"


MAJORITY = "majority (always the largest class)"
"""Label of the baseline of all measures of classes."""


PROTOCOLS: dict[str, Protocol] = {
    "knn": Protocol(
        Knn,
        "labelled images: --train, --test",
        {
            "majority": MAJORITY,
            "k*/mean/top1": "k-NN (k = *), mean of patch tokens",
            "k*/mean/balanced": "k-NN (k = *), mean of patch tokens, balanced",
            "k*/cls/top1": "k-NN (k = *), class token",
            "k*/cls/balanced": "k-NN (k = *), class token, balanced",
        },
        {
            "k*/mean/recall/*": "recall, k-NN (k = *), mean of patch tokens: *",
            "k*/cls/recall/*": "recall, k-NN (k = *), class token: *",
        },
    ),
    "linear": Protocol(
        Linear,
        "labelled images: --train, --test",
        {
            "majority": MAJORITY,
            "top1": "linear probe",
            "balanced": "linear probe, balanced",
            "mae/majority": MAJORITY,
            "mae/top1": "linear probe, MAE's protocol",
            "mae/balanced": "linear probe, MAE's protocol, balanced",
        },
        {
            "recall/*": "recall, linear probe: *",
            "mae/recall/*": "recall, linear probe, MAE's protocol: *",
        },
    ),
    "finetune": Protocol(
        Finetune,
        "labelled images: --train, --test",
        {
            "majority": MAJORITY,
            "top1": "fine-tuned",
            "balanced": "fine-tuned, balanced",
            "top5": "fine-tuned, top 5",
        },
        {"recall/*": "recall, fine-tuned: *"},
    ),
    "segmentation": Protocol(
        Segmentation,
        "images with masks: --train, --test",
        {
            "mIoU": "segmentation, mean IoU",
            "aAcc": "segmentation, pixel accuracy",
            "mAcc": "segmentation, mean class accuracy",
            "majority": "segmentation, pixels of the largest class",
        },
        {"iou/*": "IoU: *"},
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
        },
        {"ap/*": "AP of boxes: *", "mask_ap/*": "AP of masks: *"},
    ),
    "robustness": Protocol(
        Robustness,
        "labelled images: --test, --train; or --imagenet-c, -a, -r, -sketch and a classifier of ImageNet",
        {
            "imagenet_c/mce": "ImageNet-C, mCE",
            "imagenet_c/ce/*": "ImageNet-C, CE: *",
            "imagenet_c/error": "ImageNet-C, error",
            "imagenet_c/balanced": "ImageNet-C, error, balanced",
            "imagenet_c/majority": f"ImageNet-C, {MAJORITY}",
            "imagenet_a/top1": "ImageNet-A",
            "imagenet_a/balanced": "ImageNet-A, balanced",
            "imagenet_a/majority": f"ImageNet-A, {MAJORITY}",
            "imagenet_r/top1": "ImageNet-R",
            "imagenet_r/balanced": "ImageNet-R, balanced",
            "imagenet_r/majority": f"ImageNet-R, {MAJORITY}",
            "imagenet_sketch/top1": "ImageNet-Sketch",
            "imagenet_sketch/balanced": "ImageNet-Sketch, balanced",
            "imagenet_sketch/majority": f"ImageNet-Sketch, {MAJORITY}",
            "in_memory/probe/clean/majority": MAJORITY,
            "in_memory/head/clean/majority": MAJORITY,
            "in_memory/probe/clean": "error of a probe, clean",
            "in_memory/probe/clean/balanced": "error of a probe, clean, balanced",
            "in_memory/probe/error": "error of a probe, corrupted in memory",
            "in_memory/probe/corrupted/balanced": "error of a probe, corrupted in memory, balanced",
            "in_memory/probe/corruption/*": "  *",
            "in_memory/head/clean": "error, clean",
            "in_memory/head/clean/balanced": "error, clean, balanced",
            "in_memory/head/error": "error, corrupted in memory",
            "in_memory/head/corrupted/balanced": "error, corrupted in memory, balanced",
            "in_memory/head/corruption/*": "  *",
        },
        {
            "imagenet_c/recall/*": "recall, ImageNet-C: *",
            "imagenet_a/recall/*": "recall, ImageNet-A: *",
            "imagenet_r/recall/*": "recall, ImageNet-R: *",
            "imagenet_sketch/recall/*": "recall, ImageNet-Sketch: *",
            "in_memory/*/clean/recall/*": "recall of the *, clean: *",
            "in_memory/*/corrupted/recall/*": "recall of the *, corrupted in memory: *",
        },
    ),
    "shape-bias": Protocol(
        ShapeBias,
        "cue-conflict stimuli: --data, and for encoders without a classifier of ImageNet: --train",
        {
            "head/majority": f"shapes of the stimuli, {MAJORITY}",
            "probe/majority": f"shapes of the stimuli, {MAJORITY}",
            "head/shape_bias": "shape bias",
            "head/balanced": "shape bias, balanced",
            "head/shape": "decisions for the shape",
            "head/texture": "decisions for the texture",
            "probe/shape_bias": "shape bias of a probe",
            "probe/balanced": "shape bias of a probe, balanced",
            "probe/shape": "decisions of a probe for the shape",
            "probe/texture": "decisions of a probe for the texture",
        },
        {
            "*/category/*/shape_bias": "shape bias (*): *",
            "*/category/*/shape": "decisions for the shape (*): *",
            "*/category/*/texture": "decisions for the texture (*): *",
        },
    ),
}

__all__ = [
    "DATA",
    "MAJORITY",
    "PROTOCOLS",
    "All",
    "Detection",
    "Finetune",
    "FinetuneOverrides",
    "FinetuneRecipe",
    "Knn",
    "Linear",
    "Protocol",
    "Robustness",
    "Segmentation",
    "ShapeBias",
]
