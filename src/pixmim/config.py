"""Configurations as frozen data: `ModelConfig` for weights, `PretrainConfig` for a pre-training run.

The text under each field is its help on the command line, where suppressed fields have no flag. This module does not
import torch, so that `pixmim pretrain --help` is fast. `config_io.py` reads and writes JSON.
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
    Integer,
    LearningRate,
    NonNegative,
    Positive,
    Real,
    Seed,
    Settings,
    Share,
    Size,
    Stretch,
    Text,
    Threads,
    check,
    check_name,
    parse_size,
)

MAX_VALUES = 2**26
"""Largest number of values (pixels times channels) of a cropped image; in float32 they take 256 MiB."""

Option = int | float | bool | str | list[int]


def _read_options(words: list[str]) -> dict[str, Option]:
    """Parse NAME VALUE pairs of the command line; a value is JSON if it can be, otherwise a word."""
    if len(words) % 2:
        raise ValueError(f"options are pairs of a name and a value, but '{words[-1]}' has no value")
    options: dict[str, Option] = {}
    for name, value in zip(words[::2], words[1::2], strict=True):
        try:
            options[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except (ValueError, RecursionError):
            options[name] = value
    return options


# By default, tyro makes a flag of each option that a recipe sets, and accepts no others.
OPTIONS = PrimitiveConstructorSpec(
    nargs="*",
    metavar="[NAME VALUE ...]",
    instance_from_str=_read_options,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda options: [str(word) for pair in options.items() for word in pair],
)


@dataclass(frozen=True)
class ArchitectureConfig:
    """Encoder, and decoder or head."""

    name: str = "mae"
    """Method: mae, lsmae, mff, pixio, crossmae, convmae, simmim."""
    backbone: str = "vit_base_patch16_224"
    """convmae: convmae_base or _tiny. simmim: a Swin, Beit, ViT or CNN of timm. Others: a plain timm ViT."""
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
    """simmim: the head that predicts pixels."""
    options: Annotated[dict[str, Option], OPTIONS] = field(default_factory=dict)
    """More keywords for the backbone, such as: embed_dim 128 depth 6 num_heads 4. Added to the recipe's own."""

    def __post_init__(self) -> None:
        check_name(self.backbone)
        check(self, "--model.")


@dataclass(frozen=True)
class CropConfig:
    """Crop of the image that the network sees."""

    kind: Literal["simple-resized", "random-resized", "center"] = "simple-resized"
    """simple-resized: PixMIM. random-resized: MAE. center: resize and center crop."""
    padding: Annotated[int, Integer(0, MAX_SIDE)] = 4
    """simple-resized: pixels of reflection on each side."""
    scale: Annotated[tuple[float, float], Real(0, 1, above=True)] = (0.2, 1.0)
    """random-resized: range of the fraction of the area."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Resampling of the resize, always with antialiasing."""
    flip: Share = 0.5
    """Probability of a horizontal flip."""


@dataclass(frozen=True)
class MaskConfig:
    """Patches that are hidden from the network."""

    kind: Literal["random", "blocks", "square", "moving-square", "beit-blocks", "green-noise"] = "random"
    """random: MAE. blocks: squares of several patches (LSMAE, SimMIM, Pixio). square: one in the center. beit-blocks:
    BEiT. green-noise: clumps of a few patches (ColorMAE)."""
    ratio: Annotated[float, Real(0, 1, above=True, below=True)] = 0.75
    """Hidden fraction of the patches."""
    block_size: Annotated[int, Integer(1, MAX_SIDE)] = 32
    """blocks: side in pixels, a multiple of the model's patch."""
    whole_blocks: bool = False
    """blocks: hide ceil(ratio x blocks) complete ones (SimMIM), instead of an exact number of patches (LSMAE)."""


