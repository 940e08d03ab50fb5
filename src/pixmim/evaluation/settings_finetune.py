"""Settings of the evaluations that train the encoder: fine-tuning, segmentation and detection."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, Literal, TypeVar

from tyro.conf import arg

from pixmim.utils.errors import UserError
from pixmim.utils.validation import (
    MAX_DEPTH,
    MAX_SIDE,
    MAX_WIDTH,
    Count,
    Data,
    Integer,
    LearningRate,
    NonNegative,
    Positive,
    Real,
    Seed,
    Settings,
    Sides,
    Size,
    Threads,
)

Unset = TypeVar("Unset")

_UNSET: Any = None


@dataclass(frozen=True)
class FinetuneRecipe(Settings, Generic[Unset]):
    """Settings of a fine-tuning recipe. `Unset` is None where they may be left out, as in overrides of a recipe."""

    epochs: Annotated[float | Unset, Real(0.001, 1e06)] = _UNSET
    """Passes over the train data."""
    warmup: Annotated[float | Unset, Real(0, 1e06)] = _UNSET
    """Epochs of warm-up; never more than a fifth of the run."""
    warmup_prefix: bool | Unset = _UNSET
    """True: the cosine begins after the warm-up (MAE). False: it counts from the first step (SimMIM, DeiT III)."""
    batch_size: Annotated[int | Unset, Integer(2, 999_999_999)] = _UNSET
    """Images in an update of the weights."""
    optimizer: Literal["adamw", "lamb"] | Unset = _UNSET
    """AdamW, or LAMB (DeiT III)."""
    base_lr: Annotated[float | Unset, Real(0, 100, above=True)] = _UNSET
    """Learning rate per 256 images of a batch, of the head."""
    warmup_start_lr: Annotated[float | Unset, Real(0, 100)] = _UNSET
    """Learning rate at which the warm-up begins."""
    min_lr: Annotated[float | Unset, Real(0, 100)] = _UNSET
    """Learning rate at which the cosine ends."""
    layer_decay: Annotated[float | Unset, Real(0.001, 1)] = _UNSET
    """Learning rate of each layer, as a share of that of the layer above it."""
    weight_decay: Annotated[float | Unset, Real(0, 10)] = _UNSET
    """Not applied to norms, biases, positions and single tokens."""
    clip: Annotated[float | Unset, Real(0, 1e06)] = _UNSET
    """Largest norm of the gradient; 0: any."""
    drop_path: Annotated[float | Unset, Real(0, 0.99)] = _UNSET
    """Probability at which the last block is left out in training; less for those before it."""
    crop: Literal["random-resized", "simple-resized"] | Unset = _UNSET
    """random-resized, or simple-resized (AlexNet, DeiT III, PixMIM)."""
    scale: Annotated[tuple[float, float] | Unset, Real(0, 1, above=True)] = _UNSET
    """random-resized: range of the share of the area."""
    augment: Literal["rand", "three", "none"] | Unset = _UNSET
    """rand: RandAugment m9-mstd0.5-inc1. three: 3-Augment (DeiT III)."""
    jitter: Annotated[float | Unset, Real(0, 1)] = _UNSET
    """Strength of the jitter of brightness, contrast and saturation."""
    erase: Annotated[float | Unset, Real(0, 1)] = _UNSET
    """Probability that a box of an image becomes noise."""
    mixup: Annotated[float | Unset, Real(0, 100)] = _UNSET
    """Alpha of mixup; 0: none."""
    cutmix: Annotated[float | Unset, Real(0, 100)] = _UNSET
    """Alpha of CutMix; 0: none."""
    smoothing: Annotated[float | Unset, Real(0, 0.99)] = _UNSET
    """Share of a label that is spread over all classes."""
    loss: Literal["ce", "bce"] | Unset = _UNSET
    """ce: cross-entropy. bce: binary, for each class by itself (DeiT III)."""
    pool: Literal["mean", "cls"] | Unset = _UNSET
    """What the head sees: the mean of the patch tokens, or the class token."""
    head_std: Annotated[float | Unset, Real(0, 10)] = _UNSET
    """Standard deviation of the head's initial weights."""
    average: Annotated[float | Unset, Real(0, 0.999999)] = _UNSET
    """Decay, an update, of an average of the weights (EMA) that is measured in their place, 0.9999 for one; 0: none."""


FinetuneOverrides = FinetuneRecipe[None]
"""Values in place of a recipe's own; None: the recipe's."""


@dataclass(frozen=True)
class FinetuneSettings(Settings):
    """Fine-tune the whole encoder with labels, by its method's published recipe, and keep the classifier."""

    train: Data
    """Labeled data to learn from."""
    test: Data
    """Labeled data to be measured on."""
    recipe: str = "auto"
    """auto: by the encoder's kind and size; or mae-vit-base, mae-vit-large, mae-vit-huge, convmae-base,
    simmim-swin-base-100, simmim-swin-base-800, simmim-swin-large, simmim-vit-base, deit3-vit-base."""
    from_scratch: bool = False
    """Begin with random weights of the same architecture; auto is then DeiT III's recipe."""
    size: Annotated[str, Sides(empty=True)] = ""
    """Side in pixels, or HEIGHTxWIDTH, if not the encoder's own; tables of positions are refitted."""
    accumulation_steps: NonNegative = 0
    """Parts a batch is computed in, one after another, to fit into memory; each is mixed by itself. 0: on a CPU of a
    size that suits a laptop, on a GPU one."""
    seed: Seed = 0
    """Decides the head, the order, and all that is random in training."""
    threads: Threads = 0
    """Threads that read and decode images; 0: one for each core, at most 16."""
    changes: Annotated[FinetuneOverrides, arg(name="")] = field(default_factory=FinetuneOverrides)
    """Numbers in place of the recipe's."""


