"""Settings of what trains the encoder with labels, and measures what comes of it."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import arg


@dataclass(frozen=True)
class Changes:
    """Numbers that replace a fine-tuning recipe's own."""

    epochs: float | None = None
    """Passes over the train data."""
    warmup: float | None = None
    """Epochs of warm-up; never more than a fifth of the run."""
    warmup_prefix: bool | None = None
    """True: the cosine begins after the warm-up (MAE). False: it counts from the first step (SimMIM, DeiT III)."""
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
    foreground: int | None = None
    """For masks of an object and all else: this value (often 255) is the class foreground, every other background."""
    ignore: str = "auto"
    """auto: a mask's values are class numbers, but 255 (in ADE20K's layout 0 as well) does not count. none, or a value
    that does not count: all (other) values found in the train masks are the classes, in their order."""
    head: Literal["uper", "linear"] = "uper"
    """uper: UPerNet with an auxiliary head. linear: BatchNorm and one linear map of the last map's places."""
    frozen: bool | None = None
    """Leave the encoder as it is; otherwise so with the linear head, and not with uper."""
    size: str = "512"
    """Side of the crops and of the test's windows in pixels, or HEIGHTxWIDTH."""
    steps: int = 160_000
    """Updates."""
    batch_size: int = 16
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
    """Learn masks as well (Mask R-CNN), and leave out objects without one; auto: if more than half have one."""
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
