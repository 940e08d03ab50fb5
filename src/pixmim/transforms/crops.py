"""What the network sees of a picture: the crops, the evaluation crop, and the finishing touches on the device.

A crop is a function of an image and a few uniform numbers, so that a loader can compute the same crop again from
(seed, epoch, index). Called with an image alone it draws those numbers from torch's global generator, and then takes
and gives a PIL image or a tensor, as torchvision's transforms do. No crop flips:
`flip_and_normalize` does, on the device.

Crops work on NumPy's arrays, as decoders lay images out: a slice of one costs a tenth of a tensor's, and no thread that
decodes beside has to wait for it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Int, Shaped
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as V

Size = int | tuple[int, int]
Interpolation = Literal["bicubic", "bilinear"]

Array = npt.NDArray[Any]
"""An image as it is decoded: (h w c), in a data set of uint8, uint16 or float32."""

_MODES = {"bicubic": V.InterpolationMode.BICUBIC, "bilinear": V.InterpolationMode.BILINEAR}


class Crop(ABC):
    """The contract of a crop: how many uniform numbers it takes, and what it makes of an image with them."""

    @property
    @abstractmethod
    def num_uniforms(self) -> int:
        """Uniform numbers that `crop` takes."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(h, w) of the result in pixels."""

    @abstractmethod
    def crop_into(self, image: Shaped[Array, "h w c"], u: Sequence[float], out: Shaped[Array, "h2 w2 c"]) -> None:
        """Write into `out`, of the image's dtype, the crop that the numbers `u` in [0, 1) decide."""

    @abstractmethod
    def offset_without_resize(self, size: tuple[int, int], u: Sequence[float]) -> tuple[int, int] | None:
        """Where the crop of an image of `size` (h, w) begins, row and column, if it is only cut out of the image.

        None if it is resized. Rows and columns beyond the image, -1 for one, are mirrored ones.
        """

    def crop(self, image: Shaped[Tensor, "c h w"], u: Sequence[float] = ()) -> Shaped[Tensor, "c h2 w2"]:
        """The crop that the numbers `u` in [0, 1) decide, computed on the CPU."""
        array = image.cpu().permute(1, 2, 0).numpy()
        out = np.empty((*self.shape, array.shape[2]), array.dtype)
        self.crop_into(array, u, out)
        return as_image(out).to(image.device)

    @overload
    def __call__(self, image: Image.Image) -> Image.Image: ...
    @overload
    def __call__(self, image: Tensor) -> Tensor: ...
    @overload
    def __call__(self, image: Array) -> Array: ...
    def __call__(self, image: Image.Image | Tensor | Array) -> Image.Image | Tensor | Array:
        """Crop with numbers from torch's global generator, as a torchvision transform would.

        A tensor is (c h w), an array (h w c) or (h w).
        """
        if not isinstance(image, Image.Image | Tensor | np.ndarray):
            raise TypeError(
                f"a crop takes a PIL image, a tensor (c h w) or an array (h w c), not {type(image).__name__}"
            )
        u = torch.rand(self.num_uniforms, dtype=torch.float64).tolist()
        if isinstance(image, Image.Image):
            return V.to_pil_image(self.crop(V.pil_to_tensor(image), u))
        if isinstance(image, Tensor):
            return self.crop(image, u)
        if image.ndim not in (2, 3):
            raise ValueError(f"a crop takes an array (h w c) or (h w), not one of {image.ndim} dimensions")
        out = np.empty((*self.shape, *image.shape[2:]), image.dtype)
        self.crop_into(image.reshape(*image.shape[:2], -1), u, out.reshape(*self.shape, -1))
        return out


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
    def num_uniforms(self) -> int:
        return 2

    @property
    def shape(self) -> tuple[int, int]:
        return _pair(self.size)

    def crop_into(self, image: Shaped[Array, "h w c"], u: Sequence[float], out: Shaped[Array, "h2 w2 c"]) -> None:
        image = resize(image, cover_size(image.shape[:2], self.shape), self.interpolation)
        _put_window(image, *self._corner(image.shape[:2], u), out)

    def offset_without_resize(self, size: tuple[int, int], u: Sequence[float]) -> tuple[int, int] | None:
        return self._corner(size, u) if cover_size(size, self.shape) == size else None

    def _corner(self, size: tuple[int, int], u: Sequence[float]) -> tuple[int, int]:
        (height, width), (h, w), p = size, self.shape, self.padding
        return int(u[0] * (height + 2 * p - h + 1)) - p, int(u[1] * (width + 2 * p - w + 1)) - p