@dataclass(frozen=True)
class TargetConfig:
    """Target of the prediction, and the distance to it."""

    kind: Literal["low-frequency", "pixels"] = "low-frequency"
    """low-frequency: PixMIM. pixels: the image itself."""
    radius: Annotated[float | Literal["auto"], Real(0, MAX_SIDE)] = "auto"
    """Cut-off in frequency bins; auto: 40 at 224 pixels and in proportion elsewhere."""
    variant: Literal["exact", "paper-code"] = "exact"
    """exact: centered and real. paper-code: half a bin off center, absolute value, as the paper's code."""
    normalize_patches: bool = True
    """Normalize each target patch by its own mean and deviation (norm_pix_loss)."""
    normalize_window: Annotated[int, Integer(0, MAX_SIDE)] = 0
    """Instead, normalize each value in a window of this odd side in pixels (later SimMIM: 47); 0: do not."""
    distance: Literal["mse", "l1", "smooth_l1", "cross_entropy"] = "mse"
    """Distance between prediction and target. cross_entropy: classify colors, each channel into one of `bins`."""
    bins: Annotated[int, Integer(2, 4_096)] = 8
    """cross_entropy: equal parts of [0, 1]."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, with a learning rate per step: linear warm-up, then a cosine or one drop."""

    base_lr: LearningRate = 1.5e-4
    """Learning rate per 256 images of a batch."""
    lr: Annotated[float | None, Real(0, 100, above=True)] = None
    """Peak learning rate; otherwise base_lr x batch size / 256."""
    schedule: Literal["cosine", "step"] = "cosine"
    """cosine: down to min_lr. step: constant, then a tenth (SimMIM over 800 epochs)."""
    lr_drop_at: Annotated[float, Real(0.2, 1)] = 0.875
    """step: fraction of the run after which the learning rate drops; 7/8 is epoch 700 of 800."""
    warmup_start_lr: Annotated[float, Real(0, 100)] = 0.0
    """Learning rate at the start of the warm-up; a recipe's is scaled with --batch-size, as its base_lr."""
    min_lr: Annotated[float, Real(0, 100)] = 0.0
    """Learning rate at the end of the cosine, scaled likewise."""
    warmup: Annotated[float, Real(0, 1e9)] = 40.0
    """Epochs of warm-up; at most a fifth of the run."""
    warmup_prefix: bool = True
    """True: the cosine starts after the warm-up (MAE). False: it counts from the first step (SimMIM)."""
    betas: Annotated[tuple[float, float], Real(0, 0.999999)] = (0.9, 0.95)
    """AdamW's decay rates of the moments."""
    weight_decay: Annotated[float, Real(0, 10)] = 0.05
    """Not applied to norms, biases, positions and single tokens."""
    clip: Annotated[float | None, Real(0, 1e9, above=True)] = None
    """Largest gradient norm; None: no clipping."""
    layer_decay: Annotated[float, Real(0, 1, above=True)] = 1.0
    """Learning rate of each layer of the encoder / that of the layer above; the decoder has the full rate."""
    decoder_warmup: Annotated[float, Real(0, 1e9)] = 0.0
    """With --init: epochs before the warm-up that train only the decoder; at most a fifth of the run."""


@dataclass(frozen=True)
class ParallelConfig:
    """Distribution over ranks, compilation and recomputation. The results differ by rounding only."""

    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """With several ranks: ddp replicates the model, fsdp shards it (for large models). auto: ddp."""
    compile: Literal["auto", "none", "blocks", "full"] = "auto"
    """torch.compile of each transformer block, or of the full model (not with fsdp). auto: blocks on a CUDA GPU, none
    elsewhere. Without a working compiler nothing is compiled."""
    recompute: bool = False
    """Recompute the activations of blocks in the backward pass: less memory, a third more time."""
    timeout: Positive = 600.0
    """Abort if a rank makes no progress for this many seconds, and report which."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Intervals of checkpoints, and how many are kept."""

    every: NonNegative = 0
    """Steps between checkpoints; 0: every ten minutes. One is always written at the end and when interrupted."""
    keep_last: Count = 2
    """Number of recent checkpoints to keep."""
    keep_every_epochs: Annotated[float, Real(0, 1e9)] = 0.0
    """Also write and keep a checkpoint at this interval in epochs; 0: none."""


@dataclass(frozen=True)
class OnlineKnnConfig:
    """Periodic k-NN during training, for the curve of accuracy against epochs."""

    train: str = ""
    """Labeled data of the neighbors."""
    test: str = ""
    """Labeled data to classify."""
    every: Annotated[float, Real(0, 1e9)] = 0.0
    """Epochs between evaluations; 0: only start and end."""


@dataclass(frozen=True)
class RecipeInfo:
    """Length of training that a recipe was made for; a run that differs much is warned about."""

    images: Annotated[int, Integer(0, 10**18)] = 1_281_167
    """Images in the dataset."""
    steps: Annotated[int, Integer(0, 10**18)] = 0
    """Optimizer steps; 0: unknown."""


