"""Recipes: functions that return a PretrainConfig, by name in the literal dict `RECIPES`.

Values are those of the papers and their code; docs/methods.md lists every difference. `base_lr` is per 256 images.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

from pixmim.config import (
    ArchitectureConfig,
    CropConfig,
    MaskConfig,
    OnlineKnnConfig,
    OptimConfig,
    PretrainConfig,
    RecipeInfo,
    TargetConfig,
)
from pixmim.config_io import defaults_for, from_dict
from pixmim.utils.errors import UserError, did_you_mean
from pixmim.utils.validation import from_python

_IMAGENET = 1_281_167  # training images of ImageNet-1k


def mae_vit(size: Literal["base", "large"], epochs: int) -> PretrainConfig:
    """MAE with ViT-B/16 or ViT-L/16 (arXiv 2111.06377, table 8): random resized crop, pixels normalized per patch.

    For 300, 800 and 1600 epochs about 18, 47 and 95 H100-hours for base (6,000 images/s) and twice as many for large.
    """
    return PretrainConfig(
        epochs=epochs,
        batch_size=4096,
        model=ArchitectureConfig("mae", f"vit_{size}_patch16_224"),
        crop=CropConfig(kind="random-resized"),
        target=TargetConfig(kind="pixels"),
        recipe_info=_trained_for(epochs, 4096),
    )


def pixmim_vit(size: Literal["base", "large"], epochs: int) -> PretrainConfig:
    """PixMIM on MAE (arXiv 2303.02416), as its code trains: bilinear resize, and the low-pass of the paper's code.

    The other recipes of PixMIM have a bicubic resize and the exact low-pass.
    """
    config = with_pixmim(mae_vit(size, epochs))
    crop = replace(config.crop, interpolation="bilinear")
    return replace(config, crop=crop, target=replace(config.target, variant="paper-code"))


def with_pixmim(config: PretrainConfig) -> PretrainConfig:
    """Turn a method into its PixMIM form: simple resized crop (bicubic), low-frequency target; other values stay."""
    target = replace(config.target, kind="low-frequency", radius="auto")
    return replace(config, crop=CropConfig(kind="simple-resized"), target=target)


def lsmae_base_448() -> PretrainConfig:
    """LSMAE with ViT-B/16 at 448 px (arXiv 2210.07224): 784 patches, blocks of 2 x 2 hidden, a narrower decoder."""
    return replace(
        mae_vit("base", 800),
        size="448",
        model=ArchitectureConfig("lsmae", "vit_base_patch16_224", decoder_dim=384, decoder_depth=8, decoder_heads=12),
        mask=MaskConfig("blocks", ratio=0.75, block_size=32),
    )


def mff_vit_base(epochs: int) -> PretrainConfig:
    """MFF with ViT-B/16 (arXiv 2308.00261): MAE whose decoder sees a fusion of blocks, with PixMIM's crop of images."""
    config = mae_vit("base", epochs)
    crop = CropConfig(kind="simple-resized", interpolation="bilinear")
    return replace(config, model=ArchitectureConfig("mff", "vit_base_patch16_224"), crop=crop)


def colormae_vit_base(epochs: int) -> PretrainConfig:
    """ColorMAE with ViT-B/16 (arXiv 2407.13036): MAE with masks of green noise."""
    return replace(mae_vit("base", epochs), mask=MaskConfig("green-noise"))


def crossmae_vit_base() -> PretrainConfig:
    """CrossMAE with ViT-B/16 (arXiv 2401.14391): MAE with a decoder of 12 blocks of cross-attention."""
    return replace(mae_vit("base", 800), model=ArchitectureConfig("crossmae", "vit_base_patch16_224", decoder_depth=12))


