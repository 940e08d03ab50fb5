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
from pixmim.models.vit import encode_visible, fix_sincos_positions, gather, init_like_mae


class MAE(MaskedModel):
    """A timm VisionTransformer with MAE's decoder.

    encoder  any plain timm ViT; its positions become MAE's fixed sin-cos table, and its weights are initialised anew
    decoder  `decoder_depth` pre-norm blocks of `decoder_dim` values and `decoder_heads` heads; MLP ratio 4, norms
             with eps 1e-6; the prefix tokens (cls, registers) go through it and are dropped at the end.
             (512, 8, 16 in the paper.)

    With vit_base_patch16_224 this holds 111,907,840 values, as the official model does.
    """

    def __init__(
        self, encoder: VisionTransformer, decoder_dim: int = 512, decoder_depth: int = 8, decoder_heads: int = 16
    ) -> None:
        super().__init__()
        self.encoder: VisionTransformer = encoder
        self.patch = encoder.patch_embed.patch_size[0]
        self.prefix: int = encoder.num_prefix_tokens
        channels = encoder.patch_embed.proj.in_channels
        norm: Any = partial(nn.LayerNorm, eps=1e-6)

        self.decoder_embed = nn.Linear(encoder.embed_dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        table = sincos_positions(decoder_dim, encoder.patch_embed.grid_size)
        self.decoder_pos_embed = nn.Parameter(F.pad(table, (0, 0, self.prefix, 0))[None], requires_grad=False)
        self.decoder_blocks = nn.Sequential(
            *(Block(decoder_dim, decoder_heads, qkv_bias=True, norm_layer=norm) for _ in range(decoder_depth))
        )
        self.decoder_norm = norm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, self.patch**2 * channels)

        init_like_mae(self)
        fix_sincos_positions(encoder)
        for token in (encoder.cls_token, encoder.reg_token, self.mask_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)

    def forward(self, images: Float[Tensor, "b c h w"], mask: Mask) -> Float[Tensor, "b n d"]:
        """Predict all patches of normalised images, d = p*p*c in (row, column, channel) order."""
        tokens = self.decoder_embed(encode_visible(self.encoder, images, mask))
        prefix, visible = tokens[:, : self.prefix], tokens[:, self.prefix :]
        b, n = mask.hidden.shape
        blanks = self.mask_token.to(visible.dtype).expand(b, n - visible.shape[1], -1)
        tokens = torch.cat([prefix, gather(torch.cat([visible, blanks], dim=1), mask.restore)], dim=1)
        tokens = self.decoder_blocks(tokens + self.decoder_pos_embed)
        return self.decoder_pred(self.decoder_norm(tokens))[:, self.prefix :]
