"""Settings of the evaluations, as frozen dataclasses. The string below a field is its `--help`.

Imports no torch, so that `pixmim evaluate NAME --help` is fast.
"""

import re
from dataclasses import dataclass, field, fields, replace
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
    Text,
    Threads,
)

DATA_FIELDS = (
    *("train", "test", "labelled", "data", "train_images", "test_images", "stimuli", "pairs", "coco"),
    *("imagenet_c", "imagenet_a", "imagenet_r", "imagenet_sketch"),
)
"""Names of settings that hold data, as --data takes them."""

Severities = Annotated[tuple[int, ...], Integer(1, 5)]
Decay = Annotated[float, Real(0, 10)]
LayerDecay = Annotated[float, Real(1e-3, 1)]
DropPath = Annotated[float, Real(0, 0.99)]


@dataclass(frozen=True)
class LabeledSettings(Settings):
    """Labeled train and test data: two sources, or one that is split."""

    train: str = ""
    """Labeled data to train on: a folder with one subfolder per class, labels.csv, or another --data."""
    test: str = ""
    """Labeled data to evaluate on."""
    labelled: str = ""
    """In place of both: labeled data to split by class, and by group where a table has such a column."""
    split: Annotated[float, Real(0, 1, above=True, below=True)] = 0.8
    """labelled: share of the images of each class to train on."""
    split_seed: Seed = 0
    """Seed of the split, the folds and the labels that --shots draws."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.train) != bool(self.test) or bool(self.train) == bool(self.labelled):
            raise UserError("--train and --test must be given together, or --labelled, which is split")

    def resolved(self) -> "LabeledSettings":
        """Return settings with the parts of `labelled`, unless for folds, as train and test. Raises UserError."""
        from pixmim.data.uri import SplitSpec, read_parts

        if self.labelled and len(read_parts(self.labelled)) > 1:
            raise UserError(f"--labelled takes one source, not several joined by +: '{self.labelled}'")
        if SplitSpec.read(self.labelled)[0] is not None:
            raise UserError(f"--labelled splits its data: leave out split:...: before them in '{self.labelled}'")
        if not self.labelled or getattr(self, "folds", None):
            return self
        train, test = (
            SplitSpec(side, self.split, self.split_seed).prefix + self.labelled for side in ("train", "test")
        )
        return replace(self, train=train, test=test, labelled="")


@dataclass(frozen=True)
class FrozenSettings(LabeledSettings):
    """Labeled data, and what to repeat on features of a frozen encoder."""

    folds: Annotated[int, Integer(0, 1_000)] = 0
    """labelled: instead of one split, test each of N parts once (cross-validation): mean and deviation. `all`
    then leaves robustness to corruptions made in memory out."""
    shots: Annotated[str, Text("(([0-9]{1,9}|all)(,([0-9]{1,9}|all))*)?", "numbers such as 10,100,all")] = ""
    """Train on N labels per class as well, such as 10,100,all: mean and deviation over --draws of the images.
    The initial weights of runs are evaluated on the same images."""
    draws: Annotated[int, Integer(1, 1_000)] = 5
    """shots: number of random draws of the labels."""
    layers: Annotated[str, Text("(all|[0-9]{1,4}(,[0-9]{1,4})*)?", "all, or numbers of blocks such as 1,3,5")] = ""
    """Evaluate the features of these blocks of the encoder: all, or numbers such as 1,3,5."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds and (self.folds == 1 or not self.labelled):
            raise UserError(f"--folds {self.folds} needs --labelled DATA, and at least 2 folds")
        if self.shots and (self.folds or self.layers):
            raise UserError(f"--shots {self.shots} excludes --{'folds' if self.folds else 'layers'}: use one of them")
        if "0" in self.counts:
            raise UserError(f"--shots must be numbers of labels from 1 on, or all, not {self.shots}")

    @property
    def counts(self) -> list[str]:
        """Numbers of labels per class, as text: `shots` without repetitions."""
        return list(dict.fromkeys(n.lstrip("0") or "0" for n in self.shots.split(","))) if self.shots else []

    @property
    def sources(self) -> tuple[str, str]:
        """Data to train on and to evaluate on; the same for folds."""
        return (self.labelled, self.labelled) if self.folds else (self.train, self.test)