def pixio_vit_huge() -> PretrainConfig:
    """Pixio with ViT-H/16 at 256 px (arXiv 2512.15715), as its code trains on ImageNet-21k: 642,000 steps of 8192.

    Blocks of 4 x 4 patches are hidden, and the decoder is 32 blocks deep. The encoder has 8 class tokens. No flips.
    """
    return replace(
        mae_vit("large", 400),
        batch_size=8192,
        size="256",
        model=ArchitectureConfig("pixio", "vit_huge_patch14_224", decoder_depth=32, options={"patch_size": 16}),
        crop=CropConfig(kind="random-resized", flip=0.0),
        mask=MaskConfig("blocks", ratio=0.75, block_size=64),
        optim=OptimConfig(base_lr=2.5e-5),
        recipe_info=_trained_for(400, 8192, images=1605 * 8192),
    )


def convmae_base() -> PretrainConfig:
    """ConvMAE-Base (arXiv 2205.03892): as MAE, for 1600 epochs; batch 2048, the lower end of the paper's range."""
    return replace(
        mae_vit("base", 1600),
        batch_size=2048,
        model=ArchitectureConfig("convmae", "convmae_base"),
        recipe_info=_trained_for(1600, 2048),
    )


def simmim_swin_base() -> PretrainConfig:
    """SimMIM with Swin-B at 192 px, window 6, 100 epochs (arXiv 2111.09886): L1 on pixels, blocks of 32 px."""
    return PretrainConfig(
        epochs=100,
        batch_size=2048,
        size="192",
        model=ArchitectureConfig("simmim", "swin_base_patch4_window7_224", options={"window_size": 6}),
        crop=CropConfig(kind="random-resized", scale=(0.67, 1.0), interpolation="bilinear"),
        mask=MaskConfig("blocks", ratio=0.6, block_size=32, whole_blocks=True),
        target=TargetConfig(kind="pixels", normalize_patches=False, distance="l1"),
        optim=OptimConfig(
            base_lr=1e-4,  # published: 2e-4 per 512 images
            warmup_start_lr=4e-6,
            min_lr=4e-5,
            warmup=10,
            warmup_prefix=False,
            betas=(0.9, 0.999),
            clip=5.0,
        ),
        recipe_info=_trained_for(100, 2048),
    )


def simmim_swin_base_800() -> PretrainConfig:
    """SimMIM with Swin-B, 800 epochs: half the learning rate, constant, and a tenth of it from epoch 700 (7/8) on."""
    return replace(
        simmim_swin_base(),
        epochs=800,
        optim=OptimConfig(base_lr=5e-5, schedule="step", warmup_start_lr=2e-6, warmup=10, betas=(0.9, 0.999), clip=5.0),
        recipe_info=_trained_for(800, 2048),
    )


def simmim_swin_large_800() -> PretrainConfig:
    """SimMIM with Swin-L at 192 px, window 12; otherwise as `simmim_swin_base_800`."""
    large = ArchitectureConfig("simmim", "swin_large_patch4_window12_384", options={"window_size": 12})
    return replace(simmim_swin_base_800(), model=large)


def simmim_vit_base() -> PretrainConfig:
    """SimMIM with a BEiT-like ViT-B/16 at 224 px; otherwise as `simmim_swin_base_800`, without stochastic depth."""
    return replace(simmim_swin_base_800(), size="224", model=ArchitectureConfig("simmim", "beit_base_patch16_224"))


def simmim_cnn(backbone: str) -> PretrainConfig:
    """SimMIM with a CNN at 224 px, 300 epochs, in the way of A2MIM (arXiv 2205.13943), by L1 on pixels."""
    return replace(
        simmim_swin_base(),
        epochs=300,
        size="224",
        model=ArchitectureConfig("simmim", backbone),
        crop=CropConfig(kind="random-resized", scale=(0.8, 1.0), interpolation="bilinear"),
        optim=OptimConfig(base_lr=1.5e-4, min_lr=1e-5, warmup=10, betas=(0.9, 0.999)),
        recipe_info=_trained_for(300, 2048),
    )


def pixmim_vit_small() -> PretrainConfig:
    """PixMIM with ViT-S/16 at 224 px, for 10,000 to 500,000 images on one GPU."""
    return PretrainConfig(
        epochs=300,
        batch_size=512,
        model=ArchitectureConfig("mae", "vit_small_patch16_224", decoder_dim=256, decoder_depth=4, decoder_heads=8),
        optim=OptimConfig(base_lr=3e-4, warmup=20),
        recipe_info=_trained_for(300, 512, images=50_000),
    )


