"""A Run: everything that decides what a pre-training run computes, as frozen data (to and from JSON: `runfile.py`).

Imports no torch, so that `pixmim pretrain --help` answers at once. The text under each field is its help; what is
suppressed there belongs to the recipe.
"""

import json
import re
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Annotated, Literal

from tyro.conf import Suppress
from tyro.constructors import PrimitiveConstructorSpec

from pixmim.errors import UserError, shown
from pixmim.options import MAX_CHANNELS, MAX_SIDE, check_name, check_options

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
class Model:
    """Who predicts."""

    name: str = "mae"
    """Method: mae, lsmae, convmae, simmim."""
    backbone: str = "vit_base_patch16_224"
    """mae, lsmae: a plain timm ViT. simmim: a timm Swin, Beit or ViT. convmae: convmae_base or _tiny."""
    decoder_dim: int = 512
    """Width of the decoder (not for simmim)."""
    decoder_depth: int = 8
    """Blocks of the decoder."""
    decoder_heads: int = 16
    """Attention heads of the decoder."""
    decoder_stride: int = 1
    """Run the decoder on a grid this many times coarser than the encoder's (not for simmim)."""
    predict_patch: int = 0
    """Side of the predicted patches in pixels, up to decoder_stride times the encoder's; 0: the encoder's."""
    head: Literal["linear", "mlp"] = "linear"
    """simmim: what predicts the pixels."""
    options: Annotated[dict[str, Option], OPTIONS] = field(default_factory=dict)
    """More keywords for the backbone, such as: embed_dim 128 depth 6 num_heads 4. Added to the recipe's own."""

    def __post_init__(self) -> None:
        check_name(self.backbone)
        decoder = ("decoder_dim", "decoder_depth", "decoder_heads", "decoder_stride", "predict_patch")
        check_options({name: getattr(self, name) for name in decoder})
        check_options(self.options)


@dataclass(frozen=True)
class Crop:
    """What the network sees of the picture."""

    kind: Literal["src", "rrc", "cc"] = "src"
    """src: simple resized crop (PixMIM). rrc: random resized crop (MAE). cc: centre crop."""
    padding: int = 4
    """src: pixels of reflection on each side."""
    scale: tuple[float, float] = (0.2, 1.0)
    """rrc: range of the share of the area."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Resampling of the resize, always with antialias."""
    flip: float = 0.5
    """Probability of a horizontal flip."""


@dataclass(frozen=True)
class Mask:
    """What is hidden."""

    kind: Literal["random", "units", "square", "moving-square", "blocks"] = "random"
    """random: MAE. units: squares of several patches (LSMAE, SimMIM). square: one, in the middle. blocks: BEiT."""
    ratio: float = 0.75
    """Share that is hidden."""
    unit: int = 32
    """units: side in pixels, a multiple of the model's patch."""
    whole_units: bool = False
    """units: hide ceil(ratio x units) whole ones (SimMIM), instead of an exact number of patches (LSMAE)."""


@dataclass(frozen=True)
class Target:
    """What must be predicted, and how far off is measured."""

    kind: Literal["low-frequency", "pixels"] = "low-frequency"
    """low-frequency: PixMIM. pixels: the image as it is."""
    radius: float | Literal["auto"] = "auto"
    """Cut-off in frequency bins; auto: 40 at 224 pixels and in proportion elsewhere."""
    form: Literal["exact", "released"] = "exact"
    """exact: centred and real. released: half a bin off and absolute, as the paper's code."""
    normalise_patches: bool = True
    """Normalise each target patch by its own mean and deviation (norm_pix)."""
    normalise_window: int = 0
    """Instead, normalise each value by those of a window of this odd side in pixels (later SimMIM: 47); 0: do not."""
    distance: Literal["mse", "l1", "smooth_l1", "cross_entropy"] = "mse"
    """Distance between prediction and target. cross_entropy: classify colours, each channel into one of `bins`."""
    bins: int = 8
    """cross_entropy: equal parts of [0, 1]."""


