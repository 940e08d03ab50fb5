"""Crops of images, and the flip and normalization of batches on the device.

A crop is a function of an image and of a few uniform numbers, so that a loader can recompute it from (seed, epoch,
index). Called with an image alone, it draws these numbers from torch's global generator and returns the image's own
type, like a torchvision transform. Crops do not flip: `flip_and_normalize` does.

Crops work on NumPy arrays, the output of decoders: slicing is ten times faster than a tensor's, and holds Python's
lock for less time.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, overload

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int, Shaped
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from pixmim.transforms.images import map_bands

Size = int | tuple[int, int]
"""Side, or (h, w), in pixels."""

Interpolation = Literal["bicubic", "bilinear"]

Array = npt.NDArray[Any]
"""A decoded image (h w c) of uint8, uint16 or float32."""


class Crop(ABC):
    """Base of crops: an image and uniform numbers to a crop of fixed size."""

    size: Size

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w) of the crop in pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    @property
    @abstractmethod
    def num_uniforms(self) -> int:
        """Count of uniform numbers per crop."""

    @abstractmethod
    def crop_into(self, image: Shaped[Array, "h w c"], u: Sequence[float], out: Shaped[Array, "h2 w2 c"]) -> None:
        """Write the crop for uniform numbers `u` in [0, 1) into `out`, which has the shape of the crop."""

    def offset_without_resize(self, size: tuple[int, int], u: Sequence[float]) -> tuple[int, int] | None:
        """Return the first (row, column) of a crop that only slices an image of size (h, w), or None if it resizes.

        Rows and columns outside the image are reflected.
        """
        return None

    def crop(self, image: Shaped[Tensor, "c h w"], u: Sequence[float] = ()) -> Shaped[Tensor, "c h2 w2"]:
        """Return the crop of a tensor for uniform numbers `u` in [0, 1), computed on the CPU."""
        exact = image.float() if image.is_floating_point() and image.itemsize < 4 else image  # NumPy has no bfloat16
        array = exact.detach().cpu().permute(1, 2, 0).numpy()
        out = np.empty((*self.shape, array.shape[2]), array.dtype)
        self.crop_into(array, u, out)
        return as_image(out).to(image)

    @overload
    def __call__(self, image: Image.Image) -> Image.Image: ...
    @overload
    def __call__(self, image: Tensor) -> Tensor: ...
    @overload
    def __call__(self, image: Array) -> Array: ...
    def __call__(self, image: Image.Image | Tensor | Array) -> Image.Image | Tensor | Array:
        """Crop a PIL image, a tensor (... h w) or an array (h w c) or (h w), with torch's global generator."""
        if not isinstance(image, Image.Image | Tensor | np.ndarray):
            raise TypeError(f"a crop takes a PIL image, a tensor or an array, not {type(image).__name__}")
        u = torch.rand(self.num_uniforms, dtype=torch.float64).tolist()
        if isinstance(image, Image.Image):
            return map_bands(image, lambda tensor: self.crop(tensor, u))
        if isinstance(image, Tensor):
            return self.crop(image.reshape(-1, *image.shape[-2:]), u).reshape(*image.shape[:-2], *self.shape)
        if image.ndim not in (2, 3):
            raise ValueError(f"a crop takes an array (h w c) or (h w), not one of {image.ndim} dimensions")
        image = image.astype(image.dtype.newbyteorder("="), copy=False)
        out = np.empty((*self.shape, *image.shape[2:]), image.dtype)
        self.crop_into(image.reshape(*image.shape[:2], -1), u, out.reshape(*self.shape, -1))
        return out


@dataclass(frozen=True)
class SimpleResizedCrop(Crop):
    """Resize to cover `size`, pad by reflection, crop at random: PixMIM's SRC (arXiv 2303.02416, section 4.2).

    It keeps most of the object in the crop, unlike `RandomResizedCrop`. AlexNet and DeiT III use it too.

    Args:
        size: Side, or (h, w), of the crop in pixels.
        padding: Pixels of reflection on each side.
        interpolation: "bicubic" (DeiT III, the authors' research code) or "bilinear" (the published configuration).

    Raises:
        ValueError: If the padding is not smaller than the size.
    """

    size: Size
    padding: int = 4
    interpolation: Interpolation = "bicubic"
    num_uniforms: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if not 0 <= self.padding < min(self.shape):
            raise ValueError(f"padding must be smaller than the crop of {self.size}, not {self.padding}")

    def crop_into(self, image: Shaped[Array, "h w c"], u: Sequence[float], out: Shaped[Array, "h2 w2 c"]) -> None:
        image = resize(image, cover_size(image.shape[:2], self.shape), self.interpolation)
        _copy_window(image, *self._offset(image.shape[:2], u), out)

    def offset_without_resize(self, size: tuple[int, int], u: Sequence[float]) -> tuple[int, int] | None:
        return self._offset(size, u) if cover_size(size, self.shape) == size else None

    def _offset(self, size: tuple[int, int], u: Sequence[float]) -> tuple[int, int]:
        (height, width), (h, w), p = size, self.shape, self.padding
        return int(u[0] * (height + 2 * p - h + 1)) - p, int(u[1] * (width + 2 * p - w + 1)) - p