def pixmim_vit_tiny() -> PretrainConfig:
    """PixMIM with ViT-Ti/16 at 224 px, for 1,000 to 10,000 images on a small GPU."""
    return PretrainConfig(
        epochs=200,
        batch_size=128,
        model=ArchitectureConfig("mae", "vit_tiny_patch16_224", decoder_dim=128, decoder_depth=2, decoder_heads=4),
        optim=OptimConfig(base_lr=2e-3, warmup=10),
        recipe_info=_trained_for(200, 128, images=10_000),
    )


def pixmim_vit_tiny_small_images(size: Literal["64", "96"]) -> PretrainConfig:
    """PixMIM with ViT-Ti/8 at 64 or 96 px, for 200 to 10,000 images on a CPU: 64 or 144 patches."""
    epochs, images, batch_size = (1000, 1_000, 64) if size == "64" else (400, 5_000, 128)
    config = pixmim_vit_tiny()
    return replace(
        config,
        epochs=epochs,
        batch_size=batch_size,
        size=size,
        model=replace(config.model, options={"patch_size": 8}),
        recipe_info=_trained_for(epochs, batch_size, images),
    )


def adapt(init: str = "") -> PretrainConfig:
    """Continue from published weights, or from another run, on your own images, with PixMIM's crop and target.

    Model, image size, channels, normalization and mask are those of the weights: see `continue_from`. Low learning
    rates, lowest in the first layers, keep what the encoder knows; a new decoder is trained alone at first.
    """
    optim = OptimConfig(base_lr=1.5e-4, warmup=5, layer_decay=0.75, decoder_warmup=10)
    config = PretrainConfig(epochs=100, batch_size=128, optim=optim)
    if not init:
        return config
    from pixmim.weights.start import continue_from  # imports torch

    return continue_from(config, init)


