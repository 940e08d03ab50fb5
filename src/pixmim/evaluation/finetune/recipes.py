"""Published fine-tuning recipes, and the choice of one for an encoder."""

from dataclasses import asdict, replace
from typing import Any, Never, cast

from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from pixmim.config import ModelConfig, PretrainConfig
from pixmim.evaluation.settings import FinetuneOverrides, FinetuneRecipe
from pixmim.models.cnn import is_cnn
from pixmim.models.convmae import ConvMAEEncoder
from pixmim.utils.errors import UserError, did_you_mean

Recipe = FinetuneRecipe[Never]

_MAE = Recipe(
    epochs=100,
    warmup=5,
    warmup_prefix=True,
    batch_size=1024,
    optimizer="adamw",
    base_lr=5e-4,
    warmup_start_lr=0.0,
    min_lr=1e-6,
    layer_decay=0.65,
    weight_decay=0.05,
    clip=0.0,
    drop_path=0.1,
    crop="random-resized",
    scale=(0.08, 1.0),
    augment="rand",
    jitter=0.0,
    erase=0.25,
    mixup=0.8,
    cutmix=1.0,
    smoothing=0.1,
    loss="ce",
    pool="mean",
    head_std=2e-5,
    average=0.0,
)

_SIMMIM = replace(
    _MAE,
    warmup=20,
    warmup_prefix=False,
    batch_size=2048,
    base_lr=6.25e-4,  # 1.25e-3 per 512 images
    warmup_start_lr=1e-6,  # this and the next 2.5e-7 per 512 images
    min_lr=1e-6,
    clip=5.0,
)

_CONVNEXT = replace(
    _MAE,
    epochs=300,
    warmup_prefix=False,
    batch_size=4096,
    base_lr=2.5e-4,  # 4e-3 at this batch
    layer_decay=1.0,
    drop_path=0.4,
    head_std=0.02,
    average=0.9999,
)

FINETUNE_RECIPES: dict[str, Recipe] = {
    # MAE (arXiv 2111.06377, table 9) with ViT-B/16: 83.6 % after 1600 epochs. PixMIM's release uses the same (arXiv
    # 2303.02416): 83.1 % after 300 epochs, 83.5 % after 800.
    "mae-vit-base": _MAE,
    # ViT-L/16: 85.9 % after 1600 epochs. ViT-H/14: 86.9 %.
    "mae-vit-large": replace(_MAE, epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.2),
    "mae-vit-huge": replace(_MAE, epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.3),
    # ConvMAE-Base (arXiv 2205.03892): 85.0 % after 1600 epochs, 84.4 % after 200.
    "convmae-base": _MAE,
    # SimMIM (arXiv 2111.09886) with Swin-B, pre-trained for 100 epochs: 82.8 % at 192 px, 83.5 % at 224 px.
    "simmim-swin-base-100": replace(_SIMMIM, layer_decay=0.9, head_std=0.02),
    # Pre-trained for 800 epochs: 84.0 % at 224 px. Swin-L: 85.4 %. The BEiT-like ViT-B: 83.8 %.
    "simmim-swin-base-800": replace(_SIMMIM, layer_decay=0.8, head_std=0.02),
    "simmim-swin-large": replace(_SIMMIM, layer_decay=0.7, drop_path=0.2, head_std=0.02),
    "simmim-vit-base": _SIMMIM,
    # A2MIM (arXiv 2205.13943): the settings A2 of "ResNet strikes back" (arXiv 2110.00476), from random weights in that
    # paper. ResNet-50: 80.4 % after 300 epochs of pre-training. Without A2's repeated augmentation.
    "a2mim-resnet": replace(
        _MAE,
        epochs=300,
        warmup_prefix=False,
        batch_size=2048,
        optimizer="lamb",
        base_lr=6.25e-4,  # 5e-3 at this batch
        layer_decay=1.0,
        weight_decay=0.02,
        clip=1.0,  # which is LAMB's own in its code
        drop_path=0.05,
        erase=0.0,
        mixup=0.1,
        smoothing=0.0,
        loss="bce",
        head_std=0.01,
        average=0.9999,
    ),
    # The same with ConvNeXt: the settings of its own paper (arXiv 2201.03545) from random weights. T: with layer decay.
    # S: 83.7 % after 300 epochs of pre-training, B: 84.1 %.
    "a2mim-convnext-tiny": replace(
        _CONVNEXT, epochs=400, base_lr=2.5e-5, layer_decay=0.7, weight_decay=0.01, drop_path=0.1
    ),
    "a2mim-convnext-small": _CONVNEXT,
    "a2mim-convnext-base": replace(_CONVNEXT, drop_path=0.5),
    # DeiT III (arXiv 2204.07118), from random weights: ViT-B/16 at 192 px, and 20 epochs more at 224 px: 83.8 %.
    # Without its repeated augmentation (each image three times in a batch).
    "deit3-vit-base": replace(
        _MAE,
        epochs=800,
        warmup_prefix=False,
        batch_size=2048,
        optimizer="lamb",
        base_lr=3.75e-4,  # 3e-3 at this batch
        warmup_start_lr=1e-6,
        min_lr=1e-5,
        layer_decay=1.0,
        clip=1.0,
        drop_path=0.2,
        augment="three",
        jitter=0.3,
        erase=0.0,
        smoothing=0.0,
        loss="bce",
        pool="cls",
        head_std=0.02,
    ),
}
"""Recipes by name, for ImageNet-1k; nothing is scaled to smaller data."""


