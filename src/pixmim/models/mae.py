"""MAE (He et al., arXiv 2111.06377): encode the visible patches, decode all of them with a small transformer."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from pixmim.grid import sincos_positions
from pixmim.masking import Mask
from pixmim.models.base import MaskedModel
from pixmim.models.vit import encode_visible, fix_sincos_positions, gather, init_like_mae, prefix_tokens


class MAE(MaskedModel):
    """A timm VisionTransformer with MAE's decoder; with other masks and a thinner decoder this is LSMAE, too.

    encoder  any plain timm ViT; its positions become MAE's fixed sin-cos table, and its weights are initialised anew
    decoder_dim, decoder_depth, decoder_heads  see `Decoder`

    With vit_base_patch16_224 and (512, 8, 16) this holds 111,907,840 values, as the official model does; LSMAE-base at
    448 px, with (384, 8, 12), holds 101.340 million.
    """

    def __init__(
        self, encoder: VisionTransformer, decoder_dim: int = 512, decoder_depth: int = 8, decoder_heads: int = 16
    ) -> None:
        super().__init__()
        self.encoder: VisionTransformer = encoder
        self.patch = encoder.patch_embed.patch_size[0]
        values = self.patch**2 * encoder.patch_embed.proj.in_channels
        grid, prefix = encoder.patch_embed.grid_size, encoder.num_prefix_tokens
        init_like_mae(encoder)
        fix_sincos_positions(encoder)
        for token in prefix_tokens(encoder):
            nn.init.normal_(token, std=0.02)
        self.decoder = Decoder(encoder.embed_dim, grid, values, prefix, decoder_dim, decoder_depth, decoder_heads)

    def forward(self, images: Float[Tensor, "b c h w"], mask: Mask) -> Float[Tensor, "b n d"]:
        """Predict all patches of normalised images, d = p*p*c in (row, column, channel) order."""
        return self.decoder(encode_visible(self.encoder, images, mask), mask)


class Decoder(nn.Module):
    """A small transformer over all patches, the hidden ones filled with one learnt token; ConvMAE uses it, too.

    width   of the encoder's tokens
    grid    (rows, columns) of patches
    values  to predict for each patch: p*p*c
    prefix  tokens before the patches (cls, registers); they go through the blocks and are dropped at the end
    dim, depth, heads  of the blocks: pre-norm, MLP ratio 4, norms with eps 1e-6; (512, 8, 16) in MAE's paper
    """

    def __init__(
        self, width: int, grid: tuple[int, int], values: int, prefix: int, dim: int, depth: int, heads: int
    ) -> None:
        super().__init__()
        self.prefix = prefix
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        table = F.pad(sincos_positions(dim, grid), (0, 0, prefix, 0))
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.blocks = nn.Sequential(*(Block(dim, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)))
        self.norm = norm(dim)
        self.predict = nn.Linear(dim, values)
        init_like_mae(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Float[Tensor, "b m width"], mask: Mask) -> Float[Tensor, "b n d"]:
        """Predict all patches from the prefix and visible tokens, m = prefix + k."""
        keep, restore = mask.tables
        tokens = self.embed(tokens)
        prefix, visible = tokens[:, : self.prefix], tokens[:, self.prefix :]
        b, n = restore.shape
        blanks = self.mask_token.to(visible.dtype).expand(b, n - keep.shape[1], -1)
        tokens = torch.cat([prefix, gather(torch.cat([visible, blanks], dim=1), restore)], dim=1)
        return self.predict(self.norm(self.blocks(tokens + self.pos_embed)))[:, self.prefix :]
