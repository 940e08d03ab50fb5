"""MAE (He et al., arXiv 2111.06377): encode the visible patches, decode all patches with a small transformer."""

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from pixmim.masking import Mask
from pixmim.models.base import MaskedModel, freeze_pooling
from pixmim.models.fusion import LevelFusion
from pixmim.models.vit import embed_visible, fix_sincos_positions, gather, init_like_mae, prefix_tokens
from pixmim.utils.errors import UserError
from pixmim.utils.patches import interpolate_positions, scaled_grid, sincos_positions


@dataclass(frozen=True)
class DecoderOptions:
    """Sizes of a decoder; keywords of `create_model`.

    Stride and larger patches are options of LSMAE's code (arXiv 2210.07224): decoder_downsampling, pred_downsampling.

    Args:
        decoder_dim: Width; 512 in MAE's paper.
        decoder_depth: Number of blocks; 8 in MAE's paper.
        decoder_heads: Attention heads; 16 in MAE's paper.
        decoder_stride: n: run the blocks on a grid n times coarser than the encoder's, with n^2 times fewer tokens.
        predict_patch: Side of the predicted patches in pixels: the encoder's times a divisor of n. 0: the encoder's.
        outputs: Numbers per value: 1, or the number of color bins.
    """

    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    decoder_stride: int = 1
    predict_patch: int = 0
    outputs: int = 1

    def patch_ratio(self, patch: int, grid: tuple[int, int]) -> int:
        """Return predicted patch size / encoder patch size. Raises UserError if the sizes are incompatible."""
        dim, stride, (rows, columns) = self.decoder_dim, self.decoder_stride, grid
        if dim % self.decoder_heads or dim % 4:
            raise UserError(f"a decoder of width {dim} is not divisible by its {self.decoder_heads} heads, and by 4")
        if stride < 1 or rows % stride or columns % stride:
            raise UserError(f"a decoder stride of {stride} does not divide the encoder's {rows}x{columns} patches")
        sides = [patch * times for times in range(1, stride + 1) if stride % times == 0]
        if self.predict_patch and self.predict_patch not in sides:
            raise UserError(
                f"patches of {self.predict_patch} pixels cannot be predicted with decoder stride {stride} and encoder "
                f"patches of {patch}: choose {', '.join(map(str, sides))}"
            )
        return (self.predict_patch or patch) // patch


class MAE(MaskedModel):
    """A timm VisionTransformer with MAE's decoder, and what others have made of it: LSMAE, MFF and Pixio.

    With vit_base_patch16_224 and the default decoder it has 111,907,840 parameters, as the official model; LSMAE-base
    at 448 px, with decoder (384, 8, 12), has 101,339,520.

    Args:
        encoder: Any plain timm ViT. Its weights are initialized as MAE's.
        decoder: Sizes of the decoder.
        fused: Give the decoder several blocks' tokens: see `LevelFusion`.
        learned_positions: Learn the positions of encoder and decoder, from normal values of deviation 0.02 on, as Pixio
            (arXiv 2512.15715); otherwise they are fixed to sine-cosine.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        decoder: DecoderOptions,
        fused: bool = False,
        learned_positions: bool = False,
    ) -> None:
        super().__init__()
        self.encoder: VisionTransformer = encoder
        self.patch = encoder.patch_embed.patch_size[0]
        grid, channels = encoder.patch_embed.grid_size, encoder.patch_embed.proj.in_channels
        prepare_encoder(encoder)
        self.decoder = Decoder(encoder.embed_dim, encoder.num_prefix_tokens, grid, self.patch, channels, decoder)
        self.fusion = LevelFusion(encoder.embed_dim, len(encoder.blocks)) if fused else None
        if learned_positions:
            for positions in (cast(nn.Parameter, encoder.pos_embed), self.decoder.pos_embed):
                nn.init.trunc_normal_(positions.requires_grad_(True), std=0.02)

    def forward(self, images: Float[Tensor, "b c h w"], mask: Mask) -> Float[Tensor, "b m d"]:
        self.check_mask(images, mask)
        tokens, blocks = embed_visible(self.encoder, images, mask), self.encoder.blocks
        tokens = blocks(tokens) if self.fusion is None else self.fusion(blocks, tokens)
        return self.decoder(self.encoder.norm(tokens), mask)


def prepare_encoder(encoder: VisionTransformer) -> None:
    """Initialize a ViT as MAE's, with fixed sine-cosine positions, and freeze what no prediction depends on."""
    init_like_mae(encoder)
    fix_sincos_positions(encoder)
    freeze_pooling(encoder)
    for token in prefix_tokens(encoder):
        nn.init.normal_(token, std=0.02)