@dataclass(frozen=True)
class RandomResizedCrop(Crop):
    """MAE's crop: a random part of the area at a random aspect ratio, resized to `size`.

    Follows torchvision: ten tries for a box inside the image, then the largest central box of an allowed ratio.

    single  one try, cut to the image where it is larger: the crop of MAE's linear probe
    """

    size: Size
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Interpolation = "bicubic"
    single: bool = False

    @property
    def num_uniforms(self) -> int:
        return 4 if self.single else 22  # area and ratio for each try, then two for the place

    @property
    def shape(self) -> tuple[int, int]:
        return _pair(self.size)

    def crop_into(self, image: Shaped[Array, "h w c"], u: Sequence[float], out: Shaped[Array, "h2 w2 c"]) -> None:
        top, left, h, w = self.box(image.shape[:2], u)
        out[...] = resize(image[top : top + h, left : left + w], self.shape, self.interpolation)

    def offset_without_resize(self, size: tuple[int, int], u: Sequence[float]) -> tuple[int, int] | None:
        return None

    def box(self, size: tuple[int, int], u: Sequence[float]) -> tuple[int, int, int, int]:
        """The crop (top, left, height, width) in pixels of an image of `size` (h, w)."""
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
        """The crop where all tries failed: the largest central box of an allowed ratio."""
        height, width = size
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
        return (height - h) // 2, (width - w) // 2, h, w


@dataclass(frozen=True)
class CenterCrop(Crop):
    """Resize until the image just covers `size` x `enlarge`, aspect kept, then take the middle.

    enlarge = 1 is the paper's ablation "CC"; 256/224 is the crop of the evaluation protocols.
    """

    size: Size
    enlarge: float = 1.0
    interpolation: Interpolation = "bicubic"

    @property
    def num_uniforms(self) -> int:
        return 0

    @property
    def shape(self) -> tuple[int, int]:
        return _pair(self.size)

    def crop_into(self, image: Shaped[Array, "h w c"], u: Sequence[float], out: Shaped[Array, "h2 w2 c"]) -> None:
        image = resize(image, cover_size(image.shape[:2], self._covered), self.interpolation)
        (top, left), (h, w) = self._corner(image.shape[:2]), self.shape
        out[...] = image[top : top + h, left : left + w]

    def offset_without_resize(self, size: tuple[int, int], u: Sequence[float]) -> tuple[int, int] | None:
        return self._corner(size) if cover_size(size, self._covered) == size else None

    def _corner(self, size: tuple[int, int]) -> tuple[int, int]:
        return round((size[0] - self.shape[0]) / 2), round((size[1] - self.shape[1]) / 2)

    @property
    def _covered(self) -> tuple[int, int]:
        return round(self.shape[0] * self.enlarge), round(self.shape[1] * self.enlarge)


def evaluation_crop(size: Size) -> CenterCrop:
    """The crop of every evaluation: resize to 256/224 of the size, bicubic, and take the middle."""
    return CenterCrop(size, enlarge=256 / 224)


def resize_to_cover(
    image: Shaped[Tensor, "c h w"], size: tuple[int, int], interpolation: Interpolation = "bicubic"
) -> Shaped[Tensor, "c h2 w2"]:
    """Resize with antialias until the image just covers `size`, aspect kept; for a square, shortest edge to `size`."""
    return _resize(image, cover_size((image.shape[-2], image.shape[-1]), size), interpolation)


