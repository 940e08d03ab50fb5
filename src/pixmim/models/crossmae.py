"""CrossMAE (Fu et al., arXiv 2401.14391): hidden patches read the visible ones, each on its own."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from pixmim.masking import Mask
from pixmim.models.base import MaskedModel
from pixmim.models.mae import DecoderOptions, prepare_encoder
from pixmim.models.vit import embed_visible, gather, init_like_mae
from pixmim.utils.errors import UserError
from pixmim.utils.patches import interpolate_positions, scaled_grid, sincos_positions
from pixmim.utils.ranks import inverse


class CrossMAE(MaskedModel):
    """A timm VisionTransformer and a decoder of cross-attention alone.

    Each block of the decoder reads a learned mix of the encoder's input and of the outputs of all its blocks. So the
    encoder's final norm takes no part, and stays as initialized. With vit_base_patch16_224 and 12 decoder blocks it has
    127,287,964 parameters, of which 1,536 are that norm's.

    In training, only hidden patches are predicted, and the others are zero: no patch depends on another's prediction.

    Args:
        encoder: Any plain timm ViT. Its weights are initialized as MAE's.
        decoder: Sizes of the decoder. In the paper: width 512, 12 blocks, 16 heads.

    Raises:
        UserError: If the decoder has a stride or larger patches.
    """

    def __init__(self, encoder: VisionTransformer, decoder: DecoderOptions) -> None:
        super().__init__()
        self.encoder: VisionTransformer = encoder
        self.patch = encoder.patch_embed.patch_size[0]
        if decoder.decoder_stride != 1 or decoder.predict_patch not in (0, self.patch):
            raise UserError("CrossMAE predicts single patches: leave out the decoder's stride and predict_patch")
        prepare_encoder(encoder)
        encoder.norm.requires_grad_(False)
        self.decoder = CrossDecoder(encoder, decoder)

    def forward(self, images: Float[Tensor, "b c h w"], mask: Mask) -> Float[Tensor, "b n d"]:
        self.check_mask(images, mask)
        levels = [embed_visible(self.encoder, images, mask)]
        for block in self.encoder.blocks:
            levels.append(block(levels[-1]))
        return self.decoder(torch.stack(levels, dim=-1), mask)


class CrossDecoder(nn.Module):
    """Blocks that attend from mask tokens with positions to mixes of the encoder's tokens (CrossMAE, section 3.3).

    Args:
        encoder: The encoder.
        options: Sizes.
    """

    def __init__(self, encoder: VisionTransformer, options: DecoderOptions) -> None:
        super().__init__()
        grid, channels = encoder.patch_embed.grid_size, encoder.patch_embed.proj.in_channels
        patch, dim = encoder.patch_embed.patch_size[0], options.decoder_dim
        options.patch_ratio(patch, grid)
        self.prefix, self.grid = encoder.num_prefix_tokens, grid
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        positions = F.pad(sincos_positions(dim, grid), (0, 0, self.prefix, 0))  # as in the released files
        self.pos_embed = nn.Parameter(positions[None], requires_grad=False)
        self.mix = nn.Linear(1 + len(encoder.blocks), options.decoder_depth, bias=False)
        self.blocks = nn.ModuleList(
            CrossBlock(encoder.embed_dim, dim, options.decoder_heads) for _ in range(options.decoder_depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.predict = nn.Linear(dim, patch**2 * channels * options.outputs)
        init_like_mae(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, levels: Float[Tensor, "b t width l"], mask: Mask) -> Float[Tensor, "b n d"]:
        """Predict patches from the tokens of l levels: hidden patches in training, otherwise all."""
        ids_keep, ids_restore = mask.indices
        visible = ids_keep.shape[1] if self.training else 0
        grid = scaled_grid(self.grid, ids_restore.shape[1])
        positions = interpolate_positions(self.pos_embed[:, self.prefix :], self.grid, grid)
        positions = positions.expand(len(levels), -1, -1)
        if visible:
            positions = gather(positions, inverse(ids_restore)[:, visible:])
        x = self.mask_token + positions
        for block, context in zip(self.blocks, self.mix(levels).unbind(dim=-1), strict=True):
            x = block(x, context)
        prediction = self.predict(self.norm(x))
        if not visible:
            return prediction
        zeros = prediction.new_zeros(len(levels), visible, prediction.shape[-1])
        return gather(torch.cat([zeros, prediction], dim=1), ids_restore)


class CrossBlock(nn.Module):
    """A pre-norm block of cross-attention and MLP, without self-attention.

    Args:
        width: Width of the encoder's tokens, which are normalized too.
        dim: Width of the decoder.
        heads: Attention heads.
    """

    def __init__(self, width: int, dim: int, heads: int) -> None:
        super().__init__()
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.heads = heads
        self.context_norm, self.norm1, self.norm2 = norm(width), norm(dim), norm(dim)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(width, 2 * dim), nn.Linear(dim, dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Float[Tensor, "b q dim"], context: Float[Tensor, "b t width"]) -> Float[Tensor, "b q dim"]:
        keys, values = self.kv(self.context_norm(context)).chunk(2, dim=-1)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (self.q(self.norm1(x)), keys, values))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))