@dataclass(frozen=True)
class Optim:
    """AdamW and its schedule: linear warm-up, then a cosine or one step down, update by update."""

    base_lr: float = 1.5e-4
    """Learning rate per 256 images of a batch."""
    lr: float | None = None
    """The learning rate itself; otherwise base_lr x batch size / 256."""
    schedule: Literal["cosine", "step"] = "cosine"
    """cosine: down to final_lr. step: constant, then a tenth (SimMIM over 800 epochs)."""
    drop_at: float = 0.875
    """step: share of the run, however long, after which the learning rate drops; 7/8 is epoch 700 of 800."""
    first_lr: float = 0.0
    """Where the warm-up begins."""
    final_lr: float = 0.0
    """Where the cosine ends."""
    warmup: float = 40.0
    """Epochs of warm-up; never more than a fifth of the run."""
    warmup_prefix: bool = True
    """True: the cosine begins after the warm-up (MAE). False: it counts from the first step (SimMIM)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the moments."""
    weight_decay: float = 0.05
    """Not applied to norms, biases, positions and single tokens."""
    clip: float | None = None
    """Largest norm of the gradient; None: no clipping."""


@dataclass(frozen=True)
class Scale:
    """How the work is spread over processes and made to fit. Changes nothing of what is computed but rounding."""

    parallel: Literal["auto", "ddp", "fsdp"] = "auto"
    """With several processes: ddp keeps the whole model on each, fsdp a part of it (large ones). auto: ddp."""
    compile: Literal["none", "blocks", "whole"] = "none"
    """torch.compile of each transformer block, or of the whole model (not with fsdp)."""
    recompute: bool = False
    """Forget what blocks computed and compute it again for the gradient: less memory, a third more time."""
    timeout: float = 600.0
    """Seconds that processes wait for each other before the run ends and says who did not come."""


@dataclass(frozen=True)
class Saving:
    """When checkpoints are written, and which stay."""

    every: int = 0
    """Steps between checkpoints; 0: every ten minutes. One is always written at the end and when interrupted."""
    last: int = 2
    """The newest ones that stay."""
    epochs: float = 0.0
    """Besides, one is written every so many epochs, and stays; 0: none."""


@dataclass(frozen=True)
class Knn:
    """Periodic k-NN while training, for the curve of accuracy against epochs."""

    train: str = ""
    """Labelled data that vote."""
    test: str = ""
    """Labelled data that are classified."""
    every: float = 0.0
    """Epochs between two measurements; 0: none. The start and the end are measured too."""


@dataclass(frozen=True)
class Made:
    """What the recipe was made for, so that a run far from it can be warned about."""

    images: int = 1_281_167
    """Images in the data set."""
    steps: int = 0
    """Updates of the weights; 0: unknown."""


