"""Run a plain timm VisionTransformer or Beit on masked images, from outside: its state_dict stays a timm checkpoint."""

from typing import cast

import torch
from jaxtyping import Bool, Float
from timm.layers.patch_embed import PatchEmbed
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from pixmim.masking import Mask
from pixmim.utils.errors import UserError
from pixmim.utils.patches import interpolate_positions, patchify, proportional_grid, sincos_positions


def check_plain(encoder: nn.Module, name: str) -> VisionTransformer:
    """Return the encoder if it is a plain VisionTransformer with square patches. Raises UserError otherwise."""
    if type(encoder) is not VisionTransformer or type(encoder.patch_embed) is not PatchEmbed:
        raise UserError(f"'{name}' is not a plain VisionTransformer of timm, such as vit_base_patch16_224")
    height, width = encoder.patch_embed.patch_size
    if height != width:
        raise UserError(f"'{name}' has patches of {height}x{width} pixels; pixmim needs square ones")
    return encoder


def fix_sincos_positions(encoder: VisionTransformer) -> None:
    """Set MAE's fixed positions: a parameter without gradient, zero for the prefix tokens."""
    if encoder.pos_embed is None:
        raise UserError("MAE needs a backbone with absolute positions, and this one has none")
    table = sincos_positions(encoder.embed_dim, encoder.patch_embed.grid_size)
    prefix = encoder.pos_embed.shape[1] - table.shape[0]
    encoder.pos_embed.data.copy_(F.pad(table, (0, 0, prefix, 0))[None])
    encoder.pos_embed.requires_grad_(False)


@torch.no_grad()
def init_like_mae(module: nn.Module) -> None:
    """Initialize linear, norm and patch layers as MAE: Xavier-uniform weights, zero biases, unit norms.

    qkv is one matrix, and the patch convolution a matrix (d, c*p*p) whose bias keeps PyTorch's default.
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
    """Return the class and register tokens, each (1 m d), in timm's order. Masks do not apply to them."""
    return [token for token in (encoder.cls_token, encoder.reg_token) if token is not None]


def embed_visible(encoder: VisionTransformer, images: Float[Tensor, "b c h w"], mask: Mask) -> Float[Tensor, "b m d"]:
    """Return the first block's input, prefix tokens and the k visible patches, m = prefix + k (MAE, section 3).

    Equal to dropping hidden tokens after timm's patch embedding. But hidden patches are not embedded: the patch
    convolution is a matrix product with the visible patches.

    At another image size, positions are interpolated.

    Raises:
        ValueError: If the images have another aspect ratio than the encoder's, or the mask has no index tables.
    """
    embed, (ids_keep, _) = encoder.patch_embed, mask.indices
    grid = proportional_grid(images, embed.patch_size[0], embed.grid_size)
    patches = gather(patchify(images, embed.patch_size[0]), ids_keep)
    weight = embed.proj.weight.permute(0, 2, 3, 1).flatten(1)  # channel last, like patchify
    tokens = embed.norm(F.linear(patches, weight, embed.proj.bias))

    positions = interpolate_positions(cast(Tensor, encoder.pos_embed), embed.grid_size, grid)
    positions = positions[:, _positioned_prefix(encoder) :]
    tokens = tokens + gather(positions.expand(len(images), -1, -1), ids_keep)
    return encoder.norm_pre(encoder.pos_drop(_prepend_prefix(encoder, tokens)))


def encode_replaced(
    encoder: VisionTransformer | Beit,
    images: Float[Tensor, "b c h w"],
    hidden: Bool[Tensor, "b n"],
    mask_token: Float[Tensor, "1 1 d"],
) -> Float[Tensor, "b d rows columns"]:
    """Encode all patches, with `mask_token` as the embedding of hidden ones; return the final patch tokens as a map."""
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
            patches = patches + encoder.pos_embed[:, _positioned_prefix(encoder) :]
        tokens = _prepend_prefix(encoder, patches)
        tokens = encoder.norm(encoder.blocks(encoder.norm_pre(tokens)))[:, encoder.num_prefix_tokens :]
    return tokens.transpose(1, 2).unflatten(2, encoder.patch_embed.grid_size)


def _positioned_prefix(encoder: VisionTransformer) -> int:
    """Return the number of prefix tokens that have entries in pos_embed, before those of the patches."""
    return 0 if encoder.no_embed_class else encoder.num_prefix_tokens


def _prepend_prefix(encoder: VisionTransformer, patches: Float[Tensor, "b k d"]) -> Float[Tensor, "b m d"]:
    """Prepend the prefix tokens, with their positions if they have any."""
    prefix = prefix_tokens(encoder)
    if not prefix:
        return patches
    head, positioned = torch.cat(prefix, dim=1), _positioned_prefix(encoder)
    if encoder.pos_embed is not None and positioned:
        head = head + encoder.pos_embed[:, :positioned]
    return torch.cat([head.expand(len(patches), -1, -1).to(patches.dtype), patches], dim=1)


def gather(tokens: Float[Tensor, "b n d"], index: Tensor) -> Float[Tensor, "b k d"]:
    """Select tokens by an index (b k)."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))
