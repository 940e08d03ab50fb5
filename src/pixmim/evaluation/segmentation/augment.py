"""How pictures and their masks vary in training: jittered scale, crop, and colors; all functions of given numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pixmim.evaluation.segmentation.dataset import IGNORE
from pixmim.transforms.crops import Array, Crop, cover_size, resize

_TRIES = 10


@dataclass(frozen=True)
class JitteredCrop(Crop):
    """A crop of a pair, a picture whose last channel is its mask, as MMSegmentation takes it for ADE20K.

    Resize until the picture just covers `size` times a number out of `scale`, aspect kept, and cut out `size` at
    random; up to ten times, until of its labeled pixels no class has `most` or more. What a small picture does not
    fill is mirrored, and ignored by its mask.

    size   (h, w) of the result in pixels
    scale  range of the number
    most   share of one class
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.5, 2.0)
    most: float = 0.75

    @property
    def num_uniforms(self) -> int:
        return 1 + 2 * _TRIES

    @property
    def shape(self) -> tuple[int, int]:
        return self.size

    def crop_into(self, image: Shaped[Array, "h w c"], u: Sequence[float], out: Shaped[Array, "h2 w2 c"]) -> None:
        factor = self.scale[0] + u[0] * (self.scale[1] - self.scale[0])
        wanted = max(1, round(self.size[0] * factor)), max(1, round(self.size[1] * factor))
        pixels = resize(image[..., :-1], cover_size(image.shape[:2], wanted), "bilinear")
        mask = nearest(image[..., -1], pixels.shape[:2])
        (height, width), (h, w) = mask.shape, self.size
        for k in range(_TRIES):
            top, left = int(u[1 + 2 * k] * (max(0, height - h) + 1)), int(u[2 + 2 * k] * (max(0, width - w) + 1))
            part = mask[top : top + h, left : left + w]
            if self._mixed(part):
                break
        rows, columns = (mirrored(begin, count, n) for begin, count, n in ((top, h, height), (left, w, width)))
        out[..., :-1] = pixels[rows[:, None], columns]
        out[..., -1] = IGNORE
        out[: part.shape[0], : part.shape[1], -1] = part

    def offset_without_resize(self, size: tuple[int, int], u: Sequence[float]) -> tuple[int, int] | None:
        return None

    def _mixed(self, mask: npt.NDArray[np.generic]) -> bool:
        counts = np.bincount(mask.ravel().astype(np.uint8), minlength=IGNORE + 1)[:IGNORE]
        return bool(np.count_nonzero(counts) > 1 and counts.max() < self.most * counts.sum())


def nearest(mask: npt.NDArray[np.generic], size: tuple[int, int]) -> npt.NDArray[np.generic]:
    """A mask (h w) of another size: each pixel has the value of the one in whose place its center lies."""
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(np.int64) for old, new in zip(mask.shape, size, strict=True)
    )
    return mask[rows[:, None], columns]


def mirrored(begin: int, count: int, length: int) -> npt.NDArray[np.int64]:
    """The pixels that `count` places from `begin` on show, along an axis of `length` pixels that is mirrored for ever.

    The border pixel stands on both sides of the mirror, so that an axis of one pixel has mirror images as well.
    """
    places = np.arange(begin, begin + count) % (2 * length)
    return np.minimum(places, 2 * length - 1 - places)


DISTORTIONS = 9
"""Uniform numbers that `distort` takes for each image."""


def distort(images: Float[Tensor, "b c h w"], u: Float[Tensor, "b n"]) -> Float[Tensor, "b c h w"]:
    """MMSegmentation's photometric distortion of images with values in [0, 1], by 9 uniform numbers for each.

    Each of four is done with probability a half: brightness plus up to 32/255 either way; contrast times 0.5 to 1.5,
    before or after the others; and of color images saturation times 0.5 to 1.5, and hue plus up to a tenth of the
    circle either way.
    """
    b_on, b, c_on, c, late, s_on, s, h_on, h = (v.view(-1, 1, 1, 1) for v in u.unbind(1))
    one = torch.ones_like(b)
    contrast, early = torch.where(c_on < 0.5, 0.5 + c, one), late < 0.5
    x = (images + torch.where(b_on < 0.5, (2 * b - 1) * 32 / 255, 0 * one)).clamp(0, 1)
    x = (x * torch.where(early, contrast, one)).clamp(0, 1)
    if images.shape[1] == 3:
        turn = torch.where(h_on < 0.5, (2 * h - 1) / 10, 0 * one)
        x = _recolored(x, torch.where(s_on < 0.5, 0.5 + s, one), turn)
    return (x * torch.where(early, one, contrast)).clamp(0, 1)


def _recolored(x: Float[Tensor, "b 3 h w"], factor: Tensor, turn: Tensor) -> Float[Tensor, "b 3 h w"]:
    """With saturation times `factor`, and hue turned by a share of the circle, each (b 1 1 1)."""
    value, first = x.max(dim=1, keepdim=True)
    range_ = value - x.amin(dim=1, keepdim=True)
    saturation = range_ / value.clamp(min=1e-8)
    # The hue in sixths of the circle: from the color that is strongest, towards the stronger one of the others.
    red, green, blue = x.split(1, dim=1)
    differences = torch.cat([green - blue, blue - red, red - green], dim=1)
    hue = 2 * first + differences.gather(1, first) / range_.clamp(min=1e-8) + 6 * turn
    chroma = value * (saturation * factor).clamp(max=1)
    # Each channel is at full value near its own hue (0, 2, 4), and falls to value - chroma on the other side.
    own = torch.tensor([0.0, 2.0, 4.0], device=x.device).view(1, 3, 1, 1)
    away = ((hue - own + 3) % 6 - 3).abs()
    return value - chroma * (away - 1).clamp(0, 1)