@dataclass(frozen=True)
class SegmentationSettings(Settings):
    """A class for each pixel, by UPerNet end to end or by a linear head: mean IoU. The defaults are MAE's on ADE20K."""

    train: Data
    """A folder with images/ and masks/ of the same names, or ADE20K's with training/ and validation/ in both."""
    test: Data
    """The same to be measured on; of ADE20K's layout, validation/ is taken."""
    foreground: Annotated[int | None, Integer(0, 255)] = None
    """For masks of an object and all else: this value (often 255) is the class foreground, every other background."""
    ignore: str = "auto"
    """auto: a mask's values are class numbers, but 255 (in ADE20K's layout 0 as well) does not count. none, or a value
    that does not count: all (other) values found in the train masks are the classes, in their order."""
    head: Literal["uper", "linear"] = "uper"
    """uper: UPerNet with an auxiliary head. linear: BatchNorm and one linear map of the last map's places."""
    frozen: bool | None = None
    """Leave the encoder as it is; otherwise so with the linear head, and not with uper."""
    size: Size = "512"
    """Side of the crops and of the test's windows in pixels, or HEIGHTxWIDTH."""
    steps: Count = 160_000
    """Updates."""
    batch_size: Count = 16
    """Images in an update."""
    accumulation_steps: Count = 1
    """Parts a batch is computed in, one after another, to fit into memory."""
    lr: Annotated[float | None, Real(0, 100, above=True)] = None
    """Learning rate; otherwise 1e-4 with uper, and 1e-3 with the linear head."""
    warmup: NonNegative = 1500
    """Updates of warm-up, at most a fifth of all; then a straight line to zero."""
    weight_decay: Annotated[float, Real(0, 10)] = 0.05
    """Of AdamW; not applied to norms, biases, positions and single tokens."""
    layer_decay: Annotated[float, Real(1e-3, 1)] = 0.65
    """Each layer of the encoder learns at this share of the rate of the one above it."""
    drop_path: Annotated[float, Real(0, 0.99)] = 0.1
    """Rate at which the last block is left out in training; from zero at the first one it rises evenly."""
    width: Annotated[int, Integer(1, MAX_WIDTH)] = 512
    """Channels of UPerNet."""
    threads: Threads = 0
    """Threads that read and decode images; 0: one for each core, at most 16."""
    seed: Seed = 0
    """Decides the head's first weights, order, crops and colors."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.accumulation_steps or self.batch_size // self.accumulation_steps < 2:
            raise UserError(
                f"--batch-size {self.batch_size} does not divide into --accumulation-steps "
                f"{self.accumulation_steps} equal parts of 2 images "
                "or more"
            )

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return self.lr if self.lr is not None else 1e-4 if self.head == "uper" else 1e-3


@dataclass(frozen=True)
class DetectionSettings(Settings):
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
    """Learn masks as well (Mask R-CNN), and leave out objects without one; auto: if more than half have one."""
    size: Annotated[int, Integer(1, MAX_SIDE)] = 1024
    """Side in pixels of the square that the network sees."""
    epochs: Positive = 100.0
    """Passes over the train data."""
    steps: Annotated[int | None, Integer(1, 999_999_999)] = None
    """Updates, in place of epochs."""
    batch_size: Count = 64
    """Images in an update."""
    accumulation_steps: NonNegative = 0
    """Parts a batch is computed in, one after another, to fit into memory; 0: on a CPU of a size that suits a laptop,
    on a GPU one."""
    lr: LearningRate = 1e-4
    """Peak learning rate of AdamW."""
    weight_decay: Annotated[float, Real(0, 10)] = 0.1
    """Of matrices; none on norms, biases and absolute positions."""
    layer_decay: Annotated[float, Real(1e-3, 1)] = 0.7
    """Each layer of the encoder learns at this share of the rate of the one above it."""
    drop_path: Annotated[float, Real(0, 0.99)] = 0.1
    """Stochastic depth of the encoder's last block; 0 at the first."""
    warmup: NonNegative = 250
    """Updates of linear warm-up, at most a fifth of all."""
    drops: Annotated[tuple[float, float], Real(0, 1)] = (0.889, 0.963)
    """Shares of the training after which the rate is a tenth of what it was."""
    jitter: Annotated[tuple[float, float], Real(0.01, 100)] = (0.1, 2.0)
    """Smallest and largest scale of a train image: 1 fits it into the square."""
    window: Annotated[int, Integer(1, 1_024)] = 14
    """Side in patches of the windows that most of a ViT's blocks attend in."""
    global_blocks: Annotated[int, Integer(0, MAX_DEPTH)] = 4
    """Blocks of a ViT that attend to the whole image, evenly spread."""
    relative_positions: bool = True
    """Add relative positions to a ViT that has none; they begin at zero."""
    width: Annotated[int, Integer(1, MAX_WIDTH)] = 256
    """Channels of pyramid and heads."""
    regions: Annotated[int, Integer(1, 100_000)] = 512
    """Regions of an image that the heads learn from in an update."""
    seed: Seed = 0
    """Decides heads, order, jitter and the regions learnt from."""
    threads: Threads = 0
    """Threads that read images; 0: one for each core, at most 16."""
    pictures: Annotated[int, Integer(0, 10_000)] = 8
    """Test images that are drawn with what was found in them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.jitter[0] > self.jitter[1]:
            raise UserError("--jitter takes the smallest scale and the largest, not {:g} {:g}".format(*self.jitter))
