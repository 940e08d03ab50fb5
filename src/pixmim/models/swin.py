"""Driving a timm SwinTransformer from outside, with a learnt token in place of each hidden patch."""

import torch
from jaxtyping import Bool, Float
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor

from pixmim.models.base import Features


def encode_replaced(
    encoder: SwinTransformer,
    images: Float[Tensor, "b c h w"],
    hidden: Bool[Tensor, "b n"],
    mask_token: Float[Tensor, "1 1 d"],
) -> Float[Tensor, "b width rows columns"]:
    """The final map, at the encoder's total stride. The token replaces patches after the patch embedding's norm."""
    x = encoder.patch_embed(images)
    place = hidden.view(*x.shape[:3], 1)
    x = torch.where(place, mask_token.to(x.dtype).unsqueeze(1), x)
    return encoder.norm(encoder.layers(x)).permute(0, 3, 1, 2)


def features(encoder: SwinTransformer, images: Float[Tensor, "b c h w"]) -> Features:
    """What a finished Swin says of whole images; its global vector is the mean of the final map."""
    last = encoder.forward_features(images).permute(0, 3, 1, 2)
    mean = last.mean(dim=(2, 3))
    return Features(mean[:, None], mean, last)
