"""Draw the attention of the last block of a ViT over images."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from pixmim.config import ModelConfig
from pixmim.data.dataset import ImageDataset
from pixmim.evaluation.attentive_probe import AttentiveProbe, draw_queries
from pixmim.evaluation.visualize import Pixels, heat_overlay, to_pixels, to_rgb
from pixmim.models import features
from pixmim.models.convmae import ConvMAEEncoder
from pixmim.models.feature_maps import class_tokens
from pixmim.report.reconstruct import load_crops
from pixmim.transforms.crops import flip_and_normalize
from pixmim.utils.errors import UserError
from pixmim.weights.detect import Weights
from pixmim.weights.load import build_encoder_with_weights


@torch.no_grad()
def attention_maps(encoder: nn.Module, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b heads rows columns"]:
    """Compute the attention of the last block to each patch, per head; each map sums to one.

    It is the attention of the class token, or without one the average over all patches. Images are normalized. Raises
    UserError if the encoder has no block with global attention (Swin, CNNs).
    """
    if not isinstance(encoder, VisionTransformer | Beit | ConvMAEEncoder):
        raise UserError(f"attention maps need a ViT: {type(encoder).__name__} has no block with global attention")
    blocks: Any = encoder.blocks3 if isinstance(encoder, ConvMAEEncoder) else encoder.blocks
    layer = blocks[-1].attn
    recorded: list[Tensor] = []
    fused, layer.fused_attn = layer.fused_attn, False  # fused attention never computes the weights
    handle = layer.attn_drop.register_forward_pre_hook(lambda _, args: recorded.append(args[0]))
    try:
        grid = features(encoder, images).map.shape[-2:]
    finally:
        handle.remove()
        layer.fused_attn = fused
    weights = recorded[-1]
    prefix = weights.shape[-1] - grid[0] * grid[1]
    tokens = 0 if isinstance(encoder, ConvMAEEncoder) else class_tokens(encoder)
    maps = weights[:, :, slice(tokens) if tokens else slice(prefix, None), prefix:].mean(dim=2)
    return (maps / maps.sum(dim=-1, keepdim=True)).unflatten(2, grid)


def attention_sheet(
    weights: Weights, data: ImageDataset, count: int = 8
) -> tuple[dict[str, Pixels], list[str], list[str]]:
    """Draw the attention over the first `count` images.

    Returns uint8 images (n h w c) by column ("image", "all heads", "head 1" ...), the names of the files, and a line
    for each unreadable image. Raises UserError if the encoder has no attention maps, or no image can be read.
    """
    config, encoder = weights.config, build_encoder_with_weights(weights)
    crops, names, errors = load_crops(config, data, count, range(len(data)))
    return draw_attention(encoder, config, crops), names, errors


@torch.no_grad()
def draw_query_attention(
    encoder: nn.Module, config: ModelConfig, crops: Shaped[Tensor, "b c h w"], probe: AttentiveProbe
) -> dict[str, Pixels]:
    """Draw the attention of an attentive probe's queries over crops of the config's size, by query.

    Raises:
        UserError: If the probe is of another encoder.
    """
    mean, std = (torch.tensor(values) for values in config.normalization)
    patches = features(encoder, flip_and_normalize(crops, None, mean, std)).map
    if patches.shape[1] != probe.queries.shape[1]:
        raise UserError(f"the probe is of tokens {probe.queries.shape[1]} wide, the encoder's are {patches.shape[1]}")
    pixels = np.stack([to_rgb(crop, config) for crop in crops])
    return draw_queries(probe, patches.flatten(2).transpose(1, 2), (patches.shape[2], patches.shape[3]), pixels)


def draw_attention(encoder: nn.Module, config: ModelConfig, crops: Shaped[Tensor, "b c h w"]) -> dict[str, Pixels]:
    """Draw the attention over crops of the config's size: uint8 images (n h w c) by column, as `attention_sheet`."""
    mean, std = (torch.tensor(values) for values in config.normalization)
    images = flip_and_normalize(crops, None, mean, std)
    maps = F.interpolate(attention_maps(encoder, images), size=config.image_size, mode="bilinear")
    pixels = to_pixels({"image": images * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)}, config)["image"]
    pixels = np.broadcast_to(pixels, (*pixels.shape[:3], 3))
    columns = {"image": pixels, "all heads": heat_overlay(pixels, maps.mean(dim=1))}
    return columns | {f"head {i + 1}": heat_overlay(pixels, maps[:, i]) for i in range(maps.shape[1])}