@dataclass(frozen=True)
class RandomResizedCrop(Crop):
    """Crop a random area at a random aspect ratio and resize it: MAE's RRC, as in torchvision.

    Ten tries for a box inside the image, then the largest central box within the range of aspect ratios.

    Args:
        size: Side, or (h, w), of the crop in pixels.
        scale: Range of the fraction of the image's area.
        ratio: Range of the aspect ratio (width / height), log-uniform.
        interpolation: "bicubic" or "bilinear".
        single: One try, clipped to the image: the crop of MAE's linear probe.
    """

    size: Size
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bicubic"
    single: bool = False

    @property
    def num_uniforms(self) -> int:
        return 4 if self.single else 22  # area and ratio for each try, then top and left

    def crop_into(self, image: Shaped[Array, "h w c"], u: Sequence[float], out: Shaped[Array, "h2 w2 c"]) -> None:
        top, left, h, w = self.box(image.shape[:2], u)
        out[...] = resize(image[top : top + h, left : left + w], self.shape, self.interpolation)

    def box(self, size: tuple[int, int], u: Sequence[float]) -> tuple[int, int, int, int]:
        """Return the crop (top, left, height, width) of an image of size (h, w), in pixels."""
        height, width = size
        low, high = (math.log(ratio) for ratio in self.ratio)
        for k in range(1 if self.single else 10):
            area = height * width * (self.scale[0] + u[2 * k] * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + u[2 * k + 1] * (high - low))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if self.single:
                w, h = min(max(w, 1), width), min(max(h, 1), height)
            if 0 < w <= width and 0 < h <= height:
                return int(u[-2] * (height - h + 1)), int(u[-1] * (width - w + 1)), h, w
        return self.fallback(size)

    def fallback(self, size: tuple[int, int]) -> tuple[int, int, int, int]:
        """Return the largest central box within the range of aspect ratios."""
        height, width = size
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
        return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class CenterCrop(Crop):
    """Resize to cover `enlarge` x size, then crop the center.

    Args:
        size: Side, or (h, w), of the crop in pixels.
        enlarge: 1 is the crop "CC" of PixMIM's ablation; 256/224 that of the evaluations.
        interpolation: "bicubic" or "bilinear".
    """

    size: Size
    enlarge: float = 1.0
    interpolation: Interpolation = "bicubic"
    num_uniforms: ClassVar[int] = 0

    def crop_into(self, image: Shaped[Array, "h w c"], u: Sequence[float], out: Shaped[Array, "h2 w2 c"]) -> None:
        image = resize(image, cover_size(image.shape[:2], self._covered), self.interpolation)
        (top, left), (h, w) = self._offset(image.shape[:2]), self.shape
        out[...] = image[top : top + h, left : left + w]

    def offset_without_resize(self, size: tuple[int, int], u: Sequence[float]) -> tuple[int, int] | None:
        return self._offset(size) if cover_size(size, self._covered) == size else None

    def _offset(self, size: tuple[int, int]) -> tuple[int, int]:
        return round((size[0] - self.shape[0]) / 2), round((size[1] - self.shape[1]) / 2)

    @property
    def _covered(self) -> tuple[int, int]:
        return round(self.shape[0] * self.enlarge), round(self.shape[1] * self.enlarge)


def evaluation_crop(size: Size) -> CenterCrop:
    """Return the crop of all evaluations: resize to 256/224 of the size, bicubic, then crop the center."""
    return CenterCrop(size, enlarge=256 / 224)


