"""Configurations as frozen data: `ModelConfig` for weights, `PretrainConfig` for a pre-training run.

`config_io.py` reads and writes them as JSON. This module imports no torch, so that `pixmim pretrain --help` answers at
once. The text under each field is its help; suppressed fields belong to the recipe.
"""

import json
from dataclasses import dataclass, field
from typing import Annotated, Literal

from tyro.conf import Suppress
from tyro.constructors import PrimitiveConstructorSpec

from pixmim.utils.errors import UserError, shown
from pixmim.utils.validation import (
    KEYWORDS,
    MAX_CHANNELS,
    MAX_SIDE,
    Count,
    Device,
    LearningRate,
    Positive,
    Rate,
    Real,
    Seed,
    Settings,
    Share,
    Size,
    Some,
    Text,
    Threads,
    Whole,
    check,
    check_name,
    parse_size,
)

MAX_VALUES = 2**26
"""Most values (pixels times channels) of what the network sees; in float32 they take 256 MiB."""

Option = int | float | bool | str | list[int]


def _read_options(words: list[str]) -> dict[str, Option]:
    """Pairs of names and values on the command line: each value is the JSON it spells, or else a word."""
    if len(words) % 2:
        raise ValueError(f"options come in pairs of a name and a value, but '{words[-1]}' stands alone")
    options: dict[str, Option] = {}
    for name, value in zip(words[::2], words[1::2], strict=True):
        try:
            options[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except (ValueError, RecursionError):
            options[name] = value
    return options


# Without this, tyro would make a flag of each option that a recipe happens to set, and take no others.
OPTIONS = PrimitiveConstructorSpec(
    nargs="*",
    metavar="[NAME VALUE ...]",
    instance_from_str=_read_options,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda options: [str(word) for pair in options.items() for word in pair],
)


@dataclass(frozen=True)
class ArchitectureConfig:
    """Who predicts."""

    name: str = "mae"
    """Method: mae, lsmae, convmae, simmim."""
    backbone: str = "vit_base_patch16_224"
    """mae, lsmae: a plain timm ViT. simmim: a timm Swin, Beit or ViT. convmae: convmae_base or _tiny."""
    decoder_dim: Annotated[int, KEYWORDS["decoder_dim"]] = 512
    """Width of the decoder (not for simmim)."""
    decoder_depth: Annotated[int, KEYWORDS["decoder_depth"]] = 8
    """Blocks of the decoder."""
    decoder_heads: Annotated[int, KEYWORDS["decoder_heads"]] = 16
    """Attention heads of the decoder."""
    decoder_stride: Annotated[int, KEYWORDS["decoder_stride"]] = 1
    """Run the decoder on a grid this many times coarser than the encoder's (not for simmim)."""
    predict_patch: Annotated[int, KEYWORDS["predict_patch"]] = 0
    """Side of the predicted patches in pixels, up to decoder_stride times the encoder's; 0: the encoder's."""
    head: Literal["linear", "mlp"] = "linear"
    """simmim: what predicts the pixels."""
    options: Annotated[dict[str, Option], OPTIONS] = field(default_factory=dict)
    """More keywords for the backbone, such as: embed_dim 128 depth 6 num_heads 4. Added to the recipe's own."""

    def __post_init__(self) -> None:
        check_name(self.backbone)
        check(self, "--model.")


@dataclass(frozen=True)
class CropConfig:
    """What the network sees of the picture."""

    kind: Literal["simple-resized", "random-resized", "center"] = "simple-resized"
    """simple-resized: PixMIM. random-resized: MAE. center: resize and center crop."""
    padding: Annotated[int, Whole(0, MAX_SIDE)] = 4
    """simple-resized: pixels of reflection on each side."""
    scale: Annotated[tuple[float, float], Real(0, 1, above=True)] = (0.2, 1.0)
    """random-resized: range of the share of the area."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Resampling of the resize, always with antialias."""
    flip: Share = 0.5
    """Probability of a horizontal flip."""


@dataclass(frozen=True)
class MaskConfig:
    """What is hidden."""

    kind: Literal["random", "blocks", "square", "moving-square", "beit-blocks"] = "random"
    """random: MAE. blocks: squares of several patches (LSMAE, SimMIM). square: one in the center. beit-blocks: BEiT."""
    ratio: Annotated[float, Real(0, 1, above=True, below=True)] = 0.75
    """Share that is hidden."""
    block_size: Annotated[int, Whole(1, MAX_SIDE)] = 32
    """blocks:side in pixels, a multiple of the model's patch."""
    whole_blocks: bool = False
    """blocks:hide ceil(ratio x units) whole ones (SimMIM), instead of an exact number of patches (LSMAE)."""


@dataclass(frozen=True)
class TargetConfig:
    """What must be predicted, and how far off is measured."""

    kind: Literal["low-frequency", "pixels"] = "low-frequency"
    """low-frequency: PixMIM. pixels: the image as it is."""
    radius: Annotated[float | Literal["auto"], Real(0, MAX_SIDE)] = "auto"
    """Cut-off in frequency bins; auto: 40 at 224 pixels and in proportion elsewhere."""
    variant: Literal["exact", "paper-code"] = "exact"
    """exact: centered and real. paper-code: half a bin off and absolute, as the paper's code."""
    normalize_patches: bool = True
    """Normalize each target patch by its own mean and deviation (norm_pix)."""
    normalize_window: Annotated[int, Whole(0, MAX_SIDE)] = 0
    """Instead, normalize each value by those of a window of this odd side in pixels (later SimMIM: 47); 0: do not."""
    distance: Literal["mse", "l1", "smooth_l1", "cross_entropy"] = "mse"
    """Distance between prediction and target. cross_entropy: classify colors, each channel into one of `bins`."""
    bins: Annotated[int, Whole(2, 4_096)] = 8
    """cross_entropy: equal parts of [0, 1]."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule: linear warm-up, then a cosine or one step down, update by update."""

    base_lr: LearningRate = 1.5e-4
    """Learning rate per 256 images of a batch."""
    lr: Annotated[float | None, Real(0, 100, above=True)] = None
    """The learning rate itself; otherwise base_lr x batch size / 256."""
    schedule: Literal["cosine", "step"] = "cosine"
    """cosine: down to min_lr. step: constant, then a tenth (SimMIM over 800 epochs)."""
    lr_drop_at: Annotated[float, Real(0.2, 1)] = 0.875
    """step: share of the run, however long, after which the learning rate drops; 7/8 is epoch 700 of 800."""
    warmup_start_lr: Rate = 0.0
    """Where the warm-up begins."""
    min_lr: Rate = 0.0
    """Where the cosine ends."""
    warmup: Annotated[float, Real(0, 1e9)] = 40.0
    """Epochs of warm-up; never more than a fifth of the run."""
    warmup_prefix: bool = True
    """True: the cosine begins after the warm-up (MAE). False: it counts from the first step (SimMIM)."""
    betas: Annotated[tuple[float, float], Real(0, 0.999999)] = (0.9, 0.95)
    """AdamW's decay rates of the moments."""
    weight_decay: Annotated[float, Real(0, 10)] = 0.05
    """Not applied to norms, biases, positions and single tokens."""
    clip: Annotated[float | None, Real(0, 1e9, above=True)] = None
    """Largest norm of the gradient; None: no clipping."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the work is spread over processes and made to fit. Changes nothing of what is computed but rounding."""

    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """With several processes: ddp keeps the whole model on each, fsdp a part of it (large ones). auto: ddp."""
    compile: Literal["none", "blocks", "full"] = "none"
    """torch.compile of each transformer block, or of the whole model (not with fsdp)."""
    recompute: bool = False
    """Forget what blocks computed and compute it again for the gradient: less memory, a third more time."""
    timeout: Positive = 600.0
    """Seconds that processes wait for each other before the run ends and says who did not come."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written, and which stay."""

    every: Some = 0
    """Steps between checkpoints; 0: every ten minutes. One is always written at the end and when interrupted."""
    keep_last: Count = 2
    """The newest ones that stay."""
    keep_every_epochs: Annotated[float, Real(0, 1e9)] = 0.0
    """Besides, one is written every so many epochs, and stays; 0: none."""


@dataclass(frozen=True)
class OnlineKnnConfig:
    """Periodic k-NN while training, for the curve of accuracy against epochs."""

    train: str = ""
    """Labeled data that vote."""
    test: str = ""
    """Labeled data that are classified."""
    every: Annotated[float, Real(0, 1e9)] = 0.0
    """Epochs between two measurements; 0: none. The start and the end are measured too."""


_WORD = Text(r"([A-Za-z0-9_][A-Za-z0-9._-]{0,99})?", "a word such as pixmim-vit-small")  # it becomes a part of paths


@dataclass(frozen=True)
class RecipeInfo:
    """What the recipe was made for, so that a run far from it can be warned about."""

    images: Annotated[int, Whole(0, 10**18)] = 1_281_167
    """Images in the data set."""
    steps: Annotated[int, Whole(0, 10**18)] = 0
    """Updates of the weights; 0: unknown."""


@dataclass(frozen=True)
class ModelConfig(Settings):
    """What it takes to build a model and to feed it images. Weights from elsewhere carry no more than this."""

    model: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    size: Size = "224"
    """Side of the square the network sees, in pixels, or HEIGHTxWIDTH."""
    channels: Annotated[int, Whole(1, MAX_CHANNELS)] = 3
    """Color (3), grey (1), or as many as the files have."""
    dtype: Literal["uint8", "uint16", "float32"] = "uint8"
    """uint8, uint16: 255 or 65535 count as one. float32: floating-point values are taken as they are."""
    tiff_pages: Literal["first", "channels"] = "first"
    """Of a TIFF with several pages: the first one, or all of them as channels."""
    bands: str = ""
    """Channels that pictures show as red, green and blue, counted from 1, such as 4,3,2, or one as grey; otherwise the
    first three, or of fewer the first."""
    mean: Annotated[tuple[float, ...] | None, Real(-1e9, 1e9)] = None
    """Mean of each channel; otherwise what `pixmim stats` has measured, or else ImageNet's."""
    std: Annotated[tuple[float, ...] | None, Real(1e-12, 1e9)] = None
    """Standard deviation of each channel; otherwise as the mean."""
    mask: Annotated[MaskConfig | None, Suppress] = None
    """What was hidden in pre-training; None: unknown. Only drawing reconstructions needs it."""
    target: Annotated[TargetConfig | None, Suppress] = None
    """What was predicted in pre-training; None: unknown."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, own in (("img_size", "--size"), ("in_chans", "--channels"), ("outputs", "--target.bins")):
            if name in self.model.options:
                raise UserError(f"--model.options takes no {name}: that is {own}")
        check_normalization(self.mean, self.std, self.channels, self.dtype)
        if self.target is not None:
            _check_target(self.target, self.dtype)
        self.drawn  # noqa: B018 (raises)
        h, w = self.image_size
        if h * w * self.channels > MAX_VALUES:
            raise UserError(
                f"--size {self.size} with --channels {self.channels} makes {h * w * self.channels:,} values of an "
                f"image: at most {MAX_VALUES:,}"
            )

    @property
    def drawn(self) -> tuple[int, ...]:
        """Indices of the channels that pictures show. Raises UserError if `bands` names others."""
        if not self.bands:
            return tuple(range(3 if self.channels >= 3 else 1))
        words = self.bands.split(",")
        if len(words) not in (1, 3) or not all(w.isascii() and w.isdigit() and len(w) < 6 for w in words):
            raise UserError(f"--bands is one channel or three, such as 4,3,2, and not {shown(self.bands)}")
        found = tuple(int(word) - 1 for word in words)
        if not all(0 <= index < self.channels for index in found):
            raise UserError(f"--bands {self.bands} names a channel that is not among the {self.channels}: count from 1")
        return found

    @property
    def interpolation(self) -> Literal["bicubic", "bilinear"]:
        """Resampling of images before they reach the model; bicubic where the training is unknown."""
        return "bicubic"

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of what the network sees, in pixels."""
        return parse_size(self.size) or (0, 0)

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel; ImageNet's for color, their averages for other channels."""
        if self.channels == 3:
            return self.mean or (0.485, 0.456, 0.406), self.std or (0.229, 0.224, 0.225)
        return self.mean or (0.449,) * self.channels, self.std or (0.226,) * self.channels


@dataclass(frozen=True)
class PretrainConfig(ModelConfig):
    """Everything that decides what a pre-training run computes."""

    recipe: Annotated[str, Suppress, _WORD] = ""
    """Name of the recipe this run began as."""
    data: str = ""
    """A folder of images, a cache, tar shards, a URL, hf:NAME, or shapes: for drawn ones; several as a*3+b
    (docs/data.md lists all)."""
    out: str = ""
    """Directory of the run; otherwise runs/RECIPE-TIME."""
    init: str = ""
    """Weights to begin from: a file, another run, or timm:NAME; otherwise random ones."""
    epochs: Positive = 300.0
    """Length in passes over the data."""
    steps: Annotated[int | None, Whole(1, 999_999_999)] = None
    """Length in updates of the weights, instead of epochs."""
    batch_size: Annotated[int, Whole(1, 2**20)] = 4096
    """Images per update of the weights, over all processes; how many of them are computed at once is another matter."""
    accumulation_steps: Annotated[int, Whole(0, 2**20)] = 0
    """Parts a batch is computed in, one after another: the result is the same but for rounding. 0: on a CPU of a size
    that suits a laptop, on a GPU one, or as many as it takes to fit."""
    seed: Seed = 0
    """Decides weights, order, crops and masks."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the device computes in it, else fp16 on a GPU and fp32 on a CPU."""
    device: Device = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    cache_images: Literal["auto", "gpu", "ram", "none"] = "auto"
    """Where a cache's images stay once decoded; auto: where they fit into a quarter of the memory."""
    shard_cache_gib: Positive = 50.0
    """GiB on this machine for copies of shards from far away; those used longest ago make room for new ones."""
    threads: Threads = 0
    """Threads that read and decode images, in each process; 0: one for each core, at most 16."""
    log_every: Some = 0
    """Steps between lines of metrics; 0: two hundred lines a run, at least every 50 steps."""
    max_bad_fraction: Share = 0.25
    """The run stops when more than this share of the images cannot be read."""
    crop: CropConfig = field(default_factory=CropConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    knn: OnlineKnnConfig = field(default_factory=OnlineKnnConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    recipe_info: Annotated[RecipeInfo, Suppress] = field(default_factory=RecipeInfo)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accumulation_steps > self.batch_size:
            raise UserError(
                f"--accumulation-steps {self.accumulation_steps} exceeds the {self.batch_size} images of a batch"
            )
        low, high = self.crop.scale
        if low > high:
            raise UserError(f"--crop.scale is two shares, the smaller one first, not {low:g} {high:g}")
        if self.crop.kind == "simple-resized" and self.crop.padding >= min(self.image_size):
            raise UserError(f"--crop.padding {self.crop.padding} must be less than each side of --size {self.size}")
        if self.parallel.compile == "full" and self.parallel.strategy == "fsdp":
            raise UserError("with --parallel.strategy fsdp, blocks are compiled one by one: --parallel.compile blocks")

    def check_divisible(self, count: int, of: str) -> None:
        """Raise UserError unless each of `count` processes (or GPUs: `of`) gets an equal share, of enough images."""
        if self.batch_size % count:
            raise UserError(f"a batch of {self.batch_size:,} does not divide among {count} {of}: --batch-size")
        if self.accumulation_steps > self.batch_size // count:
            raise UserError(
                f"--accumulation-steps {self.accumulation_steps} exceeds the {self.batch_size // count:,} images "
                f"of a batch that each of {count} {of} computes"
            )

    @property
    def interpolation(self) -> Literal["bicubic", "bilinear"]:
        """Resampling of the crop's resize."""
        return self.crop.interpolation

    @property
    def named(self) -> dict[str, str]:
        """Data and weights that this run opens, by flag; empty where it names none."""
        return {"--data": self.data, "--init": self.init, "--knn.train": self.knn.train, "--knn.test": self.knn.test}

    @property
    def lr(self) -> float:
        """The peak learning rate of this run's real batch."""
        return self.optim.lr if self.optim.lr is not None else self.optim.base_lr * self.batch_size / 256


def _check_target(target: TargetConfig, dtype: str) -> None:
    """Raise UserError for settings of a target that exclude each other."""
    window, binned = target.normalize_window, target.distance == "cross_entropy"
    if window and (window < 3 or window % 2 == 0):
        raise UserError(f"--target.normalize-window must be an odd side of 3 pixels or more, not {window}")
    if binned and (target.normalize_patches or window):
        raise UserError("normalized values have no bins of [0, 1]: add --target.no-normalize-patches, and no window")
    if target.normalize_patches and window:
        raise UserError("a target is normalized once: with a window, add --target.no-normalize-patches")
    if binned and dtype == "float32":
        raise UserError("measured values (--dtype float32) have no bins of [0, 1]: choose another --target.distance")


def check_normalization(
    mean: tuple[float, ...] | None, std: tuple[float, ...] | None, channels: int, dtype: str
) -> None:
    """Raise UserError unless mean and std have a value for each channel, in units in which the brightest pixel is 1."""
    for name, values in (("mean", mean), ("std", std)):
        if values is None:
            continue
        if len(values) != channels:
            raise UserError(f"--{name} has {len(values)} values for {channels} channels")
        words = " ".join(f"{value:g}" for value in values)
        if dtype != "float32" and not all(0 <= value <= 1 for value in values):
            most = 255 if dtype == "uint8" else 65_535
            scaled = " ".join(f"{value / most:.4g}" for value in values)
            inside = all(0 <= value <= most for value in values)
            advice = f": of 0 to {most}, that is --{name} {scaled}" if inside else ""
            raise UserError(f"--{name} {words} must be from 0 to 1, as pixels are (--dtype {dtype}){advice}")
