"""From a Run to the four choices it names (crop, mask, model, target), and the numbers that drive them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import nn

from pixmim.config import ModelConfig, PretrainConfig
from pixmim.data.dataset import ImageSpec
from pixmim.data.statistics import load_statistics
from pixmim.losses import ReconstructionLoss
from pixmim.masking import BeitBlockMask, BlockwiseRandomMask, MaskGenerator, MaskSampler, RandomMask, SquareMask
from pixmim.models import create_encoder, create_model
from pixmim.models.base import MaskedModel
from pixmim.targets import ColorBins, LowFrequency, Pixels
from pixmim.training.find_batch_size import in_gib
from pixmim.transforms.crops import CenterCrop, Crop, RandomResizedCrop, SimpleResizedCrop
from pixmim.utils.errors import UserError, first_line
from pixmim.utils.memory import free_memory
from pixmim.utils.patches import grid_of

Module = TypeVar("Module", bound=nn.Module)


_UNKNOWN = "the weights' pre-training is unknown: nothing says what was hidden and predicted"

MAX_PATCHES = 2**18
"""Most patches of an image; attention between so many takes more memory than any machine has."""


def image_spec(config: ModelConfig) -> ImageSpec:
    """What every image is brought into before it is cropped."""
    return ImageSpec(config.channels, config.dtype, config.tiff_pages)


def with_dataset_stats(config: PretrainConfig) -> tuple[PretrainConfig, list[str]]:
    """Fill in a missing mean and std with what `pixmim stats` measured of the data; return a line to print."""
    found = load_statistics(config.data, image_spec(config)) if config.mean is None or config.std is None else None
    if found is None:
        return config, []
    count = f"{found.images:,} of {found.total:,}" if found.images < found.total else f"{found.total:,}"
    known = replace(config, mean=config.mean or found.mean, std=config.std or found.std)
    return known, [f"mean and std: measured on {count} images by `pixmim stats`"]


def build_crop(config: PretrainConfig) -> Crop:
    """What the network sees of a picture."""
    if config.crop.kind == "simple-resized":
        return SimpleResizedCrop(config.image_size, config.crop.padding, config.crop.interpolation)
    if config.crop.kind == "random-resized":
        return RandomResizedCrop(config.image_size, config.crop.scale, interpolation=config.crop.interpolation)
    return CenterCrop(config.image_size, interpolation=config.crop.interpolation)


def build_mask_sampler(config: ModelConfig, patch: int) -> MaskSampler:
    """Build the masks for a model with patches of `patch` pixels. Raises UserError if the model cannot take them."""
    m = config.mask
    if m is None:
        raise UserError(_UNKNOWN)
    masker: MaskGenerator
    if m.kind == "random":
        masker = RandomMask(m.ratio)
    elif m.kind == "blocks":
        if m.block_size % patch:
            raise UserError(f"--mask.block-size {m.block_size} is no multiple of the model's patches of {patch} pixels")
        masker = BlockwiseRandomMask(m.ratio, m.block_size // patch, m.whole_blocks)
    elif m.kind == "beit-blocks":
        masker = BeitBlockMask(m.ratio)
    else:
        masker = SquareMask(m.ratio, moving=m.kind == "moving-square")
    try:  # a few masks show what a run would stumble over
        grid = grid_of(config.image_size, patch)
        if grid[0] * grid[1] > MAX_PATCHES:
            raise UserError(
                f"{grid[0] * grid[1]:,} patches of {patch} pixels are more than the {MAX_PATCHES:,} allowed"
            )
        batch_size = config.batch_size if isinstance(config, PretrainConfig) else 1
        sampler = MaskSampler(masker, grid, _seed(config), batch_size)
        mask = sampler(step=0, rows=range(max(1, min(64, 2**20 // (grid[0] * grid[1])))))
        if config.model.name != "simmim":
            _ = mask.indices
    except ValueError as error:
        raise UserError(f"--mask.kind {m.kind}: {error}") from error
    return sampler


def build_model(config: ModelConfig) -> MaskedModel:
    """Who predicts, with the initial weights that the run's seed decides. Raises UserError."""
    m = config.model
    if m.name == "simmim" and (m.decoder_stride != 1 or m.predict_patch):
        raise UserError("simmim has no decoder: leave out --model.decoder-stride and --model.predict-patch")
    decoder = {
        "decoder_dim": m.decoder_dim,
        "decoder_depth": m.decoder_depth,
        "decoder_heads": m.decoder_heads,
        "decoder_stride": m.decoder_stride,
        "predict_patch": m.predict_patch,
    }
    own = {"head": m.head} if m.name == "simmim" else decoder
    outputs = config.target.bins if config.target is not None and config.target.distance == "cross_entropy" else 1
    given = {"img_size": config.image_size, "in_chans": config.channels, "outputs": outputs, **own, **m.options}
    check_room(lambda: create_model(m.name, m.backbone, **given), m.backbone)
    with seeded(_seed(config)):
        return create_model(m.name, m.backbone, **given)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator within a `with` statement. The caller's generators stay as they are."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def build_encoder(config: ModelConfig) -> nn.Module:
    """The encoder alone, its weights at random. Raises UserError."""
    m = config.model
    given = {"img_size": config.image_size, "in_chans": config.channels, **m.options}
    check_room(lambda: create_encoder(m.name, m.backbone, **given), m.backbone)
    return create_encoder(m.name, m.backbone, **given)


def sketch(make: Callable[[], Module], name: str) -> Module:
    """Build a module without memory for its weights, on PyTorch's meta device: its tensors have only shapes.

    Raises UserError, with the model's `name`, for sizes that do not go together.
    """
    with torch.device("meta"):
        try:
            return make()
        except RuntimeError as error:
            raise UserError(f"{name} cannot be built: {first_line(error)}") from error


def check_room(make: Callable[[], nn.Module], name: str) -> None:
    """Raise UserError unless the weights of what `make` builds fit into the free memory. Takes none to find out."""
    if torch.empty(0).device.type == "meta":  # the caller takes none either
        return
    module = sketch(make, name)
    size = sum(value.nbytes for value in [*module.parameters(), *module.buffers()])
    free = free_memory()
    if free is not None and size > free:
        raise UserError(f"{name} needs {in_gib(size)} GiB for its weights as asked for, and {in_gib(free)} are free")


def build_loss(config: ModelConfig) -> ReconstructionLoss:
    """What must be predicted, and the distance to it."""
    mean, std = config.normalization
    t = config.target
    if t is None:
        raise UserError(_UNKNOWN)
    target: nn.Module = LowFrequency(t.radius, t.variant, mean, std) if t.kind == "low-frequency" else Pixels()
    if t.distance == "cross_entropy":
        target = ColorBins(t.bins, target, mean, std)
    return ReconstructionLoss(target, t.normalize_patches, t.distance, t.normalize_window)


def _seed(config: ModelConfig) -> int:
    """Return a run's seed; 0 for imported weights."""
    return config.seed if isinstance(config, PretrainConfig) else 0
