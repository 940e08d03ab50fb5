"""How a backbone is measured: the settings of each evaluation, as frozen data, and what of its values is shown.

Imports no torch, so that `pixmim evaluate NAME --help` answers at once. The text under each field is its help. The code
of each evaluation stands under its name in `evaluate/`.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from tyro.conf import arg

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
)
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
    """A linear probe on the frozen encoder: DINOv2's sweep, its best chosen on a part held out; or MAE's protocol."""

    train: str
    """Labelled data to learn from."""
    test: str
    """Labelled data to be measured on."""
    protocol: Literal["sweep", "mae"] = "sweep"
    """sweep: many rates on features computed once. mae: LARS and BatchNorm on augmented images, as published."""
    epochs: int | None = None
    """Passes over the train data, for each member of the sweep 100; mae: 90."""
    seed: int = 0
    """Decides the part held out, the order, and the crops."""
    batch_size: int = 16384
    """mae: images in an update, cut to what the data have."""
    base_lr: float = 0.1
    """mae: learning rate per 256 images of a batch."""
    feature: Literal["auto", "cls", "mean"] = "auto"
    """mae: class token after the final norm, or mean of the patch tokens; auto: the token where there is one."""
    threads: int = 0
    """mae: threads that read and decode images; 0: one for each core, at most 16."""


@dataclass(frozen=True)
class Changes:
    """Numbers that replace a fine-tuning recipe's own."""

    epochs: float | None = None
    """Passes over the train data."""
    warmup: float | None = None
    """Epochs of warm-up; never more than a fifth of the run."""
    batch_size: int | None = None
    """Images in an update of the weights."""
    optimizer: Literal["adamw", "lamb"] | None = None
    """AdamW, or LAMB (DeiT III)."""
    base_lr: float | None = None
    """Learning rate per 256 images of a batch, of the head."""
    first_lr: float | None = None
    """Learning rate at which the warm-up begins."""
    final_lr: float | None = None
    """Learning rate at which the cosine ends."""
    layer_decay: float | None = None
    """Learning rate of each layer, as a share of that of the layer above it."""
    weight_decay: float | None = None
    """Not applied to norms, biases, positions and single tokens."""
    clip: float | None = None
    """Largest norm of the gradient; 0: any."""
    drop_path: float | None = None
    """Probability at which the last block is left out in training; less for those before it."""
    crop: Literal["rrc", "src"] | None = None
    """rrc: random resized crop. src: simple resized crop (AlexNet, DeiT III, PixMIM)."""
    scale: tuple[float, float] | None = None
    """rrc: range of the share of the area."""
    augment: Literal["rand", "three", "none"] | None = None
    """rand: RandAugment m9-mstd0.5-inc1. three: 3-Augment (DeiT III)."""
    jitter: float | None = None
    """Strength of the jitter of brightness, contrast and saturation."""
    erase: float | None = None
    """Probability that a box of an image becomes noise."""
    mixup: float | None = None
    """Alpha of mixup; 0: none."""
    cutmix: float | None = None
    """Alpha of CutMix; 0: none."""
    smoothing: float | None = None
    """Share of a label that is spread over all classes."""
    loss: Literal["ce", "bce"] | None = None
    """ce: cross-entropy. bce: binary, for each class by itself (DeiT III)."""
    pool: Literal["mean", "cls"] | None = None
    """What the head sees: the mean of the patch tokens, or the class token."""
    head_std: float | None = None
    """Standard deviation of the head's initial weights."""
    average: float | None = None
    """Decay, an update, of an average of the weights (EMA) that is measured in their place, 0.9999 for one; 0: none."""


@dataclass(frozen=True)
class Finetune:
    """Fine-tune the whole encoder with labels, by its method's published recipe, and keep the classifier."""

    train: str
    """Labelled data to learn from."""
    test: str
    """Labelled data to be measured on."""
    recipe: str = "auto"
    """auto: by the encoder's kind and size; or mae-vit-base, mae-vit-large, mae-vit-huge, convmae-base,
    simmim-swin-base-100, simmim-swin-base-800, simmim-swin-large, simmim-vit-base, deit3-vit-base."""
    from_scratch: bool = False
    """Begin with random weights of the same architecture; auto is then DeiT III's recipe."""
    size: str = ""
    """Side in pixels, or HEIGHTxWIDTH, if not the encoder's own; tables of positions are refitted."""
    accumulate: int = 1
    """Parts a batch is computed in, one after another, to fit into memory; each is mixed by itself."""
    seed: int = 0
    """Decides the head, the order, and all that is random in training."""
    threads: int = 0
    """Threads that read and decode images; 0: one for each core, at most 16."""
    changes: Annotated[Changes, arg(name="")] = field(default_factory=Changes)
    """Numbers in place of the recipe's."""


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
