"""Images in forms that few libraries take: PIL's modes, and torch's uint16."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Shaped
from PIL import Image
from torch import Tensor


def map_bands(image: Image.Image, function: Callable[[Tensor], Tensor]) -> Image.Image:
    """Apply a function that resamples an image (c h w) to all bands of a PIL image, and keep its mode.

    Raises:
        TypeError: If the mode has no values between two others, as indices of a palette.
    """
    if image.mode in ("1", "P", "PA"):
        raise TypeError(f"a crop interpolates, and mode {image.mode} has no values between: image.convert('RGB')")
    bands = [np.asarray(band) for band in image.split()]
    values = np.stack([band.astype(band.dtype.newbyteorder("="), copy=False) for band in bands])
    result = [Image.fromarray(np.ascontiguousarray(band)) for band in function(torch.from_numpy(values)).numpy()]
    return result[0] if len(result) == 1 else Image.merge(image.mode, result)


def stack_images(images: Sequence[Shaped[Tensor, "c h w"]]) -> Shaped[Tensor, "n c h w"]:
    """Stack images of one size to a batch."""
    return torch.stack([as_int16_view(image) for image in images]).view(images[0].dtype)


def as_int16_view(image: Tensor) -> Tensor:
    """View uint16 as int16, because torch implements few operators for uint16."""
    return image.view(torch.int16) if image.dtype == torch.uint16 else image