@dataclass(frozen=True)
class ModelConfig(Settings):
    """A model and its input images: all that is known of weights from other projects."""

    model: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    size: Size = "224"
    """Side of the square that the network sees, in pixels, or HEIGHTxWIDTH."""
    channels: Annotated[int, Integer(1, MAX_CHANNELS)] = 3
    """Color (3), grayscale (1), or the number of channels of the files."""
    dtype: Literal["uint8", "uint16", "float32"] = "uint8"
    """uint8, uint16: 255 or 65535 is scaled to one. float32: floating-point values are not scaled."""
    tiff_pages: Literal["first", "channels"] = "first"
    """Pages of a TIFF to read: the first, or all of them as channels."""
    stretch: Stretch = ""
    """Percentiles of each channel of an image that are mapped to its full range, such as 1,99, for microscopy and
    X-rays; by default pixels stay as they are."""
    max_no_data: Share = 1.0
    """Largest share of the pixels of a GeoTIFF that may have no data; images with more are left out. Such pixels take
    the mean of the others."""
    bands: str = ""
    """Channels to draw as red, green and blue, counted from 1, such as 4,3,2, or one as gray; by default the first
    three, or the first of fewer."""
    mean: Annotated[tuple[float, ...] | None, Real(-1e9, 1e9)] = None
    """Mean of each channel; otherwise as measured by `pixmim stats`, or else ImageNet's."""
    std: Annotated[tuple[float, ...] | None, Real(1e-12, 1e9)] = None
    """Standard deviation of each channel; otherwise as the mean."""
    mask: Annotated[MaskConfig | None, Suppress] = None
    """Mask of the pre-training, for drawing reconstructions; None: unknown."""
    target: Annotated[TargetConfig | None, Suppress] = None
    """Target of the pre-training; None: unknown."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, flag in (("img_size", "--size"), ("in_chans", "--channels"), ("outputs", "--target.bins")):
            if name in self.model.options:
                raise UserError(f"--model.options does not take {name}: use {flag}")
        _check_normalization(self)
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
        """Indices of the channels to draw. Raises UserError if `bands` is invalid."""
        if not self.bands:
            return tuple(range(3 if self.channels >= 3 else 1))
        words = self.bands.split(",")
        if len(words) not in (1, 3) or not all(w.isascii() and w.isdigit() and len(w) < 6 for w in words):
            raise UserError(f"--bands must be one channel or three, such as 4,3,2, not {shown(self.bands)}")
        indices = tuple(int(word) - 1 for word in words)
        if not all(0 <= index < self.channels for index in indices):
            raise UserError(f"--bands {self.bands} must be channels from 1 to {self.channels}")
        return indices

    @property
    def interpolation(self) -> Literal["bicubic", "bilinear"]:
        """Resampling of images before they enter the model; bicubic if the training is unknown."""
        return "bicubic"

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the cropped image in pixels."""
        return parse_size(self.size) or (0, 0)

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel; by default ImageNet's, averaged if there are not three channels."""
        if self.channels == 3:
            return self.mean or (0.485, 0.456, 0.406), self.std or (0.229, 0.224, 0.225)
        return self.mean or (0.449,) * self.channels, self.std or (0.226,) * self.channels


_WORD = Text(r"([A-Za-z0-9_][A-Za-z0-9._-]{0,99})?", "a word such as pixmim-vit-small")  # becomes part of paths


