"""A recipe is a function that returns a Run. One literal dict names them all."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from pixmim.config import PretrainConfig
from pixmim.recipes.imagenet import (
    convmae_base,
    lsmae_base_448,
    mae_vit_base,
    mae_vit_large,
    pixmim_vit_base,
    pixmim_vit_large,
    simmim_swin_base,
    simmim_swin_base_800,
    simmim_swin_large_800,
    simmim_vit_base,
    with_pixmim,
)
from pixmim.recipes.small import demo, pixmim_vit_small, pixmim_vit_tiny
from pixmim.utils.errors import UserError, nearest


@dataclass(frozen=True)
class Recipe:
    """What makes the Run, and what it aims at, in a line."""

    build: Callable[[], PretrainConfig]
    aim: str


RECIPES: dict[str, Recipe] = {
    "demo": Recipe(demo, "drawn shapes, two CPU cores, minutes: the probe gains ten points and more"),
    "pixmim-vit-tiny": Recipe(pixmim_vit_tiny, "a few thousand images of your own, a small GPU or a patient CPU"),
    "pixmim-vit-small": Recipe(pixmim_vit_small, "tens of thousands of images of your own, one GPU"),
    "pixmim-vit-base-300": Recipe(partial(pixmim_vit_base, 300), "ImageNet-1k: 63.3 linear, 83.1 fine-tuned"),
    "pixmim-vit-base": Recipe(partial(pixmim_vit_base, 800), "ImageNet-1k: 67.5 linear, 83.5 fine-tuned"),
    "pixmim-vit-base-1600": Recipe(partial(pixmim_vit_base, 1600), "ImageNet-1k: no number published"),
    "pixmim-vit-large-300": Recipe(partial(pixmim_vit_large, 300), "ImageNet-1k: no number published"),
    "pixmim-vit-large": Recipe(partial(pixmim_vit_large, 800), "ImageNet-1k: no number published"),
    "pixmim-vit-large-1600": Recipe(partial(pixmim_vit_large, 1600), "ImageNet-1k: no number published"),
    "mae-vit-base-300": Recipe(partial(mae_vit_base, 300), "ImageNet-1k: 60.8 linear, 82.8 fine-tuned"),
    "mae-vit-base": Recipe(partial(mae_vit_base, 800), "ImageNet-1k: 65.1 linear, 83.3 fine-tuned"),
    "mae-vit-base-1600": Recipe(partial(mae_vit_base, 1600), "ImageNet-1k: 67.1 linear, 83.5 fine-tuned"),
    "mae-vit-large-300": Recipe(partial(mae_vit_large, 300), "ImageNet-1k: no number published"),
    "mae-vit-large": Recipe(partial(mae_vit_large, 800), "ImageNet-1k: no number published"),
    "mae-vit-large-1600": Recipe(partial(mae_vit_large, 1600), "ImageNet-1k: 75.8 linear, 85.9 fine-tuned"),
    "lsmae-base-448": Recipe(lsmae_base_448, "ImageNet-1k at 448 px: no number at hand"),
    "pixmim-lsmae-base-448": Recipe(lambda: with_pixmim(lsmae_base_448()), "ImageNet-1k at 448 px: no number at hand"),
    "convmae-base": Recipe(convmae_base, "ImageNet-1k: 70.9 linear, 85.0 fine-tuned"),
    "pixmim-convmae-base": Recipe(lambda: with_pixmim(convmae_base()), "ImageNet-1k: no number at hand"),
    "simmim-swin-base": Recipe(simmim_swin_base, "ImageNet-1k: 82.8 fine-tuned at 192 px"),
    "pixmim-simmim-swin-base": Recipe(lambda: with_pixmim(simmim_swin_base()), "ImageNet-1k: no number at hand"),
    "simmim-swin-base-800": Recipe(simmim_swin_base_800, "ImageNet-1k: 84.0 fine-tuned at 224 px"),
    "pixmim-simmim-swin-base-800": Recipe(
        lambda: with_pixmim(simmim_swin_base_800()), "ImageNet-1k: no number at hand"
    ),
    "simmim-swin-large-800": Recipe(simmim_swin_large_800, "ImageNet-1k: 85.4 fine-tuned at 224 px"),
    "pixmim-simmim-swin-large-800": Recipe(
        lambda: with_pixmim(simmim_swin_large_800()), "ImageNet-1k: no number at hand"
    ),
    "simmim-vit-base": Recipe(simmim_vit_base, "ImageNet-1k: 83.8 fine-tuned"),
    "pixmim-simmim-vit-base": Recipe(lambda: with_pixmim(simmim_vit_base()), "ImageNet-1k: no number at hand"),
}


def get_recipe(name: str) -> PretrainConfig:
    """The Run of the recipe `name`. Raises UserError naming the nearest one."""
    if name not in RECIPES:
        raise UserError(f"there is no recipe '{name}'{nearest(name, RECIPES)} `pixmim list` shows all.")
    return replace(RECIPES[name].build(), recipe=name)
