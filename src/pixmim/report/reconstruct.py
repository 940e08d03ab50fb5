"""Draw what a model predicts of hidden patches, and compute radial power spectra.

A network with normalized targets predicts the pattern of a patch, but not its brightness and contrast (or those of a
window around each pixel). The columns "prediction" and "pasted" take mean and deviation from the target, information
that the network did not predict. "unaided" uses one mean and deviation per image, averaged over visible pixels, so that
all differences between patches were predicted. Color bins are drawn as the expected color. Predictions of visible
patches carry no loss, so they are not drawn.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pixmim.build import build_loss, build_mask_sampler
from pixmim.config import ModelConfig, PretrainConfig
from pixmim.data.dataset import BadImage, ImageDataset
from pixmim.evaluation.visualize import Pixels, hatch, to_pixels
from pixmim.losses import patch_size
from pixmim.masking import Mask
from pixmim.models.base import MaskedModel
from pixmim.targets import ColorBins
from pixmim.transforms.crops import CenterCrop, flip_and_normalize
from pixmim.transforms.images import stack_images
from pixmim.utils import rng
from pixmim.utils.errors import UserError
from pixmim.utils.patches import hidden_pixels, unpatchify
from pixmim.weights.detect import Weights
from pixmim.weights.load import build_with_weights

COLUMNS = {
    "image": "the crop",
    "masked": "what the network sees",
    "prediction": "of hidden patches, with the target's brightness and contrast",
    "target": "what must be predicted",
    "pasted": "hidden patches from the prediction, the others from the image",
    "unaided": "pasted, with one brightness and contrast for all hidden patches",
}


@dataclass(frozen=True)
class Reconstruction:
    """Drawings of several images."""

    step: int  # training step of the weights
    columns: dict[str, Pixels]  # uint8 images (n h w c) for each of COLUMNS
    names: list[str]  # file names of the images
    # mean radial power spectra (radii) of image, target and prediction
    spectra: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)  # a line for each unreadable image that was left out


def with_bands(weights: Weights, bands: str) -> Weights:
    """Return weights whose config draws these channels as red, green and blue; unchanged for an empty string."""
    return replace(weights, config=replace(weights.config, bands=bands)) if bands else weights


def reconstruct(weights: Weights, data: ImageDataset, count: int = 6) -> Reconstruction:
    """Draw center crops of `count` images in an order that no epoch uses. Raises UserError without a decoder."""
    images, names, errors = choose_crops(weights.config, data, count)
    drawing = draw(build_with_weights(weights), weights.config, images, weights.step, names)
    return replace(drawing, errors=errors)


def choose_crops(
    config: ModelConfig, data: ImageDataset, count: int
) -> tuple[Shaped[Tensor, "b c h w"], list[str], list[str]]:
    """Read the center crops of `count` images, always the same, as `load_crops`."""
    order = range(len(data))
    seed = config.seed if isinstance(config, PretrainConfig) else 0
    shuffled = (int(rng.shuffled(seed, "order", 2**31, len(data), [position])[0]) for position in order)
    return load_crops(config, data, count, order if len(data) <= count else shuffled)


def load_crops(
    config: ModelConfig, data: ImageDataset, count: int, order: Iterable[int]
) -> tuple[Shaped[Tensor, "b c h w"], list[str], list[str]]:
    """Read the center crops of the first `count` readable images. Raises UserError if no image can be read.

    Returns the images, the names of their files, and a line for each unreadable image.
    """
    crop = CenterCrop(config.image_size, interpolation=config.interpolation)
    images, names, errors = list[Tensor](), list[str](), list[str]()
    for index in order:
        try:
            images.append(crop.crop(data.image(index)))
            names.append(os.path.basename(data.path_of(index)))
        except BadImage as error:
            errors.append(f"{data.path_of(index)}: {error}")
        if len(images) == count:
            break
    if not images:
        raise UserError("\n".join([f"no image of {data.spec} can be read", *errors[:3]]))
    return stack_images(images), names, errors


@torch.no_grad()
def draw(
    model: MaskedModel,
    config: ModelConfig,
    images: Shaped[Tensor, "b c h w"],
    step: int = 0,
    names: Sequence[str] = (),
    mask: Mask | None = None,
) -> Reconstruction:
    """Draw the reconstruction of crops, by default with the masks of step -1, which no training step uses."""
    loss = build_loss(config)
    mean, std = (torch.tensor(values) for values in config.normalization)
    x = flip_and_normalize(images, None, mean, std)
    mask = mask or build_mask_sampler(config, model.patch)(step=-1, rows=range(len(x)))

    prediction = model(x, mask)
    patch = patch_size(prediction, x, loss.outputs)
    if isinstance(loss.target, ColorBins):
        prediction = loss.target.expected(prediction)
    target = loss.target(x)
    hidden = hidden_pixels(mask.hidden, model.patch, config.image_size)
    filled = unaided = unpatchify(prediction, patch, config.image_size)
    borrowed, visible = (loss.statistics(target, patch, where) for where in (None, ~hidden))
    if borrowed is not None and visible is not None:
        local_mean, local_std = borrowed
        global_mean, global_std = (_masked_mean(values, ~hidden) for values in visible)
        filled, unaided = filled * local_std + local_mean, filled * global_std + global_mean
    normalized = {
        "image": x,
        "masked": x,
        "prediction": filled,
        "target": target,
        "pasted": torch.where(hidden, filled, x),
        "unaided": torch.where(hidden, unaided, x),
    }
    pixels = {name: value * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1) for name, value in normalized.items()}
    # The spectrum of the prediction is that of the target with hidden patches predicted: no hatching, no extra seams.
    compared = {"image": x, "target": target, "prediction": torch.where(hidden, filled, target)}
    spectra = {name: radial_spectrum(value * std.view(1, -1, 1, 1)) for name, value in compared.items()}
    columns, pattern, is_hidden = to_pixels(pixels, config), hatch(*config.image_size), hidden.numpy()[:, 0, ..., None]
    columns["masked"] = np.where(is_hidden, pattern, columns["masked"])
    columns["prediction"] = np.where(is_hidden, columns["prediction"], pattern)
    return Reconstruction(step, columns, list(names), spectra)


def radial_spectrum(images: Float[Tensor, "b c h w"]) -> npt.NDArray[np.float64]:
    """Compute the radial power spectrum, averaged over images and channels: float64 (r).

    Entry r is the mean of |DFT|^2 / (h w) over frequencies of about r cycles per shorter side in any direction, up to
    half the shorter side. The constant (r = 0) is included.
    """
    h, w = images.shape[-2:]
    side = min(h, w)
    power = torch.fft.fft2(images.double()).abs().square().mean(dim=(0, 1)) / (h * w)
    v, u = torch.fft.fftfreq(h, 1 / side), torch.fft.fftfreq(w, 1 / side)
    radius = (v[:, None] ** 2 + u[None, :] ** 2).sqrt().round().long().flatten()
    mean = torch.bincount(radius, power.flatten()) / torch.bincount(radius)
    return np.asarray(mean[: side // 2 + 1])


def _masked_mean(images: Tensor, where: Tensor) -> Tensor:
    """Return the mean (b c 1 1) of each channel over the pixels where `where` (b 1 h w) is True."""
    return (images * where).sum(dim=(2, 3), keepdim=True) / where.sum(dim=(2, 3), keepdim=True)