@dataclass(frozen=True)
class KnnSettings(FrozenSettings):
    """k-NN as in DINO: cosine similarity of frozen features, votes weighted by exp(similarity / 0.07)."""

    k: Annotated[tuple[int, ...], Integer(1, 999_999_999)] = (1, 20)
    """Numbers of neighbors; each gives its own result."""


@dataclass(frozen=True)
class LinearSettings(FrozenSettings):
    """Linear probe on the frozen encoder: DINOv2's sweep, the best chosen on a held-out part; or MAE's protocol."""

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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protocol == "mae" and (self.folds or self.shots or self.layers):
            raise UserError("--protocol mae trains on augmented images: leave out --folds, --shots and --layers")


@dataclass(frozen=True)
class AttentiveSettings(FrozenSettings):
    """Attentive probe on the frozen patch tokens: learned queries pool them for a linear layer (arXiv 2506.10178)."""

    queries: Annotated[int, Integer(1, MAX_WIDTH)] = 32
    """Number of queries; reduced to a divisor of the encoder's width."""
    epochs: Annotated[int, Integer(1, 1_000_000)] = 50
    """Epochs over the train data for each of five learning rates."""
    seed: Seed = 0
    """Seed of the held-out part, the initial weights and the order."""


Unset = TypeVar("Unset")

_UNSET: Any = None


@dataclass(frozen=True)
class FinetuneRecipe(Settings, Generic[Unset]):
    """Settings of a fine-tuning recipe. `Unset` is None where they may be left out, as in overrides of a recipe."""

    epochs: Annotated[float | Unset, Real(0.001, 1e06)] = _UNSET
    """Epochs over the train data."""
    warmup: Annotated[float | Unset, Real(0, 1e06)] = _UNSET
    """Epochs of warm-up, at most a fifth of all."""
    warmup_prefix: bool | Unset = _UNSET
    """True: the cosine starts after the warm-up (MAE). False: at the first step (SimMIM, DeiT III)."""
    batch_size: Annotated[int | Unset, Integer(2, 999_999_999)] = _UNSET
    """Images per step."""
    optimizer: Literal["adamw", "lamb"] | Unset = _UNSET
    """AdamW, or LAMB (DeiT III)."""
    base_lr: Annotated[float | Unset, Real(0, 100, above=True)] = _UNSET
    """Learning rate of the head per 256 images of a batch."""
    warmup_start_lr: Annotated[float | Unset, Real(0, 100)] = _UNSET
    """Learning rate at the start of the warm-up."""
    min_lr: Annotated[float | Unset, Real(0, 100)] = _UNSET
    """Learning rate at the end of the cosine."""
    layer_decay: Annotated[float | Unset, Real(0.001, 1)] = _UNSET
    """Learning rate of each layer relative to the layer above it."""
    weight_decay: Annotated[float | Unset, Real(0, 10)] = _UNSET
    """Not applied to norms, biases, positions and single tokens."""
    clip: Annotated[float | Unset, Real(0, 1e06)] = _UNSET
    """Largest norm of the gradient; 0: unlimited."""
    drop_path: Annotated[float | Unset, Real(0, 0.99)] = _UNSET
    """Stochastic depth rate of the last block; linear from 0 at the first."""
    crop: Literal["random-resized", "simple-resized"] | Unset = _UNSET
    """random-resized, or simple-resized (AlexNet, DeiT III, PixMIM)."""
    scale: Annotated[tuple[float, float] | Unset, Real(0, 1, above=True)] = _UNSET
    """random-resized: range of the share of the area."""
    augment: Literal["rand", "three", "none"] | Unset = _UNSET
    """rand: RandAugment m9-mstd0.5-inc1. three: 3-Augment (DeiT III)."""
    jitter: Annotated[float | Unset, Real(0, 1)] = _UNSET
    """Strength of the jitter of brightness, contrast and saturation."""
    erase: Annotated[float | Unset, Real(0, 1)] = _UNSET
    """Probability of random erasing, by noise."""
    mixup: Annotated[float | Unset, Real(0, 100)] = _UNSET
    """Alpha of mixup; 0: off."""
    cutmix: Annotated[float | Unset, Real(0, 100)] = _UNSET
    """Alpha of CutMix; 0: off."""
    smoothing: Annotated[float | Unset, Real(0, 0.99)] = _UNSET
    """Label smoothing."""
    loss: Literal["ce", "bce"] | Unset = _UNSET
    """ce: cross-entropy. bce: binary cross-entropy of each class (DeiT III)."""
    pool: Literal["mean", "cls"] | Unset = _UNSET
    """Input of the head: the mean of the patch tokens, or the class token."""
    head_std: Annotated[float | Unset, Real(0, 10)] = _UNSET
    """Standard deviation of the head's initial weights."""
    average: Annotated[float | Unset, Real(0, 0.999999)] = _UNSET
    """Decay per step of a moving average of the weights (EMA) to evaluate, such as 0.9999; 0: off."""


