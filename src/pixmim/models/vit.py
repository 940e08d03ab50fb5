"""Driving a plain timm VisionTransformer (or Beit) from outside, so that its state_dict stays a timm checkpoint."""

from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from timm.layers.patch_embed import PatchEmbed
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from pixmim.masking import Mask
from pixmim.models.base import Features
from pixmim.utils.errors import UserError
from pixmim.utils.patches import patchify, sincos_positions

_PLAIN = "vit_base_patch16_224"


def check_plain(encoder: nn.Module, name: str) -> VisionTransformer:
    """The encoder, if MAE can drive it: a plain VisionTransformer with square patches. Raises UserError otherwise."""
    if type(encoder) is not VisionTransformer or type(encoder.patch_embed) is not PatchEmbed:
        raise UserError(f"'{name}' is not a plain VisionTransformer of timm's, which this method needs: try {_PLAIN}")
    down, across = encoder.patch_embed.patch_size
    if down != across:
        raise UserError(f"'{name}' has patches of {down}x{across} pixels; pixmim needs square ones")
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
    """MAE's initialization of linear, norm and patch layers: Xavier-uniform weights, zero biases, unit norms.

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
    keep, _ = mask.indices
    patches = gather(patchify(images, patch), keep)
    weight = embed.proj.weight.permute(0, 2, 3, 1).flatten(1)  # channel last, as patchify lays values out
    tokens = embed.norm(F.linear(patches, weight, embed.proj.bias))

    positions = cast(Tensor, encoder.pos_embed)[:, _placed_prefix(encoder) :]
    tokens = tokens + gather(positions.expand(len(images), -1, -1), keep)
    return encoder.norm(encoder.blocks(encoder.norm_pre(encoder.pos_drop(_prepend_prefix(encoder, tokens)))))


def encode_replaced(
    encoder: VisionTransformer | Beit,
    images: Float[Tensor, "b c h w"],
    hidden: Bool[Tensor, "b n"],
    mask_token: Float[Tensor, "1 1 d"],
) -> Float[Tensor, "b d rows columns"]:
    """The final patch tokens as a map, with `mask_token` in place of each hidden patch's embedding."""
    patches = encoder.patch_embed(images)
    patches = torch.where(hidden[..., None], mask_token.to(patches.dtype), patches)
    if isinstance(encoder, Beit):
        tokens = torch.cat([encoder.cls_token.expand(len(images), -1, -1).to(patches.dtype), patches], dim=1)
        tokens = tokens if encoder.pos_embed is None else tokens + encoder.pos_embed
        bias = encoder.rel_pos_bias() if encoder.rel_pos_bias is not None else None
        for block in encoder.blocks:
            tokens = block(tokens, shared_rel_pos_bias=bias)
        tokens = encoder.norm(tokens)[:, 1:]
    else:
        if encoder.pos_embed is not None:
            patches = patches + encoder.pos_embed[:, _placed_prefix(encoder) :]
        tokens = _prepend_prefix(encoder, patches)
        tokens = encoder.norm(encoder.blocks(encoder.norm_pre(tokens)))[:, encoder.num_prefix_tokens :]
    return tokens.transpose(1, 2).unflatten(2, encoder.patch_embed.grid_size)


def _placed_prefix(encoder: VisionTransformer) -> int:
    """How many prefix tokens have places of their own in the table of positions, ahead of the patches'."""
    return 0 if encoder.no_embed_class else encoder.num_prefix_tokens


def _prepend_prefix(encoder: VisionTransformer, patches: Float[Tensor, "b k d"]) -> Float[Tensor, "b m d"]:
    """The prefix tokens, with their positions where they have any, ahead of the patches."""
    prefix = prefix_tokens(encoder)
    if not prefix:
        return patches
    head, placed = torch.cat(prefix, dim=1), _placed_prefix(encoder)
    if encoder.pos_embed is not None and placed:
        head = head + encoder.pos_embed[:, :placed]
    return torch.cat([head.expand(len(patches), -1, -1).to(patches.dtype), patches], dim=1)


def gather(tokens: Float[Tensor, "b n d"], index: Tensor) -> Float[Tensor, "b k d"]:
    """Choose tokens by an index (b k)."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


def features(encoder: VisionTransformer | Beit, images: Float[Tensor, "b c h w"], blocks: int = 1) -> Features:
    """What a finished ViT says of whole images, from its last `blocks` blocks, each through the final norm."""
    found: Any = encoder.forward_intermediates(
        images, indices=min(blocks, len(encoder.blocks)), return_prefix_tokens=True, norm=True, intermediates_only=True
    )
    # timm gives pairs (map, prefix tokens), or maps alone where there are no prefix tokens.
    maps: list[Tensor] = [item[0] if isinstance(item, tuple) else item for item in found]
    means = [tokens.mean(dim=(2, 3)) for tokens in maps]
    vectors = [item[1][:, 0] for item in found] if encoder.cls_token is not None else means
    return Features(torch.stack(vectors, dim=1), means[-1], maps[-1])
