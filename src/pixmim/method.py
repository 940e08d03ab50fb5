"""The method of a run, ready to compute: from a batch of images to a loss. This is the paper's algorithm."""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor, nn

from pixmim.build import build_masker, build_model, build_objective, draw_masks
from pixmim.config import Run
from pixmim.losses import Objective
from pixmim.masking import Mask, Masker
from pixmim.models.base import MaskedModel
from pixmim.training.precision import Precision, autocast, choose_attention, choose_device, choose_precision
from pixmim.utils.patches import grid_of


@dataclass(frozen=True)
class Method:
    """Model, mask and target of a run on a device. (The fourth choice, the crop, is made before: it feeds this.)"""

    run: Run
    model: MaskedModel
    masker: Masker
    objective: Objective
    device: torch.device
    precision: Precision
    _hidden: dict[int, int] = field(default_factory=dict)

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
        mask = self._masks(step, rows).to(self.device)
        with autocast(self.device, self.precision):
            prediction = network(images, mask)
        return self.objective(prediction, images, mask).loss

    def share(self, step: int, rows: npt.ArrayLike) -> float:
        """Return which share of a step's loss, a mean over the batch's hidden patches, some of its rows have."""
        of = self.run.batch_size
        if self.masker.even(grid_of(self.run.hw, self.model.patch)):
            return np.size(rows) / of
        if self._hidden.get(step) is None:  # counted once for all parts of a batch
            self._hidden.clear()
            self._hidden[step] = int(self._masks(step, range(of)).hidden.sum())
        return int(self._masks(step, rows).hidden.sum()) / self._hidden[step]

    def _masks(self, step: int, rows: npt.ArrayLike) -> Mask:
        return draw_masks(self.run, self.masker, grid_of(self.run.hw, self.model.patch), step, rows)