def demo() -> PretrainConfig:
    """PixMIM with a ViT of 1.2 million parameters on synthetic shapes at 48 px: learns in minutes on two CPU cores."""
    return PretrainConfig(
        data="shapes:count=200000,size=48",
        steps=1200,
        batch_size=128,
        size="48",
        model=ArchitectureConfig(
            "mae",
            "vit_tiny_patch16_224",
            decoder_dim=64,
            decoder_depth=2,
            decoder_heads=4,
            options={"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4},
        ),
        mask=MaskConfig(ratio=0.6),  # of 36 patches; at 0.75 it learns more slowly
        optim=OptimConfig(base_lr=3e-3, warmup=0.2),
        knn=OnlineKnnConfig("shapes:count=2000,seed=201,size=48", "shapes:count=1000,seed=202,size=48", every=0.128),
        recipe_info=RecipeInfo(images=200_000, steps=1200),
    )


def _trained_for(epochs: int, batch_size: int, images: int = _IMAGENET) -> RecipeInfo:
    return RecipeInfo(images=images, steps=epochs * images // batch_size)


@dataclass(frozen=True)
class RecipeEntry:
    """A recipe's builder, and in one line its purpose or its published accuracy (per cent, ImageNet-1k)."""

    build: Callable[..., PretrainConfig]
    aim: str
    from_init: bool = False  # the builder takes `init`, the weights to start from


_NO_NUMBER = "ImageNet-1k: no published number"

RECIPES: dict[str, RecipeEntry] = {
    # Images of your own, from few to many; `pixmim advise` chooses among them.
    "pixmim-vit-tiny-64": RecipeEntry(
        partial(pixmim_vit_tiny_small_images, "64"), "200 to 1,000 own images: 0.6 to 4 hours on 2 CPU cores, 1.1 GiB"
    ),
    "pixmim-vit-tiny-96": RecipeEntry(
        partial(pixmim_vit_tiny_small_images, "96"), "1,000 to 10,000 own images: 3 to 18 hours on 2 CPU cores, 2.0 GiB"
    ),
    "pixmim-vit-tiny": RecipeEntry(pixmim_vit_tiny, "1,000 to 10,000 own images: 8 minutes at 10 TFLOP/s (small GPU)"),
    "pixmim-vit-small": RecipeEntry(pixmim_vit_small, "10,000 to 500,000 own images: 5 hours at 10 TFLOP/s (one GPU)"),
    "adapt": RecipeEntry(adapt, "published weights (--init) continued on your own images, 200 or more", True),
    "demo": RecipeEntry(demo, "synthetic shapes, two CPU cores, minutes: the probe gains more than ten points"),
    # PixMIM, table 1: linear probe and fine-tuning, MAE's rows too; ViT-L: MAE, table 3
    "pixmim-vit-base-300": RecipeEntry(partial(pixmim_vit, "base", 300), "ImageNet-1k: 63.3 linear, 83.1 fine-tuned"),
    "pixmim-vit-base": RecipeEntry(partial(pixmim_vit, "base", 800), "ImageNet-1k: 67.5 linear, 83.5 fine-tuned"),
    "pixmim-vit-base-1600": RecipeEntry(partial(pixmim_vit, "base", 1600), _NO_NUMBER),
    "pixmim-vit-large-300": RecipeEntry(partial(pixmim_vit, "large", 300), _NO_NUMBER),
    "pixmim-vit-large": RecipeEntry(partial(pixmim_vit, "large", 800), _NO_NUMBER),
    "pixmim-vit-large-1600": RecipeEntry(partial(pixmim_vit, "large", 1600), _NO_NUMBER),
    "mae-vit-base-300": RecipeEntry(partial(mae_vit, "base", 300), "ImageNet-1k: 60.8 linear, 82.8 fine-tuned"),
    "mae-vit-base": RecipeEntry(partial(mae_vit, "base", 800), "ImageNet-1k: 65.1 linear, 83.3 fine-tuned"),
    "mae-vit-base-1600": RecipeEntry(partial(mae_vit, "base", 1600), "ImageNet-1k: 67.1 linear, 83.5 fine-tuned"),
    "mae-vit-large-300": RecipeEntry(partial(mae_vit, "large", 300), _NO_NUMBER),
    "mae-vit-large": RecipeEntry(partial(mae_vit, "large", 800), _NO_NUMBER),
    "mae-vit-large-1600": RecipeEntry(partial(mae_vit, "large", 1600), "ImageNet-1k: 75.8 linear, 85.9 fine-tuned"),
    "lsmae-base-448": RecipeEntry(lsmae_base_448, _NO_NUMBER),
    "pixmim-lsmae-base-448": RecipeEntry(lambda: with_pixmim(lsmae_base_448()), _NO_NUMBER),
    # As MFF, ColorMAE and Pixio report (frozen, distilled from a ViT-5B of 2 billion images); below, as A2MIM does
    "mff-vit-base-300": RecipeEntry(partial(mff_vit_base, 300), "ImageNet-1k: 64.2 linear, 83.0 fine-tuned"),
    "mff-vit-base": RecipeEntry(partial(mff_vit_base, 800), "ImageNet-1k: 68.3 linear, 83.7 fine-tuned"),
    "pixmim-mff-vit-base": RecipeEntry(lambda: with_pixmim(mff_vit_base(800)), _NO_NUMBER),
    "colormae-vit-base-300": RecipeEntry(partial(colormae_vit_base, 300), "ImageNet-1k: 83.0 fine-tuned"),
    "colormae-vit-base": RecipeEntry(partial(colormae_vit_base, 800), "ImageNet-1k: 83.6 fine-tuned"),
    "colormae-vit-base-1600": RecipeEntry(partial(colormae_vit_base, 1600), "ImageNet-1k: 83.8 fine-tuned"),
    "pixmim-colormae-vit-base": RecipeEntry(lambda: with_pixmim(colormae_vit_base(800)), _NO_NUMBER),
    "crossmae-vit-base": RecipeEntry(crossmae_vit_base, "ImageNet-1k: 83.7 fine-tuned"),
    "pixmim-crossmae-vit-base": RecipeEntry(lambda: with_pixmim(crossmae_vit_base()), _NO_NUMBER),
    "pixio-vit-huge": RecipeEntry(pixio_vit_huge, "ImageNet-21k: no published number (ADE20K, distilled: 50.2)"),
    "pixmim-pixio-vit-huge": RecipeEntry(lambda: with_pixmim(pixio_vit_huge()), "ImageNet-21k: no published number"),
    "convmae-base": RecipeEntry(convmae_base, "ImageNet-1k: 70.9 linear, 85.0 fine-tuned"),
    "pixmim-convmae-base": RecipeEntry(lambda: with_pixmim(convmae_base()), _NO_NUMBER),
    "simmim-swin-base": RecipeEntry(simmim_swin_base, "ImageNet-1k: 82.8 fine-tuned at 192 px, 83.5 at 224 px"),
    "pixmim-simmim-swin-base": RecipeEntry(lambda: with_pixmim(simmim_swin_base()), _NO_NUMBER),
    "simmim-swin-base-800": RecipeEntry(simmim_swin_base_800, "ImageNet-1k: 84.0 fine-tuned at 224 px"),
    "pixmim-simmim-swin-base-800": RecipeEntry(lambda: with_pixmim(simmim_swin_base_800()), _NO_NUMBER),
    "simmim-swin-large-800": RecipeEntry(simmim_swin_large_800, "ImageNet-1k: 85.4 fine-tuned at 224 px"),
    "pixmim-simmim-swin-large-800": RecipeEntry(lambda: with_pixmim(simmim_swin_large_800()), _NO_NUMBER),
    "simmim-resnet50": RecipeEntry(partial(simmim_cnn, "resnet50"), "ImageNet-1k: 80.4 fine-tuned (A2MIM)"),
    "pixmim-simmim-resnet50": RecipeEntry(lambda: with_pixmim(simmim_cnn("resnet50")), _NO_NUMBER),
    "simmim-convnext-base": RecipeEntry(partial(simmim_cnn, "convnext_base"), "ImageNet-1k: 84.1 fine-tuned (A2MIM)"),
    "pixmim-simmim-convnext-base": RecipeEntry(lambda: with_pixmim(simmim_cnn("convnext_base")), _NO_NUMBER),
    "simmim-vit-base": RecipeEntry(simmim_vit_base, "ImageNet-1k: 83.8 fine-tuned"),
    "pixmim-simmim-vit-base": RecipeEntry(lambda: with_pixmim(simmim_vit_base()), _NO_NUMBER),
}


def get_recipe(name: str, **overrides: Any) -> PretrainConfig:
    """Build a recipe's configuration, optionally with other values.

    Args:
        name: A key of `RECIPES`, such as "pixmim-vit-small". The recipe "adapt" reads its model from `init`.
        **overrides: Fields of `PretrainConfig`. Fields of its parts are given as a mapping (`optim={"base_lr": 1e-3}`)
            or by a dotted name (`**{"optim.base_lr": 1e-3}`). `model.options` are added to the recipe's own. `epochs`
            replaces a length in steps.

    Returns:
        The configuration.

    Raises:
        UserError: If the recipe or a field does not exist, or a value is invalid.
    """
    if name not in RECIPES:
        raise UserError(f"there is no recipe '{name}'{did_you_mean(name, RECIPES)} Run `pixmim list` for all.")
    entry = RECIPES[name]
    config = entry.build(os.fspath(overrides.get("init") or "")) if entry.from_init else entry.build()
    values = asdict(replace(defaults_for(config, overrides), recipe=name))
    for key, value in from_python(PretrainConfig, overrides).items():
        _override(values, key, value)
    return from_dict(PretrainConfig, values, f"get_recipe('{name}')")


def _override(values: dict[str, Any], key: str, value: Any) -> None:
    """Set one entry of nested dictionaries; `key` may be dotted, and a mapping is merged into the entry."""
    name, _, rest = key.partition(".")
    inner = values.get(name)
    if isinstance(inner, dict) and rest:
        _override(inner, rest, value)
    elif isinstance(inner, dict) and isinstance(value, Mapping):
        for part, new in value.items():
            _override(inner, part, new)
    else:
        values[key] = os.fspath(value) if isinstance(value, os.PathLike) else value
