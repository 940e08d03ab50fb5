"""Where the last block of a ViT looks: its attention, drawn over the pictures."""

import os
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from pixmim.data.dataset import BadImage, ImageDataset
from pixmim.evaluation.visualize import Pixels, to_pixels
from pixmim.models import features
from pixmim.models.convmae import ConvMAEEncoder
from pixmim.transforms.crops import CenterCrop, flip_and_normalize, stack_images
from pixmim.utils.errors import UserError
from pixmim.utils.plotting import matplotlib
from pixmim.weights.detect import Weights
from pixmim.weights.load import build_encoder_with_weights


@torch.no_grad()
def attention_maps(encoder: nn.Module, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b heads rows columns"]:
    """How much of the last block's attention each patch gets, for each head; every map sums to one over the patches.

    With a class token it is what that token gives to the patches; without one, what all patches give on average.
    Raises UserError for an encoder whose last block does not look at the whole image (Swin) or has no attention.
    """
    if not isinstance(encoder, VisionTransformer | Beit | ConvMAEEncoder):
        raise UserError(f"{type(encoder).__name__} has no block that looks at the whole image: attention is for ViTs")
    blocks: Any = encoder.blocks3 if isinstance(encoder, ConvMAEEncoder) else encoder.blocks
    layer = blocks[-1].attn
    seen: dict[str, Tensor] = {}
    handle = layer.register_forward_pre_hook(lambda _, given: seen.update(tokens=given[0]))
    try:
        grid = features(encoder, images).map.shape[-2:]
    finally:
        handle.remove()
    weights = _weights(encoder, layer, seen["tokens"])
    patches = grid[0] * grid[1]
    prefix = weights.shape[-1] - patches
    has_token = getattr(encoder, "cls_token", None) is not None
    given = weights[:, :, 0, prefix:] if has_token else weights[:, :, prefix:, prefix:].mean(dim=2)
    return (given / given.sum(dim=-1, keepdim=True)).unflatten(2, grid)


def _weights(encoder: nn.Module, layer: Any, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b heads n n"]:
    """softmax(q k / sqrt(d) + bias), which timm's fused attention never shows."""
    bias = layer.qkv.bias
    if getattr(layer, "q_bias", None) is not None:
        bias = torch.cat([layer.q_bias, torch.zeros_like(layer.q_bias), layer.v_bias])
    q, k, _ = F.linear(tokens, layer.qkv.weight, bias).unflatten(2, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    if hasattr(layer, "q_norm"):
        q, k = layer.q_norm(q), layer.k_norm(k)
    products = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if isinstance(encoder, Beit):
        if encoder.rel_pos_bias is not None:
            products = products + encoder.rel_pos_bias()
        if layer.relative_position_bias_table is not None:
            products = products + layer._get_rel_pos_bias()
    return products.softmax(dim=-1)


def attention_sheet(
    weights: Weights, data: ImageDataset, count: int = 8
) -> tuple[dict[str, Pixels], list[str], list[str]]:
    """Pictures by column: the image, the attention of all heads together and of each one, over the first `count`.

    Also gives the names of their files, and what could not be read, a line each. Raises UserError.
    """
    run, encoder = weights.config, build_encoder_with_weights(weights)
    crop, pictures, names, bad = CenterCrop(run.image_size, interpolation=run.interpolation), [], list[str](), []
    for index in range(len(data)):
        try:
            pictures.append(crop.crop(data.image(index)))
            names.append(os.path.basename(data.path_of(index)))
        except BadImage as error:
            bad.append(f"{data.path_of(index)}: {error}")
        if len(pictures) == count:
            break
    if not pictures:
        raise UserError(f"not one image of {data.spec} can be read\n" + "\n".join(bad[:3]))
    mean, std = (torch.tensor(values) for values in run.normalization)
    images = flip_and_normalize(stack_images(pictures), None, mean, std)
    maps = attention_maps(encoder, images)
    maps = F.interpolate(maps, size=run.image_size, mode="bilinear")
    plain = to_pixels({"image": images * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)}, run)["image"]
    plain = np.broadcast_to(plain, (*plain.shape[:3], 3))
    columns = {"image": plain, "all heads": _over(plain, maps.mean(dim=1))}
    return columns | {f"head {i + 1}": _over(plain, maps[:, i]) for i in range(maps.shape[1])}, names, bad


def _over(pictures: Pixels, maps: Float[Tensor, "b h w"]) -> Pixels:
    """Each map from its least (dark) to its greatest value (bright), laid over its picture."""
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    heat = matplotlib.colormaps["inferno"](((maps - low) / (high - low).clamp(min=1e-12)).numpy())[..., :3]
    return np.asarray((0.35 * pictures + 0.65 * 255 * heat).round(), np.uint8)
