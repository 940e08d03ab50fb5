"""MAE (He et al., arXiv 2111.06377): encode the visible patches, decode all of them with a small transformer."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from pixmim.masking import Mask
from pixmim.models.base import MaskedModel
from pixmim.models.vit import encode_visible, fix_sincos_positions, gather, init_like_mae, prefix_tokens
from pixmim.utils.errors import UserError
from pixmim.utils.patches import sincos_positions


@dataclass(frozen=True)
class DecoderOptions:
    """How large a decoder is, and what it predicts; the keywords of `create_model`.

    decoder_dim, decoder_depth, decoder_heads  of its blocks; (512, 8, 16) in MAE's paper
    decoder_stride  n: its blocks run on a grid n times coarser than the encoder's, so on n^2 times fewer tokens
    predict_patch   side of the predicted patches in pixels, 0 for the encoder's; the encoder's times a divisor of n
    outputs         numbers for each value of a patch, last in their order: 1, or the bins of ColorBins

    Stride and patch are options of LSMAE's code (arXiv 2210.07224), there decoder_downsampling and pred_downsampling.
    """

    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    decoder_stride: int = 1
    predict_patch: int = 0
    outputs: int = 1

    def coarser(self, patch: int, grid: tuple[int, int]) -> int:
        """How many times the side of the encoder's `patch` a predicted one has. Raises UserError where sizes clash."""
        dim, stride, (rows, columns) = self.decoder_dim, self.decoder_stride, grid
        if dim % self.decoder_heads or dim % 4:
            raise UserError(f"a decoder of width {dim} does not divide into {self.decoder_heads} heads (and by 4)")
        if stride < 1 or rows % stride or columns % stride:
            raise UserError(f"a decoder stride of {stride} does not divide the encoder's {rows}x{columns} patches")
        sides = [patch * times for times in range(1, stride + 1) if stride % times == 0]
        if self.predict_patch and self.predict_patch not in sides:
            raise UserError(
                f"patches of {self.predict_patch} pixels cannot be predicted with a decoder stride of {stride} over "
                f"patches of {patch}: this stride goes with {', '.join(map(str, sides))}"
            )
        return (self.predict_patch or patch) // patch


class MAE(MaskedModel):
    """A timm VisionTransformer with MAE's decoder; with other masks and a thinner decoder this is LSMAE, too.

    encoder  any plain timm ViT; its positions become MAE's fixed sin-cos table, and its weights are initialized anew

    With vit_base_patch16_224 and (512, 8, 16) this holds 111,907,840 values, as the official model does; LSMAE-base at
    448 px, with (384, 8, 12), holds 101.340 million.
    """

    def __init__(self, encoder: VisionTransformer, decoder: DecoderOptions) -> None:
        super().__init__()
        self.encoder: VisionTransformer = encoder
        self.patch = encoder.patch_embed.patch_size[0]
        grid, channels = encoder.patch_embed.grid_size, encoder.patch_embed.proj.in_channels
        init_like_mae(encoder)
        fix_sincos_positions(encoder)
        for token in prefix_tokens(encoder):
            nn.init.normal_(token, std=0.02)
        self.decoder = Decoder(encoder.embed_dim, encoder.num_prefix_tokens, grid, self.patch, channels, decoder)

    def forward(self, images: Float[Tensor, "b c h w"], mask: Mask) -> Float[Tensor, "b m d"]:
        """Predict all patches of normalized images, d = p*p*c*outputs in (row, column, channel, output) order."""
        self.check_mask(images, mask)
        return self.decoder(encode_visible(self.encoder, images, mask), mask)


class Decoder(nn.Module):
    """A small transformer over all patches, the hidden ones filled with one learnt token; ConvMAE uses it, too.

    width     of the encoder's tokens
    prefix    tokens before the patches (cls, registers); they go through the blocks and are dropped at the end
    grid      (rows, columns) of the encoder's patches
    patch     their side in pixels
    channels  of the images
    options   sizes; the blocks are pre-norm with MLP ratio 4, norms have eps 1e-6

    With a stride n, a convolution of kernel and stride n makes n x n tokens into one once the hidden ones are filled
    in; where the predicted patches are finer than that, a transposed one takes the blocks' output apart again. Both
    keep PyTorch's initialization, as LSMAE's do, and prefix tokens pass them by.
    """

    def __init__(
        self, width: int, prefix: int, grid: tuple[int, int], patch: int, channels: int, options: DecoderOptions
    ) -> None:
        super().__init__()
        coarser, dim, n = options.coarser(patch, grid), options.decoder_dim, options.decoder_stride
        self.prefix, self.grid, self.coarse = prefix, grid, (grid[0] // n, grid[1] // n)
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.downsample = nn.Conv2d(dim, dim, n, n) if n > 1 else None
        table = F.pad(sincos_positions(dim, self.coarse), (0, 0, prefix, 0))
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)
        blocks = [
            Block(dim, options.decoder_heads, qkv_bias=True, norm_layer=norm) for _ in range(options.decoder_depth)
        ]
        self.blocks = nn.Sequential(*blocks)
        self.upsample = nn.ConvTranspose2d(dim, dim, n // coarser, n // coarser) if n > coarser else None
        self.norm = norm(dim)
        self.predict = nn.Linear(dim, (patch * coarser) ** 2 * channels * options.outputs)
        init_like_mae(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Float[Tensor, "b t width"], mask: Mask) -> Float[Tensor, "b m d"]:
        """Predict all patches from the prefix and visible tokens, t = prefix + k."""
        keep, restore = mask.indices
        tokens = self.embed(tokens)
        prefix, visible = tokens[:, : self.prefix], tokens[:, self.prefix :]
        b, n = restore.shape
        blanks = self.mask_token.to(visible.dtype).expand(b, n - keep.shape[1], -1)
        tokens = torch.cat([prefix, gather(torch.cat([visible, blanks], dim=1), restore)], dim=1)
        tokens = self.blocks(self._on_map(self.downsample, tokens, self.grid) + self.pos_embed)
        tokens = self._on_map(self.upsample, tokens, self.coarse)
        return self.predict(self.norm(tokens))[:, self.prefix :]

    def _on_map(self, layer: nn.Module | None, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (b t d) after a layer of maps, if there is one, has seen the patches on their grid."""
        if layer is None:
            return tokens
        prefix, patches = tokens[:, : self.prefix], tokens[:, self.prefix :]
        seen = layer(patches.transpose(1, 2).unflatten(2, grid))
        return torch.cat([prefix, seen.flatten(2).transpose(1, 2)], dim=1)