def choose(name: str, config: ModelConfig, encoder: nn.Module, from_scratch: bool) -> str:
    """Return the name of a recipe; "auto" selects it by the encoder's kind and size and the epochs of its training.

    CNNs have the same recipe from random weights. Raises UserError if there is no such recipe, or "auto" needs the
    epochs and they are unknown.
    """
    if name != "auto":
        if name not in FINETUNE_RECIPES:
            raise UserError(
                f"there is no fine-tuning recipe '{name}'{did_you_mean(name, FINETUNE_RECIPES)} "
                f"Known: auto, {', '.join(FINETUNE_RECIPES)}"
            )
        return name
    if isinstance(encoder, ConvNeXt):
        width, depth = int(encoder.num_features), sum(len(stage.blocks) for stage in cast(Any, encoder.stages))
        return (
            "a2mim-convnext-base"
            if width >= 1024
            else f"a2mim-convnext-{'small' if depth > 18 or from_scratch else 'tiny'}"
        )
    if is_cnn(encoder):
        return "a2mim-resnet"
    if from_scratch:
        return "deit3-vit-base"
    if isinstance(encoder, ConvMAEEncoder):
        return "convmae-base"
    if isinstance(encoder, SwinTransformer):
        if encoder.embed_dim >= 192:
            return "simmim-swin-large"
        if not isinstance(config, PretrainConfig):
            raise UserError(
                "a Swin's recipe depends on the epochs of its pre-training, which these weights do not contain: pass "
                "--recipe simmim-swin-base-100 (up to 300 epochs) or --recipe simmim-swin-base-800"
            )
        return "simmim-swin-base-100" if config.epochs <= 300 else "simmim-swin-base-800"
    if isinstance(encoder, Beit) or config.model.name == "simmim":
        return "simmim-vit-base"
    width = int(encoder.num_features)  # type: ignore[arg-type]
    return "mae-vit-huge" if width >= 1280 else "mae-vit-large" if width >= 1024 else "mae-vit-base"


def apply_overrides(recipe: Recipe, overrides: FinetuneOverrides) -> Recipe:
    """Return the recipe with the user's overrides. Raises UserError for values that contradict each other."""
    changes: dict[str, Any] = {name: value for name, value in vars(overrides).items() if value is not None}
    recipe = replace(recipe, **changes)
    if recipe.scale[0] > recipe.scale[1]:
        raise UserError("--scale is two shares of the area, the smaller one first, not {:g} {:g}".format(*recipe.scale))
    if recipe.loss == "bce" and recipe.smoothing:
        raise UserError("--loss bce takes every class of a smoothed label as present: add --smoothing 0")
    return recipe


def describe(name: str, recipe: Recipe, images: int, steps: int, warmup: int, accumulation_steps: int) -> list[str]:
    """Return a summary of a fine-tuning in lines."""
    batch, peak = recipe.batch_size, recipe.base_lr * recipe.batch_size / 256
    parts = f" in {accumulation_steps} parts of {batch // accumulation_steps:,}" if accumulation_steps > 1 else ""
    lines = [
        f"fine-tuning by {name}: {images:,} images, {steps:,} steps of {batch:,}{parts}, {warmup:,} of warm-up, "
        f"peak rate {peak:.3g} ({recipe.base_lr:g} x {batch:,}/256)",
        "  " + ", ".join(f"{key} {value}" for key, value in asdict(recipe).items() if key != "batch_size"),
    ]
    if warmup < round(recipe.warmup * images / batch):
        lines.append(f"  the warm-up of {recipe.warmup:g} epochs is reduced to a fifth of the steps")
    if steps < 500:
        lines.append(f"  {steps:,} steps are few: use a smaller --batch-size or more --epochs")
    return lines