@dataclass(frozen=True)
class Run:
    """One pre-training run."""

    recipe: Annotated[str, Suppress] = ""
    """Name of the recipe this run began as."""
    data: str = ""
    """A folder of images, a cache, tar shards, a URL, hf:NAME, or shapes: for drawn ones; several as a*3+b
    (docs/data.md lists all)."""
    out: str = ""
    """Directory of the run; otherwise runs/RECIPE-TIME."""
    init: str = ""
    """Weights to begin from: a file, another run, or timm:NAME; otherwise random ones."""
    epochs: float = 300.0
    """Length in passes over the data."""
    steps: int | None = None
    """Length in updates of the weights, instead of epochs."""
    batch_size: int = 4096
    """Images per update of the weights, over all processes; auto: as many as fit into memory at once, at most the
    recipe's own."""
    accumulate: int = 1
    """Parts a batch is computed in, one after another, to fit into memory."""
    size: str = "224"
    """Side of the square the network sees, in pixels, or HEIGHTxWIDTH."""
    channels: int = 3
    """Colour (3), grey (1), or as many as the files have."""
    pixels: Literal["uint8", "uint16", "float32"] = "uint8"
    """uint8, uint16: 255 or 65535 count as one. float32: floating-point values are taken as they are."""
    pages: Literal["first", "channels"] = "first"
    """Of a TIFF with several pages: the first one, or all of them as channels."""
    bands: str = ""
    """Channels that pictures show as red, green and blue, counted from 1, such as 4,3,2, or one as grey; otherwise the
    first three, or of fewer the first."""
    mean: tuple[float, ...] | None = None
    """Mean of each channel; otherwise what `pixmim stats` has measured, or else ImageNet's."""
    std: tuple[float, ...] | None = None
    """Standard deviation of each channel; otherwise as the mean."""
    seed: int = 0
    """Decides weights, order, crops and masks."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the device computes in it, else fp16 on a GPU and fp32 on a CPU."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    keep: Literal["auto", "device", "memory", "disk"] = "auto"
    """Where a cache's images stay once decoded; auto: where they fit into a quarter of the memory."""
    local_copy: float = 50.0
    """GiB on this machine for copies of shards from far away; those used longest ago make room for new ones."""
    threads: int = 0
    """Threads that read and decode images, in each process; 0: one for each core, at most 16."""
    log_every: int = 0
    """Steps between lines of metrics; 0: two hundred lines a run, at least every 50 steps."""
    max_bad: float = 0.25
    """The run stops when more than this share of the images cannot be read."""
    model: Model = field(default_factory=Model)
    crop: Crop = field(default_factory=Crop)
    mask: Mask = field(default_factory=Mask)
    target: Target = field(default_factory=Target)
    optim: Optim = field(default_factory=Optim)
    knn: Knn = field(default_factory=Knn)
    scale: Scale = field(default_factory=Scale)
    saving: Saving = field(default_factory=Saving)
    made: Annotated[Made, Suppress] = field(default_factory=Made)

    def __post_init__(self) -> None:
        h, w = _parse_size(self.size)
        if not re.fullmatch(r"([A-Za-z0-9_][A-Za-z0-9._-]{0,99})?", self.recipe):  # it becomes a part of paths
            raise UserError(f"a recipe's name is a word such as pixmim-vit-small, not {shown(self.recipe)}")
        if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", self.device):
            raise UserError(f"--device is auto, cpu, cuda, cuda:1 or mps, not {shown(self.device)}")
        for name in (
            "batch_size",
            "accumulate",
            "channels",
            "epochs",
            "seed",
            "threads",
            "log_every",
        ):
            least = 1 if name in ("batch_size", "accumulate", "channels") else 0
            if getattr(self, name) < least:
                raise UserError(f"{_flag(name)} must be at least {least}, not {getattr(self, name)}")
        if self.local_copy <= 0:
            raise UserError(f"--local-copy is a number of GiB above 0, not {self.local_copy:g}")
        if self.scale.timeout <= 0:
            raise UserError(f"--scale.timeout is a number of seconds above 0, not {self.scale.timeout:g}")
        if self.scale.compile == "whole" and self.scale.parallel == "fsdp":
            raise UserError("with --scale.parallel fsdp, blocks are compiled one by one: --scale.compile blocks")
        if self.saving.every < 0 or self.saving.last < 1 or self.saving.epochs < 0:
            raise UserError("--saving.every and --saving.epochs are 0 or more, and --saving.last is at least 1")
        if self.batch_size % self.accumulate:
            raise UserError(f"a batch of {self.batch_size} does not divide into {self.accumulate} equal parts")
        if (self.steps is not None and self.steps < 1) or (self.steps is None and self.epochs <= 0):
            raise UserError("a run needs at least one step: see --epochs and --steps")
        if not 0 < self.mask.ratio < 1:
            raise UserError(f"--mask.ratio lies between 0 and 1, not {self.mask.ratio}")
        if self.mask.kind == "units" and self.mask.unit < 1:
            raise UserError(f"--mask.unit is a number of pixels, not {self.mask.unit}")
        if self.target.radius != "auto" and self.target.radius < 0:
            raise UserError(f"--target.radius is a number of frequency bins, not {self.target.radius}")
        window, binned = self.target.normalise_window, self.target.distance == "cross_entropy"
        if binned and self.target.bins < 2:
            raise UserError(f"--target.bins is 2 or more, not {self.target.bins}")
        if window and (window < 3 or window % 2 == 0):
            raise UserError(f"--target.normalise-window is an odd side of 3 pixels or more, not {window}")
        if binned and (self.target.normalise_patches or window):
            raise UserError(
                "normalised values have no bins of [0, 1]: add --target.no-normalise-patches, and no window"
            )
        if self.target.normalise_patches and window:
            raise UserError("a target is normalised once: with a window, add --target.no-normalise-patches")
        if not 0.2 <= self.optim.drop_at <= 1:
            raise UserError(
                f"--optim.drop-at is a share between 0.2, where warm-up ends, and 1: not {self.optim.drop_at}"
            )
        if binned and self.pixels == "float32":
            raise UserError(
                "measured values (--pixels float32) have no bins of [0, 1]: choose another --target.distance"
            )
        if self.std is not None and min(self.std, default=0) <= 0:
            raise UserError(f"--std is above zero in each channel, not {' '.join(map(str, self.std))}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.channels:
                raise UserError(f"--{name} has {len(values)} values for {self.channels} channels")
        for name, (low, high) in _BOUNDS.items():
            value = attrgetter(name)(self)
            for one in value if isinstance(value, tuple) else (value,):
                if isinstance(one, int | float) and not low <= one <= high:  # not a number fails, too
                    raise UserError(f"{_flag(name)} must be from {low:,} to {high:,}, not {shown(one)}")
        self.drawn  # noqa: B018 (raises)
        if h * w * self.channels > MAX_VALUES:
            raise UserError(
                f"--size {self.size} with --channels {self.channels} makes {h * w * self.channels:,} values of an "
                f"image: at most {MAX_VALUES:,}"
            )
        if not 0 < self.crop.scale[0] <= self.crop.scale[1]:
            raise UserError(f"--crop.scale is two shares above 0, the smaller one first, not {self.crop.scale}")

    def check_shares(self, count: int, of: str) -> None:
        """Raise UserError unless each of `count` processes (or GPUs: `of`) gets an equal share of a batch's parts."""
        if self.batch_size % (self.accumulate * count):
            parts = f" in {self.accumulate} parts" if self.accumulate > 1 else ""
            raise UserError(f"a batch of {self.batch_size:,}{parts} does not divide among {count} {of}")

    @property
    def named(self) -> dict[str, str]:
        """Data and weights that this run opens, by flag; empty where it names none."""
        return {"--data": self.data, "--init": self.init, "--knn.train": self.knn.train, "--knn.test": self.knn.test}

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
    def hw(self) -> tuple[int, int]:
        """Height and width of what the network sees, in pixels."""
        return _parse_size(self.size)

    @property
    def lr(self) -> float:
        """The peak learning rate of this run's real batch."""
        return self.optim.lr if self.optim.lr is not None else self.optim.base_lr * self.batch_size / 256

    @property
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation per channel; ImageNet's for colour, their averages for other channels."""
        if self.channels == 3:
            return self.mean or (0.485, 0.456, 0.406), self.std or (0.229, 0.224, 0.225)
        return self.mean or (0.449,) * self.channels, self.std or (0.226,) * self.channels


_BOUNDS: dict[str, tuple[float, float]] = {
    "epochs": (0, 1e9),
    "steps": (1, 999_999_999),
    "batch_size": (1, 2**20),
    "accumulate": (1, 2**20),
    "channels": (1, MAX_CHANNELS),
    "mean": (-1e9, 1e9),
    "std": (1e-12, 1e9),
    "seed": (0, 2**63 - 1),
    "local_copy": (0, 1e9),
    "threads": (0, 1_024),
    "log_every": (0, 1e9),
    "max_bad": (0, 1),
    "crop.padding": (0, MAX_SIDE),
    "crop.scale": (0, 1),
    "crop.flip": (0, 1),
    "mask.unit": (0, MAX_SIDE),
    "target.radius": (0, 1e9),
    "target.normalise_window": (0, MAX_SIDE),
    "target.bins": (0, 4_096),
    "optim.base_lr": (0, 1e9),
    "optim.lr": (0, 1e9),
    "optim.first_lr": (0, 1e9),
    "optim.final_lr": (0, 1e9),
    "optim.warmup": (0, 1e9),
    "optim.betas": (0, 0.999999),
    "optim.weight_decay": (0, 1e9),
    "optim.clip": (0, 1e9),
    "scale.timeout": (0, 1e9),
    "saving.every": (0, 1e9),
    "saving.last": (1, 1e9),
    "saving.epochs": (0, 1e9),
    "knn.every": (0, 1e9),
    "made.images": (0, 1e18),
    "made.steps": (0, 1e18),
}
"""Least and greatest value of every number in a Run whose size a file, or a slip of the hand, could make absurd."""


def _parse_size(text: str) -> tuple[int, int]:
    sides = text.lower().split("x")
    if len(sides) in (1, 2) and all(side.isascii() and side.isdigit() and len(side) < 9 for side in sides):
        h, w = int(sides[0]), int(sides[-1])
        if min(h, w) >= 1 and max(h, w) <= MAX_SIDE:
            return h, w
    raise UserError(
        f"--size is a number of pixels such as 224, or HEIGHTxWIDTH such as 192x384, at most {MAX_SIDE:,} each, "
        f"not {shown(text)}"
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
