"""What the network sees of a picture: the crops, the evaluation crop, and the finishing touches on the device.

A crop is a function of an image and a few uniform numbers, so that a loader can compute the same crop again from
(seed, epoch, index). Called with an image alone it draws those numbers from torch's global generator, and then takes
and gives a PIL image or a tensor, as torchvision's transforms do. No crop flips; `finish` does, on the device.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
from jaxtyping import Bool, Float, Shaped
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as V

Size = int | tuple[int, int]
Interpolation = Literal["bicubic", "bilinear"]

_MODES = {"bicubic": V.InterpolationMode.BICUBIC, "bilinear": V.InterpolationMode.BILINEAR}


class Crop(ABC):
    """The contract of a crop: how many uniform numbers it takes, and what it makes of an image with them."""

    @property
    @abstractmethod
    def draws(self) -> int:
        """Uniform numbers that `crop` takes."""

    @abstractmethod
    def crop(self, image: Shaped[Tensor, "c h w"], u: Sequence[float]) -> Shaped[Tensor, "c h2 w2"]:
        """The crop that the numbers `u` in [0, 1) decide. Images of uint8, of uint16, or of floating point."""

    @overload
    def __call__(self, image: Image.Image) -> Image.Image: ...
    @overload
    def __call__(self, image: Tensor) -> Tensor: ...
    def __call__(self, image: Image.Image | Tensor) -> Image.Image | Tensor:
        """Crop with numbers from torch's global generator, as a torchvision transform would."""
        u = torch.rand(self.draws, dtype=torch.float64).tolist()
        if isinstance(image, Image.Image):
            return V.to_pil_image(self.crop(V.pil_to_tensor(image), u))
        return self.crop(image, u)


@dataclass(frozen=True)
class SimpleResizedCrop(Crop):
    """PixMIM's crop, which keeps the object in the picture (arXiv 2303.02416, section 4.2; AlexNet's, DeiT III's).

    Resize until the image just covers `size`, aspect kept; pad by reflection; crop `size` at random.

    size           side, or (h, w), of the result in pixels
    padding        pixels of reflection on each side before the crop
    interpolation  "bicubic" (DeiT III, the authors' research code) or "bilinear" (the released configuration)

    Raises ValueError if the padding is not smaller than the size.
    """

    size: Size
    padding: int = 4
    interpolation: Interpolation = "bicubic"

    def __post_init__(self) -> None:
        if not 0 <= self.padding < min(_pair(self.size)):
            raise ValueError(f"a padding of {self.padding} pixels must be smaller than the crop of {self.size}")

    @property
    def draws(self) -> int:
        return 2

    def crop(self, image: Shaped[Tensor, "c h w"], u: Sequence[float]) -> Shaped[Tensor, "c h2 w2"]:
        image = resize_to_cover(image, _pair(self.size), self.interpolation)
        h, w = _pair(self.size)
        return _window(_window(image, h, self.padding, u[0], -2), w, self.padding, u[1], -1)


@dataclass(frozen=True)
class RandomResizedCrop(Crop):
    """MAE's crop: a random part of the area at a random aspect ratio, resized to `size`.

    Follows torchvision: ten tries for a box inside the image, then the largest central box of an allowed ratio.
    """

    size: Size
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bicubic"

    @property
    def draws(self) -> int:
        return 22  # area and ratio for each of ten tries, then two for the place

    def crop(self, image: Shaped[Tensor, "c h w"], u: Sequence[float]) -> Shaped[Tensor, "c h2 w2"]:
        top, left, h, w = self.box((image.shape[-2], image.shape[-1]), u)
        return _resize(image[..., top : top + h, left : left + w], _pair(self.size), self.interpolation)

    def box(self, size: tuple[int, int], u: Sequence[float]) -> tuple[int, int, int, int]:
        """The crop (top, left, height, width) in pixels of an image of `size` (h, w)."""
        height, width = size
        low, high = (math.log(ratio) for ratio in self.ratio)
        for k in range(10):
            area = height * width * (self.scale[0] + u[2 * k] * (self.scale[1] - self.scale[0]))
            ratio = math.exp(low + u[2 * k + 1] * (high - low))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                return int(u[20] * (height - h + 1)), int(u[21] * (width - w + 1)), h, w
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
        return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class CentreCrop(Crop):
    """Resize until the image just covers `size` x `enlarge`, aspect kept, then take the middle.

    enlarge = 1 is the paper's ablation "CC"; 256/224 is the crop of the evaluation protocols.
    """

    size: Size
    enlarge: float = 1.0
    interpolation: Interpolation = "bicubic"

    @property
    def draws(self) -> int:
        return 0

    def crop(self, image: Shaped[Tensor, "c h w"], u: Sequence[float] = ()) -> Shaped[Tensor, "c h2 w2"]:
        h, w = _pair(self.size)
        image = resize_to_cover(image, (round(h * self.enlarge), round(w * self.enlarge)), self.interpolation)
        top, left = round((image.shape[-2] - h) / 2), round((image.shape[-1] - w) / 2)
        return image[..., top : top + h, left : left + w]


