"""Pictures of what a model predicts, honest about per-patch normalization, and their radial spectra.

With norm_pix the network predicts each patch's pattern only, not its brightness or contrast. To draw it, those two
numbers must come from somewhere:
- "prediction" and "pasted" take them from the target: sharp to look at, but hidden patches then hold information
  that the network did not predict;
- "unaided" gives every patch the same two numbers, the averages over the visible patches of that image, so that all
  which differs from patch to patch was predicted. Where predicted patches are larger than hidden ones, those of a
  patch that is visible in part are taken from its visible pixels, and count for as many.
With a window around each pixel (normalize_window) the two numbers are those of the pixel's own window and channel, so
what is borrowed is a blurred image; "unaided" then has one pair for each channel.
Of color bins the expected color is drawn, the mean of the bins' centers by their probabilities.
The loss counts hidden patches only; what a network gives for visible ones was never trained, so it is not drawn.
"""

import os
from collections.abc import Sequence
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
from pixmim.models.base import MaskedModel
from pixmim.targets import ColorBins
from pixmim.transforms.crops import CenterCrop, flip_and_normalize, stack_images
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
    """Pictures by column, each uint8 (n h w c), and mean radial power spectra (radii) of some of them."""

    step: int
    columns: dict[str, Pixels]
    names: list[str]
    """Files of the rows."""
    spectra: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)


def with_bands(weights: Weights, bands: str) -> Weights:
    """Weights whose run draws these channels as red, green and blue; as they are if none are named."""
    return replace(weights, config=replace(weights.config, bands=bands)) if bands else weights


def reconstruct(weights: Weights, data: ImageDataset, count: int = 6) -> Reconstruction:
    """What a whole model makes of `count` pictures of a data set: their center crops.

    Raises UserError if the weights are an encoder's only, or not one picture can be read.
    """
    pictures, names = _some_pictures(weights.config, data, count)
    return draw(build_with_weights(weights), weights.config, pictures, weights.step, names)


@torch.no_grad()
def draw(
    model: MaskedModel,
    config: ModelConfig,
    pictures: Shaped[Tensor, "b c h w"],
    step: int = 0,
    names: Sequence[str] = (),
) -> Reconstruction:
    """What a model makes of pictures of the run's size, with the run's target and masks of step -1, which no training
    step uses.
    """
    objective = build_loss(config)
    mean, std = (torch.tensor(values) for values in config.normalization)
    x = flip_and_normalize(pictures, None, mean, std)
    mask = build_mask_sampler(config, model.patch)(step=-1, rows=range(len(x)))

    prediction = model(x, mask)
    patch = patch_size(prediction, x, objective.outputs)
    if isinstance(objective.target, ColorBins):
        prediction = objective.target.expected(prediction)
    target = objective.target(x)
    hidden = hidden_pixels(mask.hidden, model.patch, config.image_size)
    filled = unaided = unpatchify(prediction, patch, config.image_size)
    borrowed, own = (objective.statistics(target, patch, seen) for seen in (None, ~hidden))
    if borrowed is not None and own is not None:
        (mean_of, deviation_of), (local_mean, local_deviation) = (_average(s, ~hidden) for s in own), borrowed
        filled, unaided = filled * local_deviation + local_mean, filled * deviation_of + mean_of
    normalized = {
        "image": x,
        "masked": x,
        "prediction": filled,
        "target": target,
        "pasted": torch.where(hidden, filled, x),
        "unaided": torch.where(hidden, unaided, x),
    }
    pixels = {name: value * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1) for name, value in normalized.items()}
    # The prediction's spectrum is that of the target with its hidden patches predicted: no grey, no seams of its own.
    compared = {"image": x, "target": target, "prediction": torch.where(hidden, filled, target)}
    spectra = {name: radial_spectrum(value * std.view(1, -1, 1, 1)) for name, value in compared.items()}
    columns, blank, gone = to_pixels(pixels, config), hatch(*config.image_size), hidden.numpy()[:, 0, ..., None]
    columns["masked"] = np.where(gone, blank, columns["masked"])
    columns["prediction"] = np.where(gone, columns["prediction"], blank)
    return Reconstruction(step, columns, list(names), spectra)


def radial_spectrum(images: Float[Tensor, "b c h w"]) -> npt.NDArray[np.float64]:
    """Mean power of the frequencies at each whole distance from zero, averaged over images and channels; float64 (r).

    Entry r is the mean of |DFT|^2 / (h w) over bins whose distance rounds to r; the constant (r = 0) included.
    """
    h, w = images.shape[-2:]
    power = torch.fft.fft2(images.double()).abs().square().mean(dim=(0, 1)) / (h * w)
    v, u = torch.fft.fftfreq(h, 1 / h), torch.fft.fftfreq(w, 1 / w)
    radius = (v[:, None] ** 2 + u[None, :] ** 2).sqrt().round().long().flatten()
    mean = torch.bincount(radius, power.flatten()) / torch.bincount(radius)
    return np.asarray(mean[: min(h, w) // 2 + 1])


def _average(images: Tensor, over: Tensor) -> Tensor:
    """The mean (b c 1 1) of each channel over the pixels where `over` (b 1 h w) is True."""
    return (images * over).sum(dim=(2, 3), keepdim=True) / over.sum(dim=(2, 3), keepdim=True)


def _some_pictures(config: ModelConfig, data: ImageDataset, count: int) -> tuple[Tensor, list[str]]:
    """The first readable pictures of an order that no training epoch uses, in order if there are few; their files."""
    crop = CenterCrop(config.image_size, interpolation=config.interpolation)
    found, names = list[Tensor](), list[str]()
    few, seed = len(data) <= count, config.seed if isinstance(config, PretrainConfig) else 0
    for place in range(len(data)):
        index = place if few else int(rng.shuffled(seed, "order", 2**31, len(data), [place])[0])
        try:
            found.append(crop.crop(data.image(index)))
            names.append(os.path.basename(data.path_of(index)))
        except BadImage as error:
            reason = f"{data.path_of(index)}: {error}"
            continue
        if len(found) == count:
            break
    if not found:
        raise UserError(f"not one image of {data.spec} can be read ({reason})")
    return stack_images(found), names
