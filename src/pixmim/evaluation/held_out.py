"""Measures without labels, on images that are held out of training: reconstruction loss and effective rank."""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor

from pixmim.config import PretrainConfig
from pixmim.data.bad_images import BadImageLog
from pixmim.data.dataset import ImageDataset, Subset
from pixmim.data.loader import iterate_in_order
from pixmim.losses import ReconstructionLoss
from pixmim.masking import MaskSampler
from pixmim.models import features
from pixmim.models.base import MaskedModel
from pixmim.training.distributed import Distributed
from pixmim.training.precision import Precision, autocast
from pixmim.transforms.crops import CenterCrop, flip_and_normalize
from pixmim.utils.console import print_plain
from pixmim.utils.errors import UserError

_BATCH = 64  # images of a forward pass
_STEP = -2  # of the masks: no training step uses it, and drawings use -1
_DEFAULT_COUNT = 50  # measurements of a run


def measure_every(config: PretrainConfig, steps: int, epoch: float) -> int:
    """Return the steps (of `epoch` epochs) between measurements: by default 1/50 of the run, at least an epoch."""
    return max(1, round((config.hold_out_every or max(1.0, steps * epoch / _DEFAULT_COUNT)) / epoch))


def online_held_out(
    config: PretrainConfig,
    data: ImageDataset,
    masks: MaskSampler,
    criterion: ReconstructionLoss,
    device: torch.device,
    precision: Precision,
    world: Distributed,
    console: Console,
) -> Callable[[MaskedModel], dict[str, float]]:
    """Return a function that measures a model in training, on center crops with fixed masks. Collective.

    Its values are "held_out_loss" and "rankme", without those that are not finite. They do not depend on the number of
    ranks, which share the batches. How many images cannot be read is printed once.
    """
    crop = CenterCrop(config.image_size, interpolation=config.interpolation)
    mean, std = (torch.tensor(values, device=device) for values in config.normalization)
    batch = min(_BATCH, config.batch_size)
    rows = np.arange(len(data))
    rows = rows[rows // batch % world.size == world.rank]
    own, warned, measured = Subset(data, rows.tolist()), False, False
    skipped = BadImageLog(None, len(own), config.max_bad_fraction)

    def measure_own(model: MaskedModel) -> Iterator[tuple[int, float, int, Tensor]]:
        """Yield first row, summed loss, number of hidden patches and features of each batch of this rank."""
        for images, read, _ in iterate_in_order(own, crop, skipped=skipped, batch=batch, threads=config.threads):
            if len(read):
                x = flip_and_normalize(images.to(device), None, mean, std)
                mask = masks(_STEP, rows[read]).to(device)
                with autocast(device, precision):
                    prediction, tokens = model(x, mask), features(model.encoder, x).mean
                hidden = int(mask.hidden.sum())
                loss = float(criterion(prediction, x, mask).loss) * hidden
                yield int(rows[read[0]]), loss, hidden, tokens.float().cpu()

    @torch.no_grad()
    def measure(model: MaskedModel) -> dict[str, float]:
        nonlocal warned, measured
        training, failure = model.training, ""
        model.eval()
        try:
            batches = list(measure_own(model))
        except UserError as error:
            batches, failure = [], str(error)
        finally:
            model.train(training)
        found, failures = zip(*world.gather((batches, failure)), strict=True)
        batches = sorted(itertools.chain(*found), key=lambda entry: entry[0])
        if not batches and not any(failures):
            failures = (f"none of the {len(data):,} images that --hold-out keeps can be read: {skipped.reasons}",)
        if failure := next(filter(None, failures), ""):
            if not measured:  # nothing is lost yet
                raise UserError(failure)
            print_plain(console, f"warning: the held-out images are not measured: {failure}")
            return {}
        measured = True
        _, losses, hidden, vectors = zip(*batches, strict=True)
        x = torch.cat(vectors)
        if len(x) < len(data) and not warned:
            print_plain(console, f"{len(data) - len(x):,} of the {len(data):,} held-out images cannot be read")
            warned = True
        values = {"held_out_loss": math.fsum(losses) / sum(hidden)}
        values["rankme"] = rankme(x) if bool(x.isfinite().all()) else math.nan
        return {name: value for name, value in values.items() if math.isfinite(value)}

    return measure


def rankme(features: Float[Tensor, "n d"], eps: float = 1e-7) -> float:
    """Return the effective rank of features: exp of the entropy of their normalized singular values.

    RankMe (arXiv 2210.02885, section 3): p_k = s_k / sum(s) + eps, and exp(-sum(p_k log p_k)), from 1 to min(n, d).
    The features are not centered. Computed in float64.
    """
    s = torch.linalg.svdvals(features.double())
    p = s / s.sum().clamp(min=torch.finfo(s.dtype).tiny) + eps
    return float((-p * p.log()).sum().exp())