def resize_to_cover(
    image: Shaped[Tensor, "c h w"], size: tuple[int, int], interpolation: Interpolation = "bicubic"
) -> Shaped[Tensor, "c h2 w2"]:
    """Resize, keeping the aspect ratio, to the smallest image that covers (h, w)."""
    return _resize(image, cover_size((image.shape[-2], image.shape[-1]), size), interpolation)


def resize(
    image: Shaped[Array, "h w c"], size: tuple[int, int], interpolation: Interpolation
) -> Shaped[Array, "h2 w2 c"]:
    """Resize to (h, w) with antialiasing. An image of that size is returned as is."""
    if image.shape[:2] == size:
        return image
    tensor = as_image(np.ascontiguousarray(image))  # torch is slower on slices, and returns another memory layout
    result: Array = _resize(tensor, size, interpolation).permute(1, 2, 0).numpy()
    return result


def as_image(array: Shaped[Array, "h w c"]) -> Shaped[Tensor, "c h w"]:
    """Return an array as a channels-last tensor, without a copy unless it is read-only."""
    writable = array if array.flags.writeable else array.copy()
    return torch.from_numpy(writable.transpose(2, 0, 1))


def cover_size(image: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest (h, w) of an image that covers `size`; the longer side is truncated, as in torchvision."""
    (height, width), (h, w) = image, size
    if height * w >= width * h:
        return max(h, height * w // width), w
    return h, max(w, width * h // height)


def flip_and_normalize(
    images: Shaped[Tensor, "b c h w"], flip: Bool[Tensor, " b"] | None, mean: Tensor, std: Tensor
) -> Float[Tensor, "b c h w"]:
    """Flip rows of a batch horizontally, scale it to [0, 1] and normalize it by channel, on its device.

    255 in uint8 and 65535 in uint16 are scaled to one; floating-point images are not scaled.
    """
    scale = 1.0 if images.is_floating_point() else float(torch.iinfo(images.dtype).max)
    x = (images.float() - (mean * scale).view(-1, 1, 1)) / (std * scale).view(-1, 1, 1)
    return x if flip is None else torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x)


def _resize(image: Tensor, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    if image.shape[-2:] == size:
        return image
    if image.dtype == torch.bool:
        raise TypeError("a crop interpolates, and bool has no values between: convert it to uint8 or float32")
    if image.dtype != torch.uint8 and not image.is_floating_point():  # torchvision wraps what bicubic overshoots
        limits, exact = torch.iinfo(image.dtype), torch.float32 if image.itemsize < 4 else torch.float64
        resized = _resize(image.to(exact), size, interpolation)
        return resized.round_().clamp_(limits.min, limits.max).to(image.dtype)
    return V.resize(image, list(size), interpolation=V.InterpolationMode(interpolation), antialias=True)


def _copy_window(image: Array, top: int, left: int, out: Array) -> None:
    """Copy a window of the reflection-padded image into `out`: first its part inside the image, then reflections."""
    (height, width, _), (h, w, _) = image.shape, out.shape
    above, before = max(-top, 0), max(-left, 0)
    below, after = min(h, height - top), min(w, width - left)  # end of the image in the window
    if 2 * max(above, h - below) >= h - 1 or 2 * max(before, w - after) >= w - 1:  # reflections of reflections
        rows, columns = reflect_indices(top, h, height).numpy(), reflect_indices(left, w, width).numpy()
        out[...] = image[rows[:, None], columns]
        return
    out[above:below, before:after] = image[top + above : top + below, left + before : left + after]
    if before:
        out[above:below, :before] = out[above:below, 2 * before : before : -1]
    if after < w:
        out[above:below, after:] = out[above:below, after - 2 : 2 * after - w - 2 : -1]
    if above:
        out[:above] = out[2 * above : above : -1]
    if below < h:
        out[below:] = out[below - 2 : 2 * below - h - 2 : -1]


@overload
def reflect_indices(begin: int, count: int, length: int) -> Int[Tensor, " count"]: ...
@overload
def reflect_indices(begin: Int[Tensor, "b 1"], count: int, length: Int[Tensor, "b 1"]) -> Int[Tensor, "b count"]: ...
def reflect_indices(begin: int | Tensor, count: int, length: int | Tensor) -> Tensor:
    """Return the pixels at positions begin .. begin + count - 1 of an axis of `length` pixels padded by reflection."""
    device = begin.device if isinstance(begin, Tensor) else None
    positions = (begin + torch.arange(count, device=device)).abs()
    return length - 1 - (length - 1 - positions).abs()
