"""The method of a run, ready to compute: from a batch of images to a loss. This is the paper's algorithm."""

from dataclasses import dataclass, replace

import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pixmim.config import Run
from pixmim.data import open_data
from pixmim.dist import ALONE, World
from pixmim.engine.device import Precision, autocast, choose_attention, choose_device, choose_precision
from pixmim.engine.memory.fitting import advice, largest_batch
from pixmim.engine.memory.footprint import fits, measure
from pixmim.engine.memory.malloc import give_back
from pixmim.engine.parallel import spread
from pixmim.grid import grid_of
from pixmim.losses import Objective
from pixmim.masking import Masker
from pixmim.models.base import MaskedModel
from pixmim.parts import build_masker, build_model, build_objective, draw_masks, image_form


@dataclass(frozen=True)
class Method:
    """Model, mask and target of a run on a device. (The fourth choice, the crop, is made before: it feeds this.)"""

    run: Run
    model: MaskedModel
    masker: Masker
    objective: Objective
    device: torch.device
    precision: Precision

    @staticmethod
    def of(run: Run) -> "Method":
        """What the run names, its weights as its seed decides. Raises UserError."""
        device = choose_device(run.device)
        precision = choose_precision(run.precision, device)
        model = build_model(run)
        masker = build_masker(run, model.patch)
        choose_attention(model, device, precision)
        return Method(run, model.to(device), masker, build_objective(run).to(device), device, precision)

    def loss(
        self, network: nn.Module, images: Float[Tensor, "b c h w"], step: int, rows: npt.ArrayLike
    ) -> Float[Tensor, ""]:
        """Hide patches of normalised images, predict them, and hold the prediction against the target.

        network  the model, or what spreads it over processes
        rows     (b) of the step's whole batch, which these images are: they decide the masks
        """
        grid = grid_of(self.run.hw, self.model.patch)
        mask = draw_masks(self.run, self.masker, grid, step, rows).to(self.device)
        with autocast(self.device, self.precision):
            prediction = network(images, mask)
        return self.objective(prediction, images, mask).loss

    def trial(self, images: int) -> None:
        """Forward and backward of so many images of noise, to measure what they take."""
        noise = torch.randn(images, self.run.channels, *self.run.hw, device=self.device)
        self.loss(self.model, noise, 0, range(images)).backward()


def with_largest_batch(run: Run, world: World) -> tuple[Run, str]:
    """The run with the batch that `--batch-size auto` means, and a line that says why. Raises UserError."""
    images = len(open_data(run.data, image_form(run), run.local_copy))
    method = _alone(run)
    most = -(-min(run.batch_size, images) // world.size)
    fitting = fits(
        method.trial, method.device, method.model.parameters(), most, least=lambda number: min(world.gather(number))
    )
    size, line = largest_batch(fitting, run.batch_size, images, world.size)
    return replace(run, batch_size=size, accumulate=1), line


def too_large(run: Run, world: World) -> str:
    """What to say of a run that has run out of memory: which parts of its batch would fit."""
    give_back()  # what the run's steps had taken
    method = _alone(run)
    footprint = measure(method.trial, method.device, method.model.parameters())
    return advice(footprint, method.device, run.batch_size, run.accumulate, world.size)


def _alone(run: Run) -> Method:
    """The method as one process would compute it, not compiled: what its trials take is measured."""
    method = Method.of(run)
    spread(method.model, replace(run.scale, compile="none"), ALONE, method.device, method.precision)
    return method
