"""Augmentation of cropped images for supervised training: RandAugment, 3-Augment, color jitter.

Like a crop, an augmentation is a function of an image and of a few uniform numbers, so that a resumed run repeats it.
The operations are Pillow's, through timm.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations
from statistics import NormalDist
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Shaped
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from timm.data import auto_augment as ops
from torch import Tensor

from pixmim.transforms.crops import Array, Crop

Fill = int | tuple[int, ...]
"""Value of each channel, 0 to 255, outside a moved image."""

_MAX_LEVEL = 10.0


class Augmentation(ABC):
    """Base of augmentations: an image and `num_uniforms` uniform numbers to an image."""

    num_uniforms: ClassVar[int]

    @abstractmethod
    def apply(self, image: Image.Image, u: Sequence[float], fill: Fill) -> Image.Image:
        """Return the augmented image (mode RGB or L) for uniform numbers `u` in [0, 1)."""


@dataclass(frozen=True)
class Augmented(Crop):
    """Augment the output of a crop, whose uniform numbers come first. uint8 only.

    Images of three channels are color images. Otherwise each channel is augmented as a grayscale image, with the same
    numbers, so that changes of saturation have no effect.
    """

    base: Crop
    steps: tuple[Augmentation, ...]
    fill: tuple[int, ...]
    """Value of each channel, 0 to 255, outside a moved image; usually the mean of the normalization."""

    @property
    def num_uniforms(self) -> int:
        return self.base.num_uniforms + sum(step.num_uniforms for step in self.steps)

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    def crop_into(self, image: Shaped[Array, "h w c"], u: Sequence[float], out: Shaped[Array, "h2 w2 c"]) -> None:
        count = self.base.num_uniforms
        self.base.crop_into(image, u[:count], out)
        if out.dtype != np.uint8:
            raise ValueError(f"images are augmented as uint8, not as {out.dtype}")
        if out.shape[2] == 3:
            out[:] = np.asarray(self._augment(Image.fromarray(out), u[count:], self.fill))
            return
        for channel, fill in enumerate(self.fill):
            plane = Image.fromarray(np.ascontiguousarray(out[..., channel]))
            out[..., channel] = np.asarray(self._augment(plane, u[count:], fill))

    def _augment(self, image: Image.Image, u: Sequence[float], fill: Fill) -> Image.Image:
        for step in self.steps:
            image, u = step.apply(image, u[: step.num_uniforms], fill), u[step.num_uniforms :]
        return image


def _signed(limit: float) -> Callable[[float, bool], float]:
    return lambda level, negative: (-1 if negative else 1) * level / _MAX_LEVEL * limit


def _factor(level: float, negative: bool) -> float:
    """Return 1 +- 0.9 * level / 10, at least 0.1; 1 changes nothing."""
    return max(0.1, 1 + _signed(0.9)(level, negative))


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """Keep the highest bits. 0 bits give black, which Pillow 13, and timm with it, refuses."""
    mask = 256 - 2 ** (8 - bits)
    return image.point([value & mask for value in range(256)] * len(image.getbands()))


Argument = Callable[[float, bool], float | int]
"""Function from a magnitude in [0, 10] and a sign to the argument of an operation."""

OPERATIONS: dict[str, tuple[Callable[..., Image.Image], Argument | None]] = {
    "AutoContrast": (ops.auto_contrast, None),
    "Equalize": (ops.equalize, None),
    "Invert": (ops.invert, None),
    "Rotate": (ops.rotate, _signed(30.0)),  # degrees
    "Posterize": (_posterize, lambda level, negative: 4 - int(level / _MAX_LEVEL * 4)),  # bits to keep
    "Solarize": (ops.solarize, lambda level, negative: 256 - min(256, int(level / _MAX_LEVEL * 256))),  # threshold
    "SolarizeAdd": (ops.solarize_add, lambda level, negative: min(128, int(level / _MAX_LEVEL * 110))),
    "Color": (ops.color, _factor),
    "Contrast": (ops.contrast, _factor),
    "Brightness": (ops.brightness, _factor),
    "Sharpness": (ops.sharpness, _factor),
    "ShearX": (ops.shear_x, _signed(0.3)),
    "ShearY": (ops.shear_y, _signed(0.3)),
    "TranslateX": (ops.translate_x_rel, _signed(0.45)),  # fraction of the width
    "TranslateY": (ops.translate_y_rel, _signed(0.45)),
}
"""RandAugment's operations in timm's "increasing" form: a larger magnitude always changes more."""


@dataclass(frozen=True)
class RandAugment(Augmentation):
    """timm's rand-m9-mstd0.5-inc1, with which DeiT, MAE, ConvMAE and SimMIM fine-tune (arXiv 1909.13719).

    Two random operations, each applied with probability 1/2, with bicubic resampling.

    Args:
        magnitude: Mean of the magnitude, in [0, 10].
        deviation: Its standard deviation; magnitudes are normal, clipped to [0, 10].
    """

    magnitude: float = 9.0
    deviation: float = 0.5
    num_uniforms: ClassVar[int] = 8  # for each of two layers: operation, probability, magnitude, sign

    def apply(self, image: Image.Image, u: Sequence[float], fill: Fill) -> Image.Image:
        for choice, probability, size, sign in (u[:4], u[4:8]):
            if probability >= 0.5:
                continue
            operation, argument = OPERATIONS[list(OPERATIONS)[int(choice * len(OPERATIONS))]]
            level = min(max(NormalDist(self.magnitude, self.deviation).inv_cdf(max(size, 2.0**-54)), 0.0), _MAX_LEVEL)
            args = [] if argument is None else [argument(level, sign >= 0.5)]
            image = operation(image, *args, fillcolor=fill, resample=Image.Resampling.BICUBIC)
        return image


@dataclass(frozen=True)
class ThreeAugment(Augmentation):
    """3-Augment of DeiT III (arXiv 2204.07118, section 3): grayscale, solarization, or a blur of 0.1 to 2 px."""

    num_uniforms: ClassVar[int] = 2

    def apply(self, image: Image.Image, u: Sequence[float], fill: Fill) -> Image.Image:
        choice = int(u[0] * 3)
        if choice == 0:
            return ImageOps.grayscale(image).convert(image.mode)
        if choice == 1:
            return ImageOps.solarize(image)  # inverts values of 128 and more
        return image.filter(ImageFilter.GaussianBlur(0.1 + 1.9 * u[1]))


@dataclass(frozen=True)
class Jitter(Augmentation):
    """Change brightness, contrast and saturation in random order: torchvision's ColorJitter without hue.

    Args:
        strength: Factors are uniform in [max(0, 1 - strength), 1 + strength].
    """

    strength: float
    num_uniforms: ClassVar[int] = 4

    def apply(self, image: Image.Image, u: Sequence[float], fill: Fill) -> Image.Image:
        low, high = max(0.0, 1 - self.strength), 1 + self.strength
        enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        order = list(permutations(range(3)))[int(u[3] * math.factorial(3))]
        for part in order:
            image = enhance[part](image).enhance(low + (high - low) * u[part])
        return image


def augmented(crop: Crop, kind: str, jitter: float, mean: Sequence[float] | Tensor) -> Crop:
    """Add a fine-tuning recipe's augmentation to a crop, if it has any.

    Args:
        crop: The crop.
        kind: "rand" (`RandAugment`), "three" (`ThreeAugment`) or "none".
        jitter: Strength of `Jitter`; 0: none.
        mean: Mean per channel of the normalization, in units of [0, 1].
    """
    first: dict[str, tuple[Augmentation, ...]] = {"rand": (RandAugment(),), "three": (ThreeAugment(),), "none": ()}
    steps = first[kind] + ((Jitter(jitter),) if jitter else ())
    values = mean.tolist() if isinstance(mean, torch.Tensor) else mean
    fill = tuple(min(255, round(255 * value)) for value in values)  # which normalization turns into zero
    return Augmented(crop, steps, fill) if steps else crop
