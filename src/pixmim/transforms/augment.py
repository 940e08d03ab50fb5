"""Augmentation of one image after its crop, for training with labels: RandAugment, 3-Augment, color jitter.

What is done to an image is a function of a few uniform numbers, as a crop is, so that an interrupted run goes on with
the very images it would have seen. The operations on pixels are Pillow's, through timm's functions.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from statistics import NormalDist

import numpy as np
import torch
from jaxtyping import Shaped
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from timm.data import auto_augment as ops
from torch import Tensor

from pixmim.transforms.crops import Array, Crop

Fill = int | tuple[int, ...]
"""What a place shows that lies outside the image once it is moved: a value for each channel, 0 to 255."""

_TOP = 10.0  # the greatest magnitude


class Augmentation(ABC):
    """The contract of an augmentation: how many uniform numbers it takes, and what it makes of an image with them."""

    @property
    @abstractmethod
    def num_uniforms(self) -> int:
        """Uniform numbers that `apply` takes."""

    @abstractmethod
    def apply(self, image: Image.Image, u: Sequence[float], fill: Fill) -> Image.Image:
        """The image, of mode RGB or L, changed as the numbers `u` in [0, 1) decide."""


@dataclass(frozen=True)
class Augmented(Crop):
    """A crop, and then augmentations one after another.

    base   the crop; it decides the shape, and its numbers come first
    steps  what is done to the crop
    fill   for each channel, 0 to 255: what lies outside the image, usually the mean that is normalized with

    Images of three channels are taken as colors and those of one as grey. Of any other number each channel is taken by
    itself, with the same numbers; what changes the saturation leaves such images as they are. uint8 only.
    """

    base: Crop
    steps: tuple[Augmentation, ...]
    fill: tuple[int, ...]

    @property
    def num_uniforms(self) -> int:
        return self.base.num_uniforms + sum(step.num_uniforms for step in self.steps)

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    def crop_into(self, image: Shaped[Array, "h w c"], u: Sequence[float], out: Shaped[Array, "h2 w2 c"]) -> None:
        first = self.base.num_uniforms
        self.base.crop_into(image, u[:first], out)
        if out.dtype != np.uint8:
            raise ValueError(f"images are augmented as uint8, not as {out.dtype}")
        if out.shape[2] == 3:
            out[:] = np.asarray(self._changed(Image.fromarray(out), u[first:], self.fill))
            return
        for channel, fill in enumerate(self.fill):
            plane = Image.fromarray(np.ascontiguousarray(out[..., channel]))
            out[..., channel] = np.asarray(self._changed(plane, u[first:], fill))

    def offset_without_resize(self, size: tuple[int, int], u: Sequence[float]) -> tuple[int, int] | None:
        return None

    def _changed(self, image: Image.Image, u: Sequence[float], fill: Fill) -> Image.Image:
        for step in self.steps:
            image, u = step.apply(image, u[: step.num_uniforms], fill), u[step.num_uniforms :]
        return image


def fill_of(mean: Sequence[float]) -> tuple[int, ...]:
    """The fill that normalization with this mean, of values in [0, 1], makes a zero."""
    return tuple(min(255, round(255 * value)) for value in mean)


def _signed(most: float) -> Callable[[float, bool], float]:
    return lambda level, negative: (-1 if negative else 1) * level / _TOP * most


def _factor(level: float, negative: bool) -> float:
    """1 changes nothing; up to 0.9 away from it, and never below 0.1."""
    return max(0.1, 1 + _signed(0.9)(level, negative))


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """Keep so many of the highest bits. None of them is black; Pillow 13 refuses that, and timm with it."""
    mask = 256 - 2 ** (8 - bits)
    return image.point([value & mask for value in range(256)] * len(image.getbands()))


Argument = Callable[[float, bool], float | int]
"""From a magnitude in [0, 10] and a sign to the argument of an operation."""

OPERATIONS: dict[str, tuple[Callable[..., Image.Image], Argument | None]] = {
    "AutoContrast": (ops.auto_contrast, None),
    "Equalize": (ops.equalize, None),
    "Invert": (ops.invert, None),
    "Rotate": (ops.rotate, _signed(30.0)),  # degrees
    "Posterize": (_posterize, lambda level, negative: 4 - int(level / _TOP * 4)),  # bits that are kept
    "Solarize": (ops.solarize, lambda level, negative: 256 - min(256, int(level / _TOP * 256))),  # threshold
    "SolarizeAdd": (ops.solarize_add, lambda level, negative: min(128, int(level / _TOP * 110))),
    "Color": (ops.color, _factor),
    "Contrast": (ops.contrast, _factor),
    "Brightness": (ops.brightness, _factor),
    "Sharpness": (ops.sharpness, _factor),
    "ShearX": (ops.shear_x, _signed(0.3)),
    "ShearY": (ops.shear_y, _signed(0.3)),
    "TranslateX": (ops.translate_x_rel, _signed(0.45)),  # share of the width
    "TranslateY": (ops.translate_y_rel, _signed(0.45)),
}
"""RandAugment's operations in timm's "increasing" form, where a greater magnitude always changes more."""


@dataclass(frozen=True)
class RandAugment(Augmentation):
    """timm's rand-m9-mstd0.5-inc1, the augmentation of DeiT, MAE, ConvMAE and SimMIM when they fine-tune.

    Twice one of OPERATIONS is drawn, and applied with probability one half; its magnitude, in [0, 10], is normal.
    Moves are resampled bicubically.
    """

    magnitude: float = 9.0
    deviation: float = 0.5

    @property
    def num_uniforms(self) -> int:
        return 8  # for each of two layers: which operation, whether, its magnitude and its sign

    def apply(self, image: Image.Image, u: Sequence[float], fill: Fill) -> Image.Image:
        for which, whether, size, sign in (u[:4], u[4:8]):
            if whether >= 0.5:
                continue
            operation, argument = OPERATIONS[list(OPERATIONS)[int(which * len(OPERATIONS))]]
            level = min(max(NormalDist(self.magnitude, self.deviation).inv_cdf(max(size, 2.0**-54)), 0.0), _TOP)
            given = [] if argument is None else [argument(level, sign >= 0.5)]
            image = operation(image, *given, fillcolor=fill, resample=Image.Resampling.BICUBIC)
        return image


@dataclass(frozen=True)
class ThreeAugment(Augmentation):
    """DeiT III's (arXiv 2204.07118, section 3): each image turns grey, is solarised, or is blurred by 0.1 to 2 px."""

    @property
    def num_uniforms(self) -> int:
        return 2

    def apply(self, image: Image.Image, u: Sequence[float], fill: Fill) -> Image.Image:
        which = int(u[0] * 3)
        if which == 0:
            return ImageOps.grayscale(image).convert(image.mode)
        if which == 1:
            return ImageOps.solarize(image)  # inverts what is 128 or brighter
        return image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * u[1]))


