"""Parts of a run with images of different sizes: small ones first, which cost less."""

from dataclasses import replace
from typing import NamedTuple

from pixmim.build import build_crop, build_loss, build_mask_sampler
from pixmim.config import PretrainConfig
from pixmim.losses import ReconstructionLoss
from pixmim.masking import MaskSampler
from pixmim.models.base import MaskedModel
from pixmim.transforms.crops import Crop
from pixmim.utils.errors import UserError
from pixmim.utils.patches import grid_of


class Stage(NamedTuple):
    """A part of a run in which images have one size.

    Attributes:
        end: Step before which it ends.
        size: (h, w) of the images.
        crop: Crop to this size.
        masks: Sampler of masks for this size.
        loss: The loss, whose low-pass has the same cut-off in cycles per pixel at all sizes.
    """

    end: int
    size: tuple[int, int]
    crop: Crop
    masks: MaskSampler
    loss: ReconstructionLoss


def build_stages(config: PretrainConfig, model: MaskedModel, steps: int) -> list[Stage]:
    """Divide a run of `steps` into equally long parts, one for each of the configuration's sizes; the last is `size`.

    Raises:
        UserError: If the model needs one size, or a size does not fit the model, the crop or the mask.
    """
    first = [size for size in config.first_sizes.split(",") if size]
    if first and not model.any_size:
        raise UserError(f"--first-sizes: {config.model.backbone} with simmim works at one size")
    (height, width), radius = config.image_size, config.target.radius
    stages = []
    for number, size in enumerate([*first, config.size], start=1):
        try:
            (h, w), end = replace(config, size=size).image_size, steps * number // (len(first) + 1)
            if number <= len(first) and (h >= height or h * width != w * height):
                raise UserError(f"must be smaller than --size {config.size}, in its proportions")
            target = replace(config.target, radius=radius if isinstance(radius, str) else radius * h / height)
            part = replace(config, size=size, target=target)
            grid_of((h, w), model.patch * config.model.decoder_stride)
            stages.append(Stage(end, (h, w), build_crop(part), build_mask_sampler(part, model.patch), build_loss(part)))
        except (UserError, ValueError) as error:
            raise UserError(f"--first-sizes {size}: {error}" if number <= len(first) else str(error)) from error
    return stages
