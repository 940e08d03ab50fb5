"""Images of any depth and number of channels as pictures to look at."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pixmim.config import ModelConfig

Picture = npt.NDArray[np.uint8]
"""Pixels (h w c), or several pictures (n h w c)."""

_DARK = 1 / 8  # of white: an image of 8 bits whose brightest percent is below was made of 10 or 12 bits in 16
_FLAT = 1e-3  # of the values themselves: less than that is no contrast


def drawn(images: Mapping[str, Float[Tensor, "b c h w"]], run: ModelConfig) -> dict[str, Picture]:
    """Draw images of values before normalisation, by name, all of a row over the same range.

    Drawn are the channels that `run.bands` names as red, green and blue (or one as grey); otherwise the first three, or
    of one or two channels the first. Colour and grey of 8 bits are drawn from 0 to 255, unless an image is so dark that
    its bits lie elsewhere. Everything else has no black and white of its own, so each row is drawn from the 1st to the
    99th percentile of "image" and "target" together: over all three where three are all, and each channel by itself
    elsewhere, since each has a unit of its own. What has no contrast there is grey.
    """
    chosen = list(run.drawn)
    shown = {name: values[:, chosen].float() for name, values in images.items()}
    known = torch.cat([shown[name] for name in ("image", "target") if name in shown], dim=2)
    one_range = run.channels == 3
    values = known.flatten(1)[:, None] if one_range else known.flatten(2)
    # By numpy, since torch's quantile refuses large images.
    ends = torch.from_numpy(np.percentile(values.numpy(), (1, 99), axis=2).astype(np.float32))
    low, high = ends[..., None, None]
    if run.pixels == "uint8" and run.channels in (1, 3):
        usual = high.amax(dim=1, keepdim=True) >= _DARK
        low, high = torch.where(usual, 0.0, low), torch.where(usual, 1.0, high)
    span, flat = high - low, _FLAT * torch.maximum(low.abs(), high.abs())
    found = {}
    for name, values in shown.items():
        share = torch.where(span > flat, (values - low) / span.clamp(min=1e-30), 0.5)
        found[name] = np.asarray((share.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1))
    return found


def visible(image: Shaped[Tensor, "c h w"], run: ModelConfig) -> Picture:
    """Draw one image as a data set gives it, as `drawn` does, in three channels (h w 3)."""
    scale = 1.0 if image.is_floating_point() else float(torch.iinfo(image.dtype).max)
    picture = drawn({"image": image.float()[None] / scale}, run)["image"][0]
    return picture.repeat(3, axis=2) if picture.shape[2] == 1 else picture


def hatch(h: int, w: int) -> Picture:
    """Draw what is hidden (h w 1): grey, with lighter diagonals that no image has by chance."""
    rows, columns = np.indices((h, w))
    return np.where((rows + columns) % 4 == 0, 160, 120).astype(np.uint8)[..., None]