@dataclass(frozen=True)
class Jitter(Augmentation):
    """torchvision's ColorJitter without hue: brightness, contrast and saturation, in any order, each by a factor.

    strength  factors lie between 1 - strength, not below 0, and 1 + strength
    """

    strength: float

    @property
    def num_uniforms(self) -> int:
        return 4

    def apply(self, image: Image.Image, u: Sequence[float], fill: Fill) -> Image.Image:
        low, high = max(0.0, 1 - self.strength), 1 + self.strength
        enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        order = list(permutations(range(3)))[int(u[3] * math.factorial(3))]
        for part in order:
            image = enhance[part](image).enhance(low + (high - low) * u[part])
        return image


def augmented(crop: Crop, kind: str, jitter: float, mean: Sequence[float] | Tensor) -> Crop:
    """A crop with what a recipe names: kind "rand", "three" or "none", and a jitter of this strength, or 0.

    The crop itself if nothing is named.
    """
    first: dict[str, tuple[Augmentation, ...]] = {"rand": (RandAugment(),), "three": (ThreeAugment(),), "none": ()}
    steps = first[kind] + ((Jitter(jitter),) if jitter else ())
    values = mean.tolist() if isinstance(mean, torch.Tensor) else mean
    return Augmented(crop, steps, fill_of(values)) if steps else crop