@dataclass(frozen=True)
class PretrainConfig(ModelConfig):
    """A pre-training run: all values that decide its result."""

    recipe: Annotated[str, Suppress, _WORD] = ""
    """Name of the recipe."""
    data: str = ""
    """A folder of images, a cache, tar shards, a URL, hf:NAME, or shapes: for synthetic images; several as a*3+b
    (docs/data.md lists all)."""
    out: str = ""
    """Folder of the run; otherwise runs/RECIPE-TIME."""
    hold_out: Annotated[float, Real(0, 0.5)] = 0.0
    """Fraction of the images, at most 4,096, that is kept out of training, to measure its loss and effective rank."""
    hold_out_every: Annotated[float, Real(0, 1e9)] = 0.0
    """Epochs between measurements of these; 0: a fiftieth of the run, at least one. Start and end are measured too."""
    init: str = ""
    """Initial weights: a file, another run, timm:NAME or hf:NAME; otherwise random."""
    epochs: Positive = 300.0
    """Length in passes over the data."""
    first_sizes: Annotated[str, Text(r"([0-9]{1,8}(x[0-9]{1,8})?(,|$))*", "sizes such as 112,160")] = ""
    """Smaller sizes that the run begins with, such as 112,160: it has equally long parts, the last at --size."""
    steps: Annotated[int | None, Integer(1, 999_999_999)] = None
    """Length in optimizer steps, instead of epochs."""
    batch_size: Annotated[int, Integer(1, 2**20)] = 4096
    """Images per optimizer step, over all ranks and accumulation steps."""
    accumulation_steps: Annotated[int, Integer(0, 2**20)] = 0
    """Parts in which a batch is computed; the result differs by rounding only. 0: on a CPU, parts small enough for a
    laptop; on a GPU one part, or as many as are needed to fit."""
    seed: Seed = 0
    """Seed of weights, order, crops and masks."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 if the device supports it, otherwise fp16 on a GPU and fp32 on a CPU."""
    device: Device = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    cache_images: Literal["auto", "gpu", "ram", "none"] = "auto"
    """Memory that keeps the decoded images of a cache; auto: where they fit into a quarter of it."""
    shard_cache_gib: Positive = 50.0
    """GiB on this machine for copies of remote shards; the least recently used are evicted."""
    threads: Threads = 0
    """Threads that read and decode images, per rank; 0: one per core, at most 16."""
    log_every: NonNegative = 0
    """Steps between lines of metrics; 0: two hundred lines a run, at least every 50 steps."""
    max_bad_fraction: Share = 0.25
    """Abort if more than this fraction of the images cannot be read."""
    keep_best: Annotated[str, _WORD] = ""
    """Keep the encoder with the best knn or knn-balanced, as measured with --knn.*, in encoder-best/."""
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
            raise UserError(f"--accumulation-steps {self.accumulation_steps} exceeds --batch-size {self.batch_size}")
        low, high = self.crop.scale
        if low > high:
            raise UserError(f"--crop.scale must be two fractions, the smaller one first, not {low:g} {high:g}")
        if self.crop.kind == "simple-resized" and self.crop.padding >= min(self.image_size):
            raise UserError(f"--crop.padding {self.crop.padding} must be less than each side of --size {self.size}")
        if self.parallel.compile == "full" and self.parallel.strategy == "fsdp":
            raise UserError("--parallel.strategy fsdp needs --parallel.compile blocks or none")

    def check_divisible(self, count: int, of: str) -> None:
        """Raise UserError unless each of `count` ranks (or GPUs: `of`) gets an equal part of a batch, large enough."""
        if self.batch_size % count:
            raise UserError(f"--batch-size {self.batch_size:,} is not divisible by {count} {of}")
        if self.accumulation_steps > self.batch_size // count:
            raise UserError(
                f"--accumulation-steps {self.accumulation_steps} exceeds the {self.batch_size // count:,} images "
                f"of a batch on each of {count} {of}"
            )

    @property
    def interpolation(self) -> Literal["bicubic", "bilinear"]:
        """Resampling of the crop's resize."""
        return self.crop.interpolation

    @property
    def named(self) -> dict[str, str]:
        """Data and weights that this run opens, by flag; empty if not set."""
        return {"--data": self.data, "--init": self.init, "--knn.train": self.knn.train, "--knn.test": self.knn.test}

    @property
    def lr(self) -> float:
        """Peak learning rate: base_lr x batch size / 256 (linear scaling), unless set."""
        return self.optim.lr if self.optim.lr is not None else self.optim.base_lr * self.batch_size / 256


def _check_target(target: TargetConfig, dtype: str) -> None:
    window, binned = target.normalize_window, target.distance == "cross_entropy"
    if window and (window < 3 or window % 2 == 0):
        raise UserError(f"--target.normalize-window must be odd and at least 3, not {window}")
    if binned and (target.normalize_patches or window):
        raise UserError(
            "--target.distance cross_entropy needs values in [0, 1]: add --target.no-normalize-patches, and no window"
        )
    if target.normalize_patches and window:
        raise UserError("--target.normalize-window replaces patches: add --target.no-normalize-patches")
    if target.kind == "low-frequency" and target.variant == "paper-code" and dtype == "float32":
        raise UserError("paper-code would mirror negative values of --dtype float32: pass --target.variant exact")
    if binned and dtype == "float32":
        raise UserError("--target.distance cross_entropy needs values in [0, 1], so it excludes --dtype float32")


def _check_normalization(config: ModelConfig) -> None:
    """Raise UserError unless mean and std have a value for each channel, in units of the largest pixel value."""
    largest = {"uint8": 255, "uint16": 65_535}.get(config.dtype)
    for name, values in (("mean", config.mean), ("std", config.std)):
        if values is None:
            continue
        if len(values) != config.channels:
            raise UserError(f"--{name} has {len(values)} values for {config.channels} channels")
        if largest is not None and not all(0 <= value <= 1 for value in values):
            given, scaled = " ".join(f"{v:g}" for v in values), " ".join(f"{v / largest:.4g}" for v in values)
            fits = all(0 <= value <= largest for value in values)
            advice = f"; for values of 0 to {largest}: --{name} {scaled}" if fits else ""
            raise UserError(f"--{name} {given} must be from 0 to 1, as pixels are (--dtype {config.dtype}){advice}")
