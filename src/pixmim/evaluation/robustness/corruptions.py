"""The 15 corruptions of ImageNet-C (arXiv 1903.12261), made in memory, each at five severities.

Written anew from their published constants, for pictures of any size and of one or three channels. The constants are
those of pictures of 224 px. At other sizes lengths in pixels (radii, widths of Gaussians, displacements, flakes) grow
with the shorter edge, so that a picture is disturbed as much as the same picture at 224 px; strengths, shares and
qualities stay. (The authors' own set at 64 px uses milder strengths of noise, JPEG and pixelation instead.)

What differs from the authors' code, and why: frost is drawn, since their photographs of frost are not free to carry
(colors, brightness and contrast are measured in them); a defocused point has a soft edge, so that its radius need not
be an integer; elastic_transform interpolates once instead of twice; values are rounded instead of truncated; and the
result is not stored as a JPEG. On photographs the PSNR agrees within 2 % for every corruption and severity
(docs/evaluate.md).
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pixmim.evaluation.robustness import blur, noise, weather
from pixmim.evaluation.robustness import color as color
from pixmim.utils import rng
from pixmim.utils.errors import UserError, did_you_mean

Corruption = Callable[[Tensor, tuple[float, ...], np.random.Generator, float], Float[Tensor, "c h w"]]
"""A function of an image in [0, 1], a severity's constants, what draws numbers, and the size in units of 224 px."""

CORRUPTIONS: dict[str, tuple[Corruption, tuple[tuple[float, ...], ...]]] = {
    "gaussian_noise": (noise.gaussian, ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,))),
    "shot_noise": (noise.shot, ((60,), (25,), (12,), (5,), (3,))),
    "impulse_noise": (noise.impulse, ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,))),
    "defocus_blur": (blur.defocus, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "glass_blur": (blur.glass, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "motion_blur": (blur.motion, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": (blur.zoom, ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))),
    "snow": (
        weather.snow,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": (weather.frost, ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))),
    "fog": (weather.fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": (color.brightness, ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,))),
    "contrast": (color.contrast, ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,))),
    "elastic_transform": (
        blur.elastic,
        (
            (244 * 2, 244 * 0.7, 244 * 0.1),
            (244 * 2, 244 * 0.08, 244 * 0.2),
            (244 * 0.05, 244 * 0.01, 244 * 0.02),
            (244 * 0.07, 244 * 0.01, 244 * 0.02),
            (244 * 0.12, 244 * 0.01, 244 * 0.02),
        ),
    ),
    "pixelate": (color.pixelate, ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,))),
    "jpeg_compression": (color.jpeg, ((25,), (18,), (15,), (10,), (7,))),
}
"""Each corruption with its constants at severities 1 to 5, in the order of the paper's tables."""

SEVERITIES = (1, 2, 3, 4, 5)

VERSION = 2
"""Raise when the same arguments give other pixels, so that an interrupted evaluation does not mix the two."""


def corrupt(
    image: UInt8[Tensor, "c h w"], name: str, severity: int, *, seed: int = 0, index: int = 0
) -> UInt8[Tensor, "c h w"]:
    """An image, corrupted: a function of its arguments alone, the same in any thread and order.

    seed, index  decide what is random; the severities of one image share it

    Raises UserError for an unknown corruption or severity, and for other than 1 or 3 channels: what grey light or the
    color of frost would be in other channels is not defined.
    """
    if name not in CORRUPTIONS:
        raise UserError(
            f"there is no corruption '{name}'{did_you_mean(name, CORRUPTIONS)} Known: {', '.join(CORRUPTIONS)}"
        )
    if severity not in SEVERITIES:
        raise UserError(f"a severity is 1, 2, 3, 4 or 5, not {severity}")
    check_channels(image.shape[0])
    change, constants = CORRUPTIONS[name]
    key = rng.bits(seed, name, 0, [index], 2)[0]
    draw = np.random.Generator(np.random.Philox(key=key))
    scale = min(image.shape[-2:]) / 224
    changed = change(image.float() / 255, constants[severity - 1], draw, scale)
    return (changed.clamp(0, 1) * 255).round().to(torch.uint8)


def check_channels(channels: int) -> None:
    """Raises UserError for pictures that corruptions are not defined for."""
    if channels not in (1, 3):
        raise UserError(f"the corruptions are made for pictures of 3 channels (color) or 1 (grey), not of {channels}")