class Decoder(nn.Module):
    """A transformer over all patches, with one learned mask token for the hidden ones (MAE, section 3).

    With a stride n, a convolution of kernel and stride n merges n x n tokens, mask tokens included. If the predicted
    patches are smaller than that, a transposed convolution splits them again before the final norm. Both keep PyTorch's
    initialization, as in LSMAE, and do not apply to prefix tokens.

    Args:
        width: Width of the encoder's tokens.
        prefix: Number of prefix tokens (class, registers), which pass through the blocks and are dropped at the end.
        grid: (rows, columns) of the encoder's patches.
        patch: Their side in pixels.
        channels: Channels of the images.
        options: Sizes. Blocks are pre-norm with MLP ratio 4 and eps 1e-6.
    """

    def __init__(
        self, width: int, prefix: int, grid: tuple[int, int], patch: int, channels: int, options: DecoderOptions
    ) -> None:
        super().__init__()
        ratio, dim, n = options.patch_ratio(patch, grid), options.decoder_dim, options.decoder_stride
        self.prefix, self.grid, self.coarse = prefix, grid, (grid[0] // n, grid[1] // n)
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.downsample = nn.Conv2d(dim, dim, n, n) if n > 1 else None
        positions = F.pad(sincos_positions(dim, self.coarse), (0, 0, prefix, 0))
        self.pos_embed = nn.Parameter(positions[None], requires_grad=False)
        self.blocks = nn.Sequential(
            *(Block(dim, options.decoder_heads, qkv_bias=True, norm_layer=norm) for _ in range(options.decoder_depth))
        )
        self.upsample = nn.ConvTranspose2d(dim, dim, n // ratio, n // ratio) if n > ratio else None
        self.norm = norm(dim)
        self.predict = nn.Linear(dim, (patch * ratio) ** 2 * channels * options.outputs)
        init_like_mae(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Float[Tensor, "b t width"], mask: Mask) -> Float[Tensor, "b m d"]:
        """Predict all patches from t = prefix + k tokens, those of the k visible patches last."""
        ids_keep, ids_restore = mask.indices
        tokens = self.embed(tokens)
        prefix, visible = tokens[:, : self.prefix], tokens[:, self.prefix :]
        b, n = ids_restore.shape
        mask_tokens = self.mask_token.to(visible.dtype).expand(b, n - ids_keep.shape[1], -1)
        tokens = torch.cat([prefix, gather(torch.cat([visible, mask_tokens], dim=1), ids_restore)], dim=1)
        grid = scaled_grid(self.grid, n)
        tokens = self._on_map(self.downsample, tokens, grid)
        coarse = scaled_grid(self.coarse, tokens.shape[1] - self.prefix)
        tokens = self.blocks(tokens + interpolate_positions(self.pos_embed, self.coarse, coarse))
        tokens = self._on_map(self.upsample, tokens, coarse)
        return self.predict(self.norm(tokens))[:, self.prefix :]

    def _on_map(self, layer: nn.Module | None, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Apply a convolution to the patch tokens on their grid, if there is one."""
        if layer is None:
            return tokens
        prefix, patches = tokens[:, : self.prefix], tokens[:, self.prefix :]
        patches = layer(patches.transpose(1, 2).unflatten(2, grid))
        return torch.cat([prefix, patches.flatten(2).transpose(1, 2)], dim=1)
