"""From a Run to the four choices it names (crop, mask, model, target), and the numbers that drive them."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pixmim import rng
from pixmim.config import Run
from pixmim.losses import Objective
from pixmim.masking import RandomMask
from pixmim.models import create_model
from pixmim.models.base import MaskedModel
from pixmim.targets import LowFrequency, Pixels
from pixmim.transforms import CentreCrop, Crop, RandomResizedCrop, SimpleResizedCrop


def build_crop(run: Run) -> Crop:
    """What the network sees of a picture."""
    if run.crop.kind == "src":
        return SimpleResizedCrop(run.hw, run.crop.padding, run.crop.interpolation)
    if run.crop.kind == "rrc":
        return RandomResizedCrop(run.hw, run.crop.scale, interpolation=run.crop.interpolation)
    return CentreCrop(run.hw, interpolation=run.crop.interpolation)


def build_masker(run: Run) -> RandomMask:
    """What is hidden."""
    return RandomMask(run.mask.ratio)


def build_model(run: Run) -> MaskedModel:
    """Who predicts, with the initial weights that the run's seed decides."""
    torch.manual_seed(run.seed)
    m = run.model
    return create_model(
        m.name,
        m.backbone,
        decoder_dim=m.decoder_dim,
        decoder_depth=m.decoder_depth,
        decoder_heads=m.decoder_heads,
        **{"img_size": run.hw, "in_chans": run.channels, **m.options},
    )


def build_objective(run: Run) -> Objective:
    """What must be predicted, and the distance to it."""
    mean, std = run.statistics
    t = run.target
    target = LowFrequency(t.radius, t.form, mean, std) if t.kind == "low-frequency" else Pixels()
    return Objective(target, t.normalise_patches, t.distance)


def mask_noise(run: Run, step: int, rows: Sequence[int], patches: int) -> Float[Tensor, "b n"]:
    """The numbers in [0, 1) that decide the masks of some rows of a step's batch: a function of (seed, step, row)."""
    return torch.from_numpy(rng.uniform(run.seed, "mask", step, rows, patches).astype(np.float32))
