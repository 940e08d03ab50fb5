"""Driving a plain timm VisionTransformer from outside, so that its state_dict stays a timm checkpoint."""

from typing import Any, cast

import timm
import torch
from jaxtyping import Float
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from pixmim.errors import UserError, nearest
from pixmim.grid import patchify, sincos_positions
from pixmim.masking import Mask
from pixmim.models.base import Features


def create_vit(backbone: str, **options: Any) -> VisionTransformer:
    """A plain timm ViT without a head. `options` are timm's own keywords (img_size, in_chans, embed_dim, depth ...).

    Raises UserError if timm has no such model, it is not a plain VisionTransformer, or it takes no such option.
    """
    if not timm.is_model(backbone):
        known = timm.list_models("vit_*")
        raise UserError(f"timm has no model '{backbone}'{nearest(backbone, known)}")
    try:
        encoder = timm.create_model(backbone, pretrained=False, num_classes=0, **options)
    except TypeError as error:
        raise UserError(f"timm's {backbone} refuses an option: {error}") from error
    if type(encoder) is not VisionTransformer or type(encoder.patch_embed) is not PatchEmbed:
        raise UserError(
            f"'{backbone}' is not a plain VisionTransformer of timm's, which MAE needs: try vit_base_patch16_224"
        )
    down, across = encoder.patch_embed.patch_size
    if down != across:
        raise UserError(f"'{backbone}' has patches of {down}x{across} pixels; pixmim needs square ones")
    size = encoder.patch_embed.img_size
    if size[0] % down or size[1] % across:
        raise UserError(
            f"an image of {size[0]}x{size[1]} pixels does not divide into the {down}x{across} patches of '{backbone}': "
            f"choose multiples of {down}"
        )
    return encoder


def fix_sincos_positions(encoder: VisionTransformer) -> None:
    """Give the encoder MAE's fixed position table: a parameter without gradient, zero for the prefix tokens."""
    if encoder.pos_embed is None:
        raise UserError("MAE needs a backbone with a table of absolute positions, and this one has none")
    width, grid = encoder.embed_dim, encoder.patch_embed.grid_size
    table = sincos_positions(width, grid)
    prefix = encoder.pos_embed.shape[1] - table.shape[0]
    encoder.pos_embed.data.copy_(F.pad(table, (0, 0, prefix, 0))[None])
    encoder.pos_embed.requires_grad_(False)


@torch.no_grad()
def init_like_mae(module: nn.Module) -> None:
    """MAE's initialisation of linear, norm and patch layers: Xavier-uniform weights, zero biases, unit norms.

    qkv counts as one matrix, the patch convolution as a matrix (d, c*p*p) whose bias keeps PyTorch's default.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, PatchEmbed):
            nn.init.xavier_uniform_(layer.proj.weight.view(layer.proj.weight.shape[0], -1))


def prefix_tokens(encoder: VisionTransformer) -> list[Tensor]:
    """The encoder's cls and register tokens, each (1 m d), in timm's order. A mask never touches them."""
    return [token for token in (encoder.cls_token, encoder.reg_token) if token is not None]


def encode_visible(encoder: VisionTransformer, images: Float[Tensor, "b c h w"], mask: Mask) -> Float[Tensor, "b m d"]:
    """Run the encoder on its prefix tokens and the visible patches only; m = prefix + k tokens, after the final norm.

    Equal to dropping the hidden tokens after timm's own embedding, but hidden patches are never embedded: the patch
    convolution is a matrix product with patches, and that is done after the choice.
    """
    embed = encoder.patch_embed
    patch = embed.patch_size[0]
    if images.shape[-2:] != embed.img_size:
        raise ValueError(
            f"images of {tuple(images.shape[-2:])} pixels, but the model was made for {tuple(embed.img_size)}"
        )
    patches = gather(patchify(images, patch), mask.keep)
    weight = embed.proj.weight.permute(0, 2, 3, 1).flatten(1)  # channel last, as patchify lays values out
    tokens = embed.norm(F.linear(patches, weight, embed.proj.bias))

    prefix = prefix_tokens(encoder)
    positions = cast(Tensor, encoder.pos_embed)
    skipped = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
    tokens = tokens + gather(positions[:, skipped:].expand(len(images), -1, -1), mask.keep)
    if prefix:
        head = torch.cat(prefix, dim=1)
        head = head + positions[:, :skipped] if skipped else head
        tokens = torch.cat([head.expand(len(images), -1, -1).to(tokens.dtype), tokens], dim=1)
    return encoder.norm(encoder.blocks(encoder.norm_pre(encoder.pos_drop(tokens))))


def gather(tokens: Float[Tensor, "b n d"], index: Tensor) -> Float[Tensor, "b k d"]:
    """Choose tokens by an index (b k)."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


def features(encoder: VisionTransformer, images: Float[Tensor, "b c h w"], blocks: int = 1) -> Features:
    """What a finished ViT says of whole images, from its last `blocks` blocks, each through the final norm."""
    found = encoder.forward_intermediates(
        images, indices=min(blocks, len(encoder.blocks)), return_prefix_tokens=True, norm=True, intermediates_only=True
    )
    pairs = cast(list[tuple[Tensor, Tensor]], found)
    maps = [tokens for tokens, _ in pairs]
    means = [tokens.mean(dim=(2, 3)) for tokens in maps]
    vectors = [prefix[:, 0] for _, prefix in pairs] if encoder.has_class_token else means
    return Features(torch.stack(vectors, dim=1), means[-1], maps[-1])
