"""Recipes: functions that return a PretrainConfig, all of them in the literal dict `RECIPES`.

The GPU hours of the published recipes are estimates: images / (6,000 images/s for base, 3,000 for large), about 35 % of
an H100's bf16 peak.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

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
from pixmim.config_io import from_dict
from pixmim.utils.errors import UserError, did_you_mean

IMAGES = 1_281_167


def mae_vit_base(epochs: int) -> PretrainConfig:
    """MAE with ViT-B/16 (arXiv 2111.06377): random resized crop, pixels normalized per patch.

    pixmim pretrain mae-vit-base --data imagenet/train
    18, 47 and 95 H100-hours for 300, 800 and 1600 epochs (estimate).
    Aims at 60.8 / 65.1 / 67.1 % linear probe and 82.8 / 83.3 / 83.5 % fine-tuned (PixMIM's table 1, MAE's rows).
    """
    return PretrainConfig(
        epochs=epochs,
        batch_size=4096,
        model=ArchitectureConfig(backbone="vit_base_patch16_224"),
        crop=CropConfig(kind="random-resized"),
        target=TargetConfig(kind="pixels"),
        recipe_info=RecipeInfo(images=IMAGES, steps=epochs * IMAGES // 4096),
    )


def mae_vit_large(epochs: int) -> PretrainConfig:
    """MAE with ViT-L/16; otherwise as `mae_vit_base`.

    pixmim pretrain mae-vit-large --data imagenet/train
    36, 95 and 190 H100-hours for 300, 800 and 1600 epochs (estimate).
    Aims at 75.8 % linear probe and 85.9 % fine-tuned after 1600 epochs (MAE's paper).
    """
    return replace(mae_vit_base(epochs), model=ArchitectureConfig(backbone="vit_large_patch16_224"))


def pixmim_vit_base(epochs: int) -> PretrainConfig:
    """PixMIM on MAE with ViT-B/16 (arXiv 2303.02416): simple resized crop, low frequencies up to radius 40.

    pixmim pretrain pixmim-vit-base --data imagenet/train
    18, 47 and 95 H100-hours for 300, 800 and 1600 epochs (estimate).
    Aims at 63.3 / 67.5 % linear probe and 83.1 / 83.5 % fine-tuned after 300 / 800 epochs (table 1). As the published
    numbers were made: a bilinear resize before the crop, and the low-pass of the paper's code (`as_released`).
    """
    return as_released(with_pixmim(mae_vit_base(epochs)))


def pixmim_vit_large(epochs: int) -> PretrainConfig:
    """PixMIM on MAE with ViT-L/16; otherwise as `pixmim_vit_base`. No number has been published.

    pixmim pretrain pixmim-vit-large --data imagenet/train
    36, 95 and 190 H100-hours for 300, 800 and 1600 epochs (estimate).
    """
    return as_released(with_pixmim(mae_vit_large(epochs)))


def lsmae_base_448() -> PretrainConfig:
    """LSMAE with ViT-B/16 at 448 px (arXiv 2210.07224): 784 patches, hidden in units of 2 x 2, a thinner decoder.

    pixmim pretrain lsmae-base-448 --data imagenet/train
    """
    return replace(
        mae_vit_base(800),
        size="448",
        model=ArchitectureConfig("lsmae", "vit_base_patch16_224", decoder_dim=384, decoder_depth=8, decoder_heads=12),
        mask=MaskConfig("blocks", ratio=0.75, block_size=32),
    )


def convmae_base() -> PretrainConfig:
    """ConvMAE-Base (arXiv 2205.03892): MAE's settings, 1600 epochs; the paper's batch is 2048 to 3072.

    pixmim pretrain convmae-base --data imagenet/train
    Aims at 70.9 % linear probe and 85.0 % fine-tuned.
    """
    return replace(
        mae_vit_base(1600),
        batch_size=2048,
        model=ArchitectureConfig("convmae", "convmae_base"),
        recipe_info=RecipeInfo(images=IMAGES, steps=1600 * IMAGES // 2048),
    )


def simmim_swin_base() -> PretrainConfig:
    """SimMIM with Swin-B at 192 px, window 6, 100 epochs (arXiv 2111.09886): L1 on pixels, whole units of 32 px.

    pixmim pretrain simmim-swin-base --data imagenet/train
    Aims at 82.8 % fine-tuned at 192 px (83.5 % at 224 px).
    """
    return PretrainConfig(
        epochs=100,
        batch_size=2048,
        size="192",
        model=ArchitectureConfig("simmim", "swin_base_patch4_window7_224", options={"window_size": 6}),
        crop=CropConfig(kind="random-resized", scale=(0.67, 1.0), interpolation="bilinear"),
        mask=MaskConfig("blocks", ratio=0.6, block_size=32, whole_blocks=True),
        target=TargetConfig(kind="pixels", normalize_patches=False, distance="l1"),
        # 2e-4 per 512 images; the ends of the schedule are not scaled
        optim=OptimConfig(
            base_lr=1e-4,
            warmup_start_lr=4e-6,
            min_lr=4e-5,
            warmup=10,
            warmup_prefix=False,
            betas=(0.9, 0.999),
            clip=5.0,
        ),
        recipe_info=RecipeInfo(images=IMAGES, steps=100 * IMAGES // 2048),
    )


def simmim_swin_base_800() -> PretrainConfig:
    """SimMIM with Swin-B, 800 epochs: a lower learning rate, constant, and a tenth of it from epoch 700 on.

    pixmim pretrain simmim-swin-base-800 --data imagenet/train
    Aims at 84.0 % fine-tuned at 224 px. A run of another length drops after the same 7/8 of it.
    """
    return replace(
        simmim_swin_base(),
        epochs=800,
        # 1e-4 per 512 images; where the warm-up begins is not scaled
        optim=OptimConfig(base_lr=5e-5, schedule="step", warmup_start_lr=2e-6, warmup=10, betas=(0.9, 0.999), clip=5.0),
        recipe_info=RecipeInfo(images=IMAGES, steps=800 * IMAGES // 2048),
    )


def simmim_swin_large_800() -> PretrainConfig:
    """SimMIM with Swin-L at 192 px, window 12; otherwise as `simmim_swin_base_800`.

    pixmim pretrain simmim-swin-large-800 --data imagenet/train
    Aims at 85.4 % fine-tuned at 224 px.
    """
    large = ArchitectureConfig("simmim", "swin_large_patch4_window12_384", options={"window_size": 12})
    return replace(simmim_swin_base_800(), model=large)


def simmim_vit_base() -> PretrainConfig:
    """SimMIM with a BEiT-like ViT-B/16 at 224 px, 800 epochs; otherwise as `simmim_swin_base_800`.

    pixmim pretrain simmim-vit-base --data imagenet/train
    Aims at 83.8 % fine-tuned. The released configuration drops paths as well, at a rate of 0.1; here that is
    --model.options drop_path_rate 0.1, and left out because a resumed run would draw other paths.
    """
    return replace(simmim_swin_base_800(), size="224", model=ArchitectureConfig("simmim", "beit_base_patch16_224"))


def as_released(config: PretrainConfig) -> PretrainConfig:
    """Return a PixMIM run with the two details of the paper's code that differ from pixmim's defaults.

    The code resizes bilinearly (torchvision's default) and keeps frequencies within a circle that is half a bin off
    center, taking the absolute value of the result. pixmim's own recipes resize bicubically, as MAE's crop does, and
    use the centered, real low-pass.
    """
    crop, target = replace(config.crop, interpolation="bilinear"), replace(config.target, variant="paper-code")
    return replace(config, crop=crop, target=target)


def with_pixmim(config: PretrainConfig) -> PretrainConfig:
    """PixMIM is two values of a method's four choices; all others stay. The cut-off is 40 at 224 px, in proportion."""
    return replace(
        config,
        crop=CropConfig(kind="simple-resized"),
        target=replace(config.target, kind="low-frequency", radius="auto"),
    )


def pixmim_vit_small() -> PretrainConfig:
    """PixMIM with ViT-S/16 at 224 px, for some ten thousand images and one GPU; batch 512, decoder 256 wide, 4 deep.

    pixmim pretrain pixmim-vit-small --data ~/photos
    """
    return PretrainConfig(
        epochs=300,
        batch_size=512,
        model=ArchitectureConfig(backbone="vit_small_patch16_224", decoder_dim=256, decoder_depth=4, decoder_heads=8),
        optim=OptimConfig(base_lr=3e-4, warmup=20),
        recipe_info=RecipeInfo(images=50_000, steps=300 * 50_000 // 512),
    )


def pixmim_vit_tiny() -> PretrainConfig:
    """PixMIM with ViT-Ti/16 at 224 px, for a few thousand images and a small GPU or a patient CPU.

    pixmim pretrain pixmim-vit-tiny --data ~/photos
    """
    return PretrainConfig(
        epochs=200,
        batch_size=128,
        model=ArchitectureConfig(backbone="vit_tiny_patch16_224", decoder_dim=128, decoder_depth=2, decoder_heads=4),
        optim=OptimConfig(base_lr=2e-3, warmup=10),
        recipe_info=RecipeInfo(images=10_000, steps=200 * 10_000 // 128),
    )


def demo() -> PretrainConfig:
    """PixMIM with a ViT of 1.2 million values on drawn shapes at 48 px: learns in minutes on two CPU cores.

    make demo
    """
    return PretrainConfig(
        data="shapes:count=200000,size=48",
        steps=1200,
        batch_size=128,
        size="48",
        model=ArchitectureConfig(
            backbone="vit_tiny_patch16_224",
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


@dataclass(frozen=True)
class RecipeEntry:
    """A recipe's builder, and one line about what it aims at."""

    build: Callable[[], PretrainConfig]
    aim: str


RECIPES: dict[str, RecipeEntry] = {
    "demo": RecipeEntry(demo, "drawn shapes, two CPU cores, minutes: the probe gains ten points and more"),
    "pixmim-vit-tiny": RecipeEntry(pixmim_vit_tiny, "a few thousand images of your own, a small GPU or a patient CPU"),
    "pixmim-vit-small": RecipeEntry(pixmim_vit_small, "tens of thousands of images of your own, one GPU"),
    "pixmim-vit-base-300": RecipeEntry(partial(pixmim_vit_base, 300), "ImageNet-1k: 63.3 linear, 83.1 fine-tuned"),
    "pixmim-vit-base": RecipeEntry(partial(pixmim_vit_base, 800), "ImageNet-1k: 67.5 linear, 83.5 fine-tuned"),
    "pixmim-vit-base-1600": RecipeEntry(partial(pixmim_vit_base, 1600), "ImageNet-1k: no number published"),
    "pixmim-vit-large-300": RecipeEntry(partial(pixmim_vit_large, 300), "ImageNet-1k: no number published"),
    "pixmim-vit-large": RecipeEntry(partial(pixmim_vit_large, 800), "ImageNet-1k: no number published"),
    "pixmim-vit-large-1600": RecipeEntry(partial(pixmim_vit_large, 1600), "ImageNet-1k: no number published"),
    "mae-vit-base-300": RecipeEntry(partial(mae_vit_base, 300), "ImageNet-1k: 60.8 linear, 82.8 fine-tuned"),
    "mae-vit-base": RecipeEntry(partial(mae_vit_base, 800), "ImageNet-1k: 65.1 linear, 83.3 fine-tuned"),
    "mae-vit-base-1600": RecipeEntry(partial(mae_vit_base, 1600), "ImageNet-1k: 67.1 linear, 83.5 fine-tuned"),
    "mae-vit-large-300": RecipeEntry(partial(mae_vit_large, 300), "ImageNet-1k: no number published"),
    "mae-vit-large": RecipeEntry(partial(mae_vit_large, 800), "ImageNet-1k: no number published"),
    "mae-vit-large-1600": RecipeEntry(partial(mae_vit_large, 1600), "ImageNet-1k: 75.8 linear, 85.9 fine-tuned"),
    "lsmae-base-448": RecipeEntry(lsmae_base_448, "ImageNet-1k at 448 px: no number at hand"),
    "pixmim-lsmae-base-448": RecipeEntry(
        lambda: with_pixmim(lsmae_base_448()), "ImageNet-1k at 448 px: no number at hand"
    ),
    "convmae-base": RecipeEntry(convmae_base, "ImageNet-1k: 70.9 linear, 85.0 fine-tuned"),
    "pixmim-convmae-base": RecipeEntry(lambda: with_pixmim(convmae_base()), "ImageNet-1k: no number at hand"),
    "simmim-swin-base": RecipeEntry(simmim_swin_base, "ImageNet-1k: 82.8 fine-tuned at 192 px"),
    "pixmim-simmim-swin-base": RecipeEntry(lambda: with_pixmim(simmim_swin_base()), "ImageNet-1k: no number at hand"),
    "simmim-swin-base-800": RecipeEntry(simmim_swin_base_800, "ImageNet-1k: 84.0 fine-tuned at 224 px"),
    "pixmim-simmim-swin-base-800": RecipeEntry(
        lambda: with_pixmim(simmim_swin_base_800()), "ImageNet-1k: no number at hand"
    ),
    "simmim-swin-large-800": RecipeEntry(simmim_swin_large_800, "ImageNet-1k: 85.4 fine-tuned at 224 px"),
    "pixmim-simmim-swin-large-800": RecipeEntry(
        lambda: with_pixmim(simmim_swin_large_800()), "ImageNet-1k: no number at hand"
    ),
    "simmim-vit-base": RecipeEntry(simmim_vit_base, "ImageNet-1k: 83.8 fine-tuned"),
    "pixmim-simmim-vit-base": RecipeEntry(lambda: with_pixmim(simmim_vit_base()), "ImageNet-1k: no number at hand"),
}


def get_recipe(name: str, **overrides: Any) -> PretrainConfig:
    """Build a recipe's configuration, with some of its fields replaced.

    Args:
        name: A key of `RECIPES`, such as "pixmim-vit-small".
        **overrides: Fields of `PretrainConfig`. Those of its parts are given as a mapping (`optim={"base_lr": 1e-3}`)
            or by a dotted name (`**{"optim.base_lr": 1e-3}`). `model.options` are added to the recipe's own. `epochs`
            replaces a recipe's length in steps.

    Returns:
        The configuration.

    Raises:
        UserError: If there is no such recipe or field, or a value is not allowed.
    """
    if name not in RECIPES:
        raise UserError(f"there is no recipe '{name}'{did_you_mean(name, RECIPES)} `pixmim list` shows all.")
    values = asdict(replace(RECIPES[name].build(), recipe=name))
    if "epochs" in overrides:
        if overrides.get("steps") is not None:
            raise UserError("a run has a length in epochs or in steps, not both")
        values["steps"] = None
    for key, value in overrides.items():
        _override(values, key, os.fspath(value) if isinstance(value, os.PathLike) else value)
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
        values[key] = value
