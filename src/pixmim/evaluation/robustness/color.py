"""Light, contrast, and what files do to pictures. Images are float (c h w) in [0, 1]; results may leave that range."""

import io

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor


def brightness(
    x: Float[Tensor, "c h w"], constants: tuple[float, ...], draw: np.random.Generator, scale: float
) -> Float[Tensor, "c h w"]:
    """Raise the value of HSV, hue and saturation kept. constants: by how much.

    The value of a color is its largest channel, and all channels are proportional to it; black becomes grey.
    """
    value = x.amax(dim=0, keepdim=True)
    raised = (value + constants[0]).clamp(0, 1)
    return torch.where(value > 0, x / value.clamp(min=1e-6) * raised, raised)


def contrast(
    x: Float[Tensor, "c h w"], constants: tuple[float, ...], draw: np.random.Generator, scale: float
) -> Float[Tensor, "c h w"]:
    """Pull values towards the mean of their channel. constants: the contrast that is left."""
    mean = x.mean(dim=(1, 2), keepdim=True)
    return (x - mean) * constants[0] + mean


def pixelate(
    x: Float[Tensor, "c h w"], constants: tuple[float, ...], draw: np.random.Generator, scale: float
) -> Float[Tensor, "c h w"]:
    """Fewer pixels, each a mean over its area, brought back to size. constants: their share along each edge."""
    picture = _picture(x)
    small = max(1, int(picture.width * constants[0])), max(1, int(picture.height * constants[0]))
    return _tensor(picture.resize(small, Image.Resampling.BOX).resize(picture.size, Image.Resampling.BOX))


def jpeg(
    x: Float[Tensor, "c h w"], constants: tuple[float, ...], draw: np.random.Generator, scale: float
) -> Float[Tensor, "c h w"]:
    """Through a JPEG, colors at half resolution. constants: its quality."""
    buffer = io.BytesIO()
    _picture(x).save(buffer, "JPEG", quality=int(constants[0]))
    with Image.open(buffer, formats=("JPEG",)) as picture:
        return _tensor(picture)


def _picture(x: Tensor) -> Image.Image:
    pixels = (x * 255).round().to(torch.uint8)
    return Image.fromarray((pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).numpy())


def _tensor(picture: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(picture, np.float32)) / 255
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
