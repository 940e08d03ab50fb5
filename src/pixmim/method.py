"""The method of a run, ready to compute: from a batch of images to a loss. This is the paper's algorithm."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pixmim.build import build_loss, build_mask_sampler, build_model
from pixmim.config import PretrainConfig
from pixmim.losses import ReconstructionLoss
from pixmim.masking import Mask, MaskSampler
from pixmim.models.base import MaskedModel
from pixmim.training.precision import Precision, autocast, choose_attention, choose_device, choose_precision


@dataclass(frozen=True)
class Method:
    """Model, masks and target of a run on a device. (The fourth choice, the crop, is made before: it feeds this.)"""

    config: PretrainConfig
    model: MaskedModel
    masks: MaskSampler
    objective: ReconstructionLoss
    device: torch.device
    precision: Precision

    @staticmethod
    def of(config: PretrainConfig) -> "Method":
        """Build what the run names, its weights as its seed decides. Raises UserError."""
        device = choose_device(config.device)
        precision = choose_precision(config.precision, device)
        model = build_model(config)
        masks = build_mask_sampler(config, model.patch)
        choose_attention(model, device, precision)
        return Method(config, model.to(device), masks, build_loss(config).to(device), device, precision)

    def loss(self, network: nn.Module, images: Float[Tensor, "b c h w"], mask: Mask) -> Float[Tensor, ""]:
        """Return the loss of predicting the hidden patches of normalized images.

        Args:
            network: The model, or its wrapper for several processes.
            images: Normalized images, on the device.
            mask: Their masks, on any device.
        """
        mask = mask.to(self.device)
        with autocast(self.device, self.precision):
            prediction = network(images, mask)
        return self.objective(prediction, images, mask).loss