FinetuneOverrides = FinetuneRecipe[None]
"""Values that replace a recipe's own; None keeps the recipe's."""


@dataclass(frozen=True)
class FinetuneSettings(LabeledSettings):
    """Fine-tune the complete encoder with labels, by its method's published recipe, and save the classifier."""

    recipe: str = "auto"
    """auto: by the encoder's kind and size; or mae-vit-base, mae-vit-large, mae-vit-huge, convmae-base,
    simmim-swin-base-100, simmim-swin-base-800, simmim-swin-large, simmim-vit-base, a2mim-resnet, a2mim-convnext-tiny,
    a2mim-convnext-small, a2mim-convnext-base, deit3-vit-base."""
    from_scratch: bool = False
    """Start from random weights of the same architecture; auto is then DeiT III's recipe, of CNNs the same one."""
    size: Annotated[str, Sides(empty=True)] = ""
    """Side in pixels, or HEIGHTxWIDTH. Default: the encoder's. Position tables are interpolated."""
    accumulation_steps: NonNegative = 0
    """Number of parts in which a batch is computed, to fit into memory; each is mixed separately. 0: on a CPU, parts of
    a size that suits a laptop; on a GPU, one part."""
    seed: Seed = 0
    """Seed of the head, the order, and all other randomness in training."""
    threads: Threads = 0
    """Threads that decode images; 0: one per core, at most 16."""
    changes: Annotated[FinetuneOverrides, arg(name="")] = field(default_factory=FinetuneOverrides)
    """Values that replace the recipe's."""