def resize(
    image: Shaped[Array, "h w c"], size: tuple[int, int], interpolation: Interpolation
) -> Shaped[Array, "h2 w2 c"]:
    """Resize to `size` (h, w) with antialias; the image itself if it has that size."""
    if image.shape[:2] == size:
        return image
    whole = as_image(np.ascontiguousarray(image))  # torch is slower on parts, and then lays the result out otherwise
    result: Array = _resize(whole, size, interpolation).permute(1, 2, 0).numpy()
    return result


def as_image(array: Shaped[Array, "h w c"]) -> Shaped[Tensor, "c h w"]:
    """An array as a tensor: a view in channels-last memory, fast to resize; a copy only if it must not be written."""
    writable = array if array.flags.writeable else array.copy()
    return torch.from_numpy(writable.transpose(2, 0, 1))


def cover_size(image: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The (h, w) of an image of (h, w) resized until it just covers `size`."""
    (height, width), (h, w) = image, size
    # Integers on purpose, as torchvision rounds: the longer edge is cut, not rounded.
    if height * w >= width * h:
        return max(h, height * w // width), w
    return h, max(w, width * h // height)


def flip_and_normalize(
    images: Shaped[Tensor, "b c h w"], flip: Bool[Tensor, " b"] | None, mean: Tensor, std: Tensor
) -> Float[Tensor, "b c h w"]:
    """The last steps on the device, for a whole batch: flip rows where `flip`, scale to [0, 1], normalize.

    uint8 images count 255 as one, uint16 images 65535; floating-point images are taken as they are. mean and std have
    c values each.
    """
    scale = 1.0 if images.is_floating_point() else float(torch.iinfo(images.dtype).max)
    shape = (1, -1, 1, 1)
    x = (images.float() - (mean * scale).view(shape)) / (std * scale).view(shape)
    return x if flip is None else torch.where(flip.view(-1, 1, 1, 1), x.flip(-1), x)


def stack_images(images: Sequence[Shaped[Tensor, "c h w"]]) -> Shaped[Tensor, "n c h w"]:
    """Images of one size as a batch."""
    return torch.stack([as_int16_view(image) for image in images]).view(images[0].dtype)


def as_int16_view(image: Tensor) -> Tensor:
    """A view that every torch can index and join: uint16 came late, and has few operators."""
    return image.view(torch.int16) if image.dtype == torch.uint16 else image


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _resize(image: Tensor, size: tuple[int, int], interpolation: Interpolation) -> Tensor:
    if image.shape[-2:] == size:
        return image
    if image.dtype == torch.uint16:  # bicubic overshoots at edges
        resize = _resize(image.float(), size, interpolation)
        return resize.round_().clamp_(0, 65535).to(torch.uint16)
    return V.resize(image, list(size), interpolation=_MODES[interpolation], antialias=True)


def _put_window(image: Array, top: int, left: int, out: Array) -> None:
    """Write into `out` the window of the image, padded by reflection, whose corner is (top, left).

    Pixel -k is pixel k, and the last one + k the last one - k. Only what the window shows is copied, once: first what
    lies in the image, and then, out of that, what is mirrored.
    """
    (height, width, _), (h, w, _) = image.shape, out.shape
    above, before = max(-top, 0), max(-left, 0)
    below, after = min(h, height - top), min(w, width - left)  # where the image ends in the window
    if 2 * max(above, h - below) >= h - 1 or 2 * max(before, w - after) >= w - 1:  # more is mirrored than is not
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
    """The pixels that `count` places from `begin` on show, along an axis of `length` pixels padded by reflection."""
    device = begin.device if isinstance(begin, Tensor) else None
    places = (begin + torch.arange(count, device=device)).abs()
    return length - 1 - (length - 1 - places).abs()
