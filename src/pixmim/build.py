"""Build crop, mask sampler, model and loss from a configuration."""

from dataclasses import replace
from typing import Any

from torch import nn

from pixmim.config import ModelConfig, PretrainConfig
from pixmim.data.dataset import ImageSpec
from pixmim.data.statistics import load_statistics
from pixmim.losses import ReconstructionLoss
from pixmim.mask_patterns import BeitBlockMask, GreenNoiseMask, SquareMask
from pixmim.masking import BlockwiseRandomMask, MaskGenerator, MaskSampler, RandomMask
from pixmim.models import create_encoder, create_model
from pixmim.models.base import MaskedModel
from pixmim.targets import ColorBins, LowFrequency, Pixels
from pixmim.transforms.crops import CenterCrop, Crop, RandomResizedCrop, SimpleResizedCrop
from pixmim.utils.errors import UserError
from pixmim.utils.initialization import check_memory, seeded
from pixmim.utils.patches import grid_of

_UNKNOWN = "the pre-training of these weights is unknown: no mask and no target to reconstruct with"

MAX_PATCHES = 2**18
"""Largest number of patches of an image; attention between more does not fit in any memory."""


def image_spec(config: ModelConfig) -> ImageSpec:
    """Return the channels and dtype that every image is converted to before it is cropped."""
    return ImageSpec(config.channels, config.dtype, config.tiff_pages, config.stretch, config.max_no_data)


def with_dataset_stats(config: PretrainConfig) -> tuple[PretrainConfig, list[str]]:
    """Fill in a missing mean or std as measured by `pixmim stats`; return the configuration, and lines to print."""
    stats = load_statistics(config.data, image_spec(config)) if config.mean is None or config.std is None else None
    if stats is None:
        return config, []
    count = f"{stats.images:,} of {stats.total:,}" if stats.images < stats.total else f"{stats.total:,}"
    config = replace(config, mean=config.mean or stats.mean, std=config.std or stats.std)
    return config, [f"mean and std: measured on {count} images by `pixmim stats`"]


def build_crop(config: PretrainConfig) -> Crop:
    """Build the crop of training images."""
    c, size = config.crop, config.image_size
    if c.kind == "simple-resized":
        return SimpleResizedCrop(size, c.padding, c.interpolation)
    if c.kind == "random-resized":
        return RandomResizedCrop(size, c.scale, interpolation=c.interpolation)
    return CenterCrop(size, interpolation=c.interpolation)


def build_mask_sampler(config: ModelConfig, patch: int) -> MaskSampler:
    """Build the sampler of masks, and test it on a few.

    Args:
        config: A configuration with a mask.
        patch: Side of the model's patches in pixels.

    Raises:
        UserError: If the masks do not fit the patches or the model.
    """
    m = config.mask
    if m is None:
        raise UserError(_UNKNOWN)
    generator: MaskGenerator
    if m.kind == "random":
        generator = RandomMask(m.ratio)
    elif m.kind == "blocks":
        if m.block_size % patch:
            raise UserError(f"--mask.block-size {m.block_size} is not a multiple of the model's {patch}-pixel patches")
        generator = BlockwiseRandomMask(m.ratio, m.block_size // patch, m.whole_blocks)
    elif m.kind == "beit-blocks":
        generator = BeitBlockMask(m.ratio)
    elif m.kind == "green-noise":
        generator = GreenNoiseMask(m.ratio)
    else:
        generator = SquareMask(m.ratio, moving=m.kind == "moving-square")
    try:
        grid = grid_of(config.image_size, patch)
        if grid[0] * grid[1] > MAX_PATCHES:
            raise UserError(
                f"--size {config.size} has {grid[0] * grid[1]:,} patches, more than the {MAX_PATCHES:,} allowed"
            )
        seed, batch_size = (config.seed, config.batch_size) if isinstance(config, PretrainConfig) else (0, 1)
        sampler = MaskSampler(generator, grid, seed, batch_size)
        mask = sampler(step=0, rows=range(max(1, min(64, 2**20 // (grid[0] * grid[1])))))
        if config.model.name != "simmim":
            _ = mask.indices  # raises if masks hide different numbers of patches
    except ValueError as error:
        raise UserError(f"--mask.kind {m.kind}: {error}") from error
    return sampler


def build_model(config: ModelConfig) -> MaskedModel:
    """Build the masked model, with initial weights that depend on the seed.

    Raises:
        UserError: If settings of the model contradict each other, or its weights do not fit in memory.
    """
    m = config.model
    decoder = ("decoder_dim", "decoder_depth", "decoder_heads", "decoder_stride", "predict_patch")
    if m.name == "simmim" and (m.decoder_stride != 1 or m.predict_patch):
        raise UserError("simmim has no decoder: leave out --model.decoder-stride and --model.predict-patch")
    own = {name: getattr(m, name) for name in (("head",) if m.name == "simmim" else decoder)}
    outputs = config.target.bins if config.target is not None and config.target.distance == "cross_entropy" else 1
    options = {**_input_options(config), "outputs": outputs, **own, **m.options}
    check_memory(lambda: create_model(m.name, m.backbone, **options), m.backbone)
    with seeded(config.seed if isinstance(config, PretrainConfig) else 0):
        return create_model(m.name, m.backbone, **options)


def build_encoder(config: ModelConfig) -> nn.Module:
    """Build the encoder alone, with random weights. Raises UserError if it cannot be built."""
    m, options = config.model, {**_input_options(config), **config.model.options}
    check_memory(lambda: create_encoder(m.name, m.backbone, **options), m.backbone)
    return create_encoder(m.name, m.backbone, **options)


def build_loss(config: ModelConfig) -> ReconstructionLoss:
    """Build the reconstruction loss: a target, and the distance to it. Raises UserError if they are unknown."""
    mean, std = config.normalization
    t = config.target
    if t is None:
        raise UserError(_UNKNOWN)
    target: nn.Module = LowFrequency(t.radius, t.variant, mean, std) if t.kind == "low-frequency" else Pixels()
    if t.distance == "cross_entropy":
        target = ColorBins(t.bins, target, mean, std)
    return ReconstructionLoss(target, t.normalize_patches, t.distance, t.normalize_window)


def _input_options(config: ModelConfig) -> dict[str, Any]:
    return {"img_size": config.image_size, "in_chans": config.channels}