@dataclass(frozen=True)
class SegmentationSettings(Settings):
    """Semantic segmentation by UPerNet end to end, or a linear head: mean IoU. The defaults are MAE's on ADE20K."""

    train: Data
    """A folder with images/ and masks/ of the same names, or ADE20K's with training/ and validation/ in both, or with
    masks beside the images (x_mask.png, or SAMPLE/masks/)."""
    test: Data
    """Data to evaluate on, likewise; of ADE20K's layout, validation/ is used."""
    foreground: Annotated[int | None, Integer(0, 255)] = None
    """For masks of an object: this value (often 255) is the class foreground, every other one background."""
    ignore: str = "auto"
    """auto: mask values are class numbers, and 255 (in ADE20K's layout also 0) is ignored. none, or a value to ignore:
    all (other) values of the train masks are the classes, in order."""
    head: Literal["uper", "linear"] = "uper"
    """uper: UPerNet with an auxiliary head. linear: BatchNorm and one linear layer on each patch of the last map."""
    frozen: bool | None = None
    """Freeze the encoder. Default: with the linear head only."""
    size: Size = "512"
    """Side of the crops and of the test windows in pixels, or HEIGHTxWIDTH."""
    steps: Count = 160_000
    """Steps."""
    batch_size: Count = 16
    """Images per step."""
    accumulation_steps: Count = 1
    """Number of parts in which a batch is computed, to fit into memory."""
    lr: Annotated[float | None, Real(0, 100, above=True)] = None
    """Learning rate. Default: 1e-4 with uper, 1e-3 with the linear head."""
    warmup: NonNegative = 1500
    """Steps of warm-up, at most a fifth of all; then linear to zero."""
    weight_decay: Decay = 0.05
    """Weight decay of AdamW; not applied to norms, biases, positions and single tokens."""
    layer_decay: LayerDecay = 0.65
    """Learning rate of each layer of the encoder relative to the layer above it."""
    drop_path: DropPath = 0.1
    """Stochastic depth rate of the last block; linear from 0 at the first."""
    width: Annotated[int, Integer(1, MAX_WIDTH)] = 512
    """Channels of UPerNet."""
    threads: Threads = 0
    """Threads that decode images; 0: one per core, at most 16."""
    seed: Seed = 0
    """Seed of the head, the order, crops and colors."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.accumulation_steps or self.batch_size // self.accumulation_steps < 2:
            raise UserError(
                f"--batch-size {self.batch_size} does not divide into --accumulation-steps "
                f"{self.accumulation_steps} equal parts of 2 images or more"
            )

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return self.lr if self.lr is not None else 1e-4 if self.head == "uper" else 1e-3


@dataclass(frozen=True)
class DetectionSettings(Settings):
    """Average precision of boxes and masks: Faster or Mask R-CNN on the encoder, fine-tuned as ViTDet on COCO."""

    train: str = ""
    """Objects to train on: a JSON file in COCO's format, a folder, list or data.yaml of VOC or YOLO, or shapes:."""
    test: str = ""
    """Objects to evaluate on, likewise."""
    data: str = ""
    """Instead of both: the folder of COCO (annotations/, train2017/, val2017/), of VOC (ImageSets/) or of YOLO
    (data.yaml)."""
    train_images: str = ""
    """Folder of the train images. Default: ROOT/NAME for ROOT/annotations/instances_NAME.json, that of VOC's or YOLO's
    layout, or the file's own."""
    test_images: str = ""
    """Folder of the test images, likewise."""
    masks: Literal["auto", "yes", "no"] = "auto"
    """Train masks as well (Mask R-CNN), and ignore objects without one; auto: if more than half have one."""
    size: Annotated[int, Integer(1, MAX_SIDE)] = 1024
    """Side of the square input in pixels."""
    epochs: Positive = 100.0
    """Epochs over the train data."""
    steps: Annotated[int | None, Integer(1, 999_999_999)] = None
    """Steps, instead of epochs."""
    batch_size: Count = 64
    """Images per step."""
    accumulation_steps: NonNegative = 0
    """Number of parts in which a batch is computed, to fit into memory. 0: on a CPU, parts of a size that suits a
    laptop; on a GPU, one part."""
    lr: LearningRate = 1e-4
    """Peak learning rate of AdamW."""
    weight_decay: Decay = 0.1
    """Weight decay; not applied to norms, biases and absolute positions."""
    layer_decay: LayerDecay = 0.7
    """Learning rate of each layer of the encoder relative to the layer above it."""
    drop_path: DropPath = 0.1
    """Stochastic depth rate of the last block; linear from 0 at the first."""
    warmup: NonNegative = 250
    """Steps of linear warm-up, at most a fifth of all."""
    drops: Annotated[tuple[float, float], Real(0, 1)] = (0.889, 0.963)
    """Shares of the training after which the learning rate is divided by ten."""
    jitter: Annotated[tuple[float, float], Real(0.01, 100)] = (0.1, 2.0)
    """Smallest and largest scale of a train image; 1 fits it into the square."""
    window: Annotated[int, Integer(1, 1_024)] = 14
    """Side in patches of the attention windows of most of a ViT's blocks."""
    global_blocks: Annotated[int, Integer(0, MAX_DEPTH)] = 4
    """Number of a ViT's blocks with global attention, evenly spaced."""
    relative_positions: bool = True
    """Add relative positions to a ViT without; they are initialized to zero."""
    width: Annotated[int, Integer(1, MAX_WIDTH)] = 256
    """Channels of pyramid and heads."""
    regions: Annotated[int, Integer(1, 100_000)] = 512
    """Regions of an image that the heads train on in a step."""
    seed: Seed = 0
    """Seed of the heads, the order, the jitter and the regions."""
    threads: Threads = 0
    """Threads that decode images; 0: one per core, at most 16."""
    pictures: Annotated[int, Integer(0, 10_000)] = 8
    """Number of test images to draw with their detections."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.jitter[0] > self.jitter[1]:
            raise UserError("--jitter takes the smallest scale and the largest, not {:g} {:g}".format(*self.jitter))


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
    """Labeled data to corrupt in memory and evaluate on."""
    train: str = ""
    """Labeled clean data to fit a linear probe to, if the encoder has no classifier of the test data."""
    classifier: Literal["auto", "head", "probe"] = "auto"
    """Classifier of the test data. head: the encoder's own. probe: a linear probe. auto: the head if it has all classes
    of the data by name, or without --train."""
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
    """Shape bias: share of decisions by shape on images with the shape of one class and the texture of another."""

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
class EvaluateAllSettings(FrozenSettings):
    """Run k-NN, linear and attentive probe, robustness, and the evaluations of the other flags, and write one page."""

    severities: Severities = (1, 2, 3, 4, 5)
    """Severities of the corruptions made in memory, from 1 to 5."""
    stimuli: str = ""
    """Cue-conflict stimuli for shape bias. Synthetic with shapes: as data."""
    imagenet_c: str = ""
    """ImageNet-C, as for robustness."""
    imagenet_a: str = ""
    """ImageNet-A, likewise."""
    imagenet_r: str = ""
    """ImageNet-R, likewise."""
    imagenet_sketch: str = ""
    """ImageNet-Sketch, likewise."""
    attentive: bool = True
    """Evaluate the attentive probe. Its patch tokens take disk space for a time."""
    corruptions: bool = True
    """Evaluate robustness to corruptions made in memory. They need images of 1 or 3 channels of 8 bits."""
    finetune: bool = False
    """Fine-tune by the published recipe as well. Takes long."""
    pairs: str = ""
    """A folder in ADE20K's layout: segmentation by MAE's protocol as well. Takes long."""
    coco: str = ""
    """The folder of COCO: detection by ViTDet's protocol as well. Takes long."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folds and (self.finetune or self.stimuli):
            raise UserError(
                f"--folds {self.folds} excludes --{'finetune' if self.finetune else 'stimuli'}: use --split"
            )

    def parts(self) -> list[tuple[str, Any]]:
        """Return the evaluations by name, with their settings."""
        imagenet = self.imagenet_c, self.imagenet_a, self.imagenet_r, self.imagenet_sketch
        common = {field.name: getattr(self, field.name) for field in fields(FrozenSettings)}
        parts: list[tuple[str, Any]] = [("knn", KnnSettings(**common)), ("linear", LinearSettings(**common))]
        if self.attentive:
            parts.append(("attentive", AttentiveSettings(**common)))
        corrupted = (self.test, self.train) if self.corruptions else ("", "")
        if any(imagenet) or (corrupted[0] and not self.folds):
            parts.append(("robustness", RobustnessSettings(*imagenet, *corrupted, severities=self.severities)))
        from pixmim.data.uri import read_parts

        sources = [part.source for data in (self.train, self.test) if data for part in read_parts(data)]
        synthetic = bool(sources) and all(s.startswith("shapes:") and "texture=" not in s for s in sources)
        if self.stimuli:
            parts.append(("shape-bias", ShapeBiasSettings(self.stimuli, self.train)))
        elif synthetic:  # train where both cues agree, test where they conflict
            train, test = (
                re.sub(r"shapes:([^+*]*)", lambda m, cue=cue: f"shapes:{m[1]}{',' * bool(m[1])}texture={cue}", data)  # type: ignore[misc]
                for data, cue in ((self.train, "match"), (self.test, "conflict"))
            )
            parts.append(("shape-bias", ShapeBiasSettings(test, train)))
        if self.finetune:
            parts.append(("finetune", FinetuneSettings(self.train, self.test)))
        if self.pairs:
            parts.append(("segmentation", SegmentationSettings(self.pairs, self.pairs)))
        if self.coco:
            parts.append(("detection", DetectionSettings(data=self.coco)))
        return parts
