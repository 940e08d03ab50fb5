"""Rules from a survey to settings. docs/my-images.md lists them with their sources."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from pixmim.config import PretrainConfig
from pixmim.data.dataset import RGB
from pixmim.data.survey import Survey
from pixmim.recipes import get_recipe
from pixmim.targets import resolve_radius

Basis = Literal["measured", "published", "guess"]

RECIPES = {
    "cpu": ((1_000, "pixmim-vit-tiny-64"), (float("inf"), "pixmim-vit-tiny-96")),
    "gpu": (
        (1_000, "pixmim-vit-tiny-96"),
        (10_000, "pixmim-vit-tiny"),
        (500_000, "pixmim-vit-small"),
        (float("inf"), "pixmim-vit-base-300"),
    ),
}
"""Recipes by the number of images: each is for fewer images than its number."""

QUESTIONS = [
    "Is a mirrored image as valid as the original? If not (text, organs, dials), add --crop.flip 0.",
    "Is fine structure what you look for (vessels, cracks, grain)? Then also train with --target.kind pixels, and "
    "compare.",
]

_MAX_EPOCHS, _FEWEST_STEPS = 1_600, 2_000
_FEW_IMAGES = 10_000  # below which published weights may be the better start
_ELONGATED, _SAME_ORIENTATION = 1.6, 0.8  # longer / shorter side, and share of the images, from which on a shape fits
_LARGE = 8  # times the training size, above which details disappear
_PHOTO_SHARE = 0.9  # of the variance, which the low-pass keeps of photographs at 96 pixels
_ROUGH, _SMOOTH = 0.75, 0.97  # shares from which on images differ much from photographs
_NIGHT = 12  # hours


@dataclass(frozen=True)
class Suggestion:
    """A conclusion about one setting.

    Attributes:
        topic: What is decided, as in the table of docs/my-images.md.
        flags: The recipe, or flags of `pixmim pretrain`; empty if the command does not change.
        reason: Why, in a sentence.
        basis: "measured" on these images, "published", or "guess".
    """

    topic: str
    flags: list[str]
    reason: str
    basis: Basis

    def __str__(self) -> str:
        return f"{self.topic:<11}{' '.join(self.flags)}{': ' if self.flags else ''}{self.reason} [{self.basis}]"


def choose_recipe(images: int, device: torch.device) -> str:
    """Return the name of the recipe for this many images."""
    return next(name for limit, name in RECIPES["cpu" if device.type == "cpu" else "gpu"] if images < limit)


def apply_rules(found: Survey, data: str, device: torch.device) -> list[Suggestion]:
    """Return what follows from a survey, the recipe first; `data` is the --data to train on."""
    name, where = choose_recipe(found.usable, device), "a CPU" if device.type == "cpu" else "a GPU"
    recipe = get_recipe(name)
    size = _size(found, recipe)
    side = min(recipe.image_size if size is None else replace(recipe, size=size.flags[1]).image_size)
    suggestions = [
        Suggestion("recipe", [name], f"for {found.usable:,} images on {where}", "guess"),
        _length(found, recipe),
        size,
        _detail(found, recipe),
        _channels(found),
        _target(found, side),
        _unreadable(found),
        _duplicates(found),
        _start(found, data, device),
    ]
    return [suggestion for suggestion in suggestions if suggestion is not None]


def leave_out_masks(found: Survey) -> Suggestion:
    """Return how to leave out the masks of a dataset whose images cannot be listed."""
    reason = (
        f"{found.masks:,} files are masks, such as {found.short(found.mask_example)}, and no list can leave them out "
        "here: leave them out by a pattern of their names, such as --exclude '*_mask.png'"
    )
    return Suggestion("masks", [], reason, "measured")


def configure(data: str, suggestions: list[Suggestion]) -> PretrainConfig:
    """Return the configuration that the flags of the suggestions give."""
    recipe, *flags = [flag for suggestion in suggestions for flag in suggestion.flags]
    values: dict[str, Any] = {"data": data}
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        values[flag.removeprefix("--").replace("-", "_")] = _TYPES.get(flag, int)(value)
    return get_recipe(recipe, **values)


_TYPES: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("--size", "--dtype", "--tiff-pages", "--stretch"), str),
    "--max-no-data": float,
}
"""Types of the values of flags that are no integers."""


def judge_speed(
    config: PretrainConfig, found: Survey, rate: float, *, can_cache: bool = True
) -> tuple[list[Suggestion], bool]:
    """Return suggestions on time and on a cache, and whether to create one.

    Args:
        config: Configuration of the run.
        found: The survey.
        rate: Images per second of the training.
        can_cache: False if the dataset is a cache already.
    """
    hours = config.epochs * found.images / rate / 3600
    minutes = max(1, round(60 * hours))
    time = f"{hours:.1f} hours" if minutes >= 60 else f"{minutes} {'minute' if minutes == 1 else 'minutes'}"
    reason = f"about {time} on this machine, at {_per_second(rate)}"
    if hours > _NIGHT:
        reason += f"; --epochs {max(1, int(_NIGHT / hours * config.epochs))} takes {_NIGHT} hours"
    suggestions = [Suggestion("time", [], reason, "measured")]
    cached = can_cache and found.images_per_s < 1.5 * rate
    if cached:
        reason = f"reading ({_per_second(found.images_per_s)}) would slow training down, so resize the images once"
        suggestions.append(Suggestion("cache", [], reason, "measured"))
    return suggestions, cached


def _per_second(rate: float) -> str:
    return f"{rate:,.{int(rate < 10)}f} images/s"


def _length(found: Survey, recipe: PretrainConfig) -> Suggestion:
    """Train for the steps that the recipe was made for, in batches of at most a quarter of the images."""
    batch = recipe.batch_size
    while batch > 16 and batch > found.usable / 4:
        batch //= 2
    epochs = max(1, min(_MAX_EPOCHS, round(recipe.recipe_info.steps * batch / found.usable)))
    steps = max(1, epochs * found.usable // batch)
    flags = ["--epochs", str(epochs)] + (["--batch-size", str(batch)] if batch != recipe.batch_size else [])
    few = f", too few to learn much from random weights even in {epochs:,} epochs" if steps < _FEWEST_STEPS else ""
    return Suggestion("length", flags, f"{steps:,} steps of {batch} images{few}", "guess")


def _size(found: Survey, recipe: PretrainConfig) -> Suggestion | None:
    patch, side = _patch(recipe), _side(found, recipe)
    if found.elongation >= _ELONGATED and found.same_orientation >= _SAME_ORIENTATION:
        side = int(min(*recipe.image_size, (found.heights[1] * found.widths[1]) ** 0.5))
        factors = found.aspect**0.5, found.aspect**-0.5
        height, width = (max(2 * patch, round(side * factor / patch) * patch) for factor in factors)
        reason = (
            f"half of the images are at least {found.elongation:.1f} times as long as wide, of which a square shows "
            f"{1 / found.elongation:.0%}; this shape has the area of {side}x{side}"
        )
        return Suggestion("size", ["--size", f"{height}x{width}"], reason, "measured")
    if side < min(recipe.image_size):
        reason = (
            f"the shorter side of the median image has {found.short_side} pixels: to enlarge it adds no information"
        )
        return Suggestion("size", ["--size", str(side)], reason, "measured")
    return None


def _detail(found: Survey, recipe: PretrainConfig) -> Suggestion | None:
    times = found.short_side / _side(found, recipe)
    if times < _LARGE:
        return None
    reason = (
        f"images of {found.short_side:,} pixels are reduced {times:.0f} times, and smaller details disappear; if these "
        "matter, cut the images into tiles, or use a larger --size"
    )
    return Suggestion("detail", [], reason, "measured")


def _channels(found: Survey) -> Suggestion | None:
    spec = found.image_spec
    if spec == RGB:
        return None
    if spec.channels == 1 and spec.dtype == "uint8":
        reason = "gray images become three equal channels, as published weights expect; --channels 1 uses one"
        return Suggestion("channels", [], reason, "measured")
    return Suggestion("channels", spec.flags.split(), "keeps all information of most files", "measured")


def _target(found: Survey, side: int) -> Suggestion | None:
    """Judge the low-pass; `side` is the shorter side in pixels at which is trained."""
    if found.spectrum is None:
        return None
    size = found.spectrum.size
    radius = resolve_radius("auto", (size, size))
    assert not isinstance(radius, tuple)
    share = found.spectrum.share_kept(radius)
    reason = f"PixMIM's low-pass keeps {share:.0%} of the variance (87 to 93% of photographs)"
    if share > _SMOOTH:
        reason += ", so its target is close to MAE's"
    elif share < _ROUGH:
        equal = max(1, round(found.spectrum.radius_for(_PHOTO_SHARE) * side / size))
        reason += (
            f"; --target.radius {equal} would keep {_PHOTO_SHARE:.0%}, and --target.kind pixels all. If texture "
            "matters, train with one of these too, and compare"
        )
    return Suggestion("target", [], reason, "measured")


def _unreadable(found: Survey) -> Suggestion | None:
    count, allowed = sum(count for count, _ in found.unreadable.values()), PretrainConfig.max_bad_fraction
    if count <= allowed * (count + found.examined):
        return None
    reason = (
        f"training ends if more than {allowed:.0%} of the images cannot be read, here {count:,} of "
        f"{count + found.examined:,}: mend or remove them, or train on a cache, which leaves them out"
    )
    return Suggestion("unreadable", [], reason, "measured")


def _duplicates(found: Survey) -> Suggestion | None:
    if not found.duplicates:
        return None
    reason = (
        "harmless for pre-training; an evaluation must have each group in its training data or in its test data: "
        "advise --list FILE.csv writes the groups, which --labelled keeps together"
    )
    return Suggestion("duplicates", [], reason, "guess")


def _start(found: Survey, data: str, device: torch.device) -> Suggestion:
    if found.usable >= _FEW_IMAGES or found.image_spec.dtype == "float32":
        return Suggestion("start", [], "random weights", "guess")
    flags = ["--init", "timm:vit_small_patch16_224"]
    if device.type == "cpu":
        flags = ["--init", "timm:vit_tiny_patch16_224", "--size", "96"]
    channels = _channels(found)
    flags += channels.flags if channels is not None else []
    command = shlex.join(["pixmim", "pretrain", "adapt", *flags, "--data", data])
    reason = (
        f"{found.usable:,} images are few for random weights. Also try published weights, and compare on your labels: "
        f"`{command}`"
    )
    return Suggestion("start", [], reason, "published")


def _patch(recipe: PretrainConfig) -> int:
    return int(str(recipe.model.options.get("patch_size", 16)))


def _side(found: Survey, recipe: PretrainConfig) -> int:
    """Return the recipe's side, or a smaller multiple of its patches if the images are smaller."""
    patch = _patch(recipe)
    return min(*recipe.image_size, max(4 * patch, found.short_side // patch * patch))
