"""Evaluations by name: their settings, and the labels of their values.

Imports no torch, as `settings`. `evaluate.EVALUATIONS` holds the functions.
"""

from dataclasses import dataclass, field
from typing import Any

from pixmim.evaluation import settings
from pixmim.utils.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Eval:
    """Settings and labels of an evaluation."""

    settings: type[Any]
    needs: str  # data and packages that a user must have
    # Labels of values by their keys. A * in a key matches any text, and a * in the label repeats it. `KEY/low` and
    # `KEY/high`, where given, are the ends of the 95 % interval; `KEY/std` is the deviation and `KEY/fold/I` the values
    # of repetitions.
    display_names: dict[str, str] = field(default_factory=dict)
    # the same for the values of single classes, which only the page shows
    class_names: dict[str, str] = field(default_factory=dict)
    unit: str = "%"


MAJORITY = "majority (always the largest class)"  # label of the baseline that always predicts the largest class

_LABELED = "labeled images: --train, --test; or --labelled"
_FEATURES = {"mean": "mean of patch tokens", "cls": "class token", "pooled": "pooled by the network"}
_KNN = {f"k*/{key}/": f"k-NN (k = *), {name}" for key, name in _FEATURES.items()}


def _rates(title: str, prefix: str = "") -> dict[str, str]:
    return {f"{prefix}top1": title, f"{prefix}balanced": f"{title}, balanced"}


def _accuracy(title: str, prefix: str = "") -> dict[str, str]:
    return {f"{prefix}majority": MAJORITY} | _rates(title, prefix)


def _repeated(names: dict[str, str]) -> dict[str, str]:
    """Add the labels of values by number of labels and by block: see `repeated.repeat`."""
    each = {key: title for key, title in names.items() if key != "majority"}
    shots = {f"shots/*/{key}": f"*: {title}" for key, title in each.items()}  # see `labels_per_class`
    return names | shots | {f"block/*/{key}": f"block *: {title}" for key, title in each.items()}


def _imagenet(part: str, title: str) -> dict[str, str]:
    return _rates(title, f"imagenet_{part}/") | {f"imagenet_{part}/majority": f"{title}, {MAJORITY}"}


def _in_memory(kind: str, title: str) -> dict[str, str]:
    names = {
        "clean": f"{title}, clean",
        "clean/balanced": f"{title}, clean, balanced",
        "error": f"{title}, corrupted in memory",
        "corrupted/balanced": f"{title}, corrupted in memory, balanced",
        "corruption/*": "  *",
    }
    return {f"in_memory/{kind}/{key}": name for key, name in names.items()}


def _shape_bias(kind: str, of: str) -> dict[str, str]:
    return {
        f"{kind}/shape_bias": f"shape bias{of}",
        f"{kind}/balanced": f"shape bias{of}, balanced",
        f"{kind}/shape": f"decisions{of} for the shape",
        f"{kind}/texture": f"decisions{of} for the texture",
    }


def labels_per_class(count: str) -> str:
    """Return a value of --shots in words, "10 labels per class" or "all labels"."""
    return "all labels" if count == "all" else f"{count} {'label' if count == '1' else 'labels'} per class"


EVALS: dict[str, Eval] = {
    "knn": Eval(
        settings.KnnSettings,
        _LABELED,
        _repeated({"majority": MAJORITY} | {k: v for key, name in _KNN.items() for k, v in _rates(name, key).items()}),
        {f"{key}recall/*": f"recall, {name}: *" for key, name in _KNN.items()},
    ),
    "linear": Eval(
        settings.LinearSettings,
        _LABELED,
        _repeated(_accuracy("linear probe")) | _accuracy("linear probe, MAE's protocol", "mae/"),
        {"recall/*": "recall, linear probe: *", "mae/recall/*": "recall, linear probe, MAE's protocol: *"},
    ),
    "attentive": Eval(
        settings.AttentiveSettings,
        _LABELED,
        _repeated(_accuracy("attentive probe")),
        {"recall/*": "recall, attentive probe: *"},
    ),
    "finetune": Eval(
        settings.FinetuneSettings,
        _LABELED,
        _accuracy("fine-tuned") | {"top5": "fine-tuned, top 5"},
        {"recall/*": "recall, fine-tuned: *"},
    ),
    "segmentation": Eval(
        settings.SegmentationSettings,
        "images with masks: --train, --test",
        {
            "mIoU": "segmentation, mean IoU",
            "aAcc": "segmentation, pixel accuracy",
            "mAcc": "segmentation, mean class accuracy",
            "majority": "segmentation, pixels of the largest class",
        },
        {"iou/*": "IoU: *"},
    ),
    "detection": Eval(
        settings.DetectionSettings,
        "images with boxes in COCO's format: --data, or --train and --test; and pixmim[detection]",
        {
            f"{kind}/{metric}": f"{title}, {metric}"
            for kind, title in (("box", "boxes"), ("mask", "masks"))
            for metric in ("AP", "AP50", "AP75")
        },
        {"ap/*": "AP of boxes: *", "mask_ap/*": "AP of masks: *"},
    ),
    "robustness": Eval(
        settings.RobustnessSettings,
        "labeled images: --test, --train; or --imagenet-c, -a, -r, -sketch and a classifier of ImageNet",
        {
            "imagenet_c/mce": "ImageNet-C, mCE",
            "imagenet_c/ce/*": "ImageNet-C, CE: *",
            "imagenet_c/error": "ImageNet-C, error",
            "imagenet_c/balanced": "ImageNet-C, error, balanced",
            "imagenet_c/majority": f"ImageNet-C, {MAJORITY}",
            **_imagenet("a", "ImageNet-A"),
            **_imagenet("r", "ImageNet-R"),
            **_imagenet("sketch", "ImageNet-Sketch"),
            "in_memory/probe/clean/majority": MAJORITY,
            "in_memory/head/clean/majority": MAJORITY,
            **_in_memory("probe", "error of a probe"),
            **_in_memory("head", "error"),
        },
        {
            **{f"imagenet_{part}/recall/*": f"recall, ImageNet-{part.upper()}: *" for part in "car"},
            "imagenet_sketch/recall/*": "recall, ImageNet-Sketch: *",
            "in_memory/*/clean/recall/*": "recall of the *, clean: *",
            "in_memory/*/corrupted/recall/*": "recall of the *, corrupted in memory: *",
        },
    ),
    "shape-bias": Eval(
        settings.ShapeBiasSettings,
        "cue-conflict stimuli: --data, and for encoders without a classifier of ImageNet: --train",
        {
            "head/majority": f"shapes of the stimuli, {MAJORITY}",
            "probe/majority": f"shapes of the stimuli, {MAJORITY}",
            **_shape_bias("head", ""),
            **_shape_bias("probe", " of a probe"),
        },
        {
            "*/category/*/shape_bias": "shape bias (*): *",
            "*/category/*/shape": "decisions for the shape (*): *",
            "*/category/*/texture": "decisions for the texture (*): *",
        },
    ),
}


def check_name(name: str) -> None:
    """Raise UserError unless there is an evaluation of this name."""
    if name not in EVALS:
        raise UserError(f"there is no evaluation '{name}'{did_you_mean(name, EVALS)} Known: {', '.join(EVALS)}")