def evaluation_crop(size: Size) -> CentreCrop:
    """The crop of every evaluation: resize to 256/224 of the size, bicubic, and take the middle."""
    return CentreCrop(size, enlarge=256 / 224)


def resize_to_cover(
    image: Shaped[Tensor, "c h w"], size: tuple[int, int], interpolation: Interpolation = "bicubic"
) -> Shaped[Tensor, "c h2 w2"]:
    """Resize with antialias until the image just covers `size`, aspect kept; for a square, shortest edge to `size`."""
    height, width = image.shape[-2:]
    h, w = size
    # Integers on purpose, as torchvision rounds: the longer edge is cut, not rounded.
    if height * w >= width * h:
        cover = max(h, height * w // width), w
    else:
        cover = h, max(w, width * h // height)
    return _resize(image, cover, interpolation)


def finish(
    images: Shaped[Tensor, "b c h w"], flip: Bool[Tensor, " b"] | None, mean: Tensor, std: Tensor
) -> Float[Tensor, "b c h w"]:
    """The last steps on the device, for a whole batch: flip rows where `flip`, scale to [0, 1], normalise.

    uint8 images count 255 as one, uint16 images 65535; floating-point images are taken as they are. mean and std have
    c values each.
    """
    scale = 1.0 if images.is_floating_point() else float(torch.iinfo(images.dtype).max)
    shape = (1, -1, 1, 1)
    x = (images.float() - (mean * scale).view(shape)) / (std * scale).view(shape)
    return x if flip is None else torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x)


def stacked(images: Sequence[Shaped[Tensor, "c h w"]]) -> Shaped[Tensor, "n c h w"]:
    """Images of one size as a batch."""
    return torch.stack([_movable(image) for image in images]).view(images[0].dtype)


def _movable(image: Tensor) -> Tensor:
    """A view in which every torch can flip and join: uint16 came late, and has few operators."""
    return image.view(torch.int16) if image.dtype == torch.uint16 else image


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _resize(image: Tensor, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    if image.shape[-2:] == size:
        return image
    if image.dtype == torch.uint16:  # bicubic overshoots at edges
        resized = _resize(image.float(), size, interpolation)
        return resized.round_().clamp_(0, 65535).to(torch.uint16)
    return V.resize(image, list(size), interpolation=_MODES[interpolation], antialias=True)


def _window(image: Tensor, size: int, padding: int, u: float, dim: int) -> Tensor:
    """Crop `size` along one axis out of the image padded by reflection; only what the crop shows is ever copied."""
    length = image.shape[dim]
    start = int(u * (length + 2 * padding - size + 1)) - padding
    over = max(-start, start + size - length)
    if over <= 0:
        return image.narrow(dim, start, size)
    # Pixel -k is pixel k, and the last one + k the last one - k. Joined channels last, as decoders lay pixels out, so
    # that rows are copied whole and nothing is transposed.
    pixels, axis = _movable(image).permute(1, 2, 0), dim + 2
    inside = pixels.narrow(axis, max(start, 0), size - over)
    if start < 0:
        parts = [pixels.narrow(axis, 1, over).flip(axis), inside]
    else:
        parts = [inside, pixels.narrow(axis, length - 1 - over, over).flip(axis)]
    return torch.cat(parts, dim=axis).permute(2, 0, 1).view(image.dtype)
