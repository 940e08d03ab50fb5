"""ConvMAE (Gao et al., arXiv 2205.03892): two stages of masked convolutions, then a ViT, with MAE's decoder.

timm has no such encoder. The mask is sampled on the grid of the last stage and upsampled for the first two, where
hidden pixels are set to zero before each depthwise convolution, so that they do not influence visible ones.
"""

from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.layers.norm import LayerNorm2d
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pixmim.masking import Mask
from pixmim.models.base import MaskedModel
from pixmim.models.mae import Decoder, DecoderOptions
from pixmim.models.vit import gather, init_like_mae
from pixmim.utils.patches import hidden_pixels, interpolate_positions, proportional_grid, sincos_positions

PATCH = 16
"""Stride of the last stage, in pixels."""

SIZES: dict[str, dict[str, Any]] = {
    "convmae_base": {"embed_dim": (256, 384, 768), "depth": (2, 2, 11), "num_heads": 12},
    "convmae_tiny": {"embed_dim": (48, 96, 192), "depth": (1, 1, 6), "num_heads": 3},
}
"""The published encoder, and a small one of pixmim."""


ChannelNorm: Any = partial(LayerNorm2d, eps=1e-5)
"""LayerNorm over the channels of a map (b c h w)."""


class StageEmbed(nn.Module):
    """Convolution with stride = kernel, norm, GELU: patch embedding of a stage."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, width, stride, stride)
        self.norm = ChannelNorm(width)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d h2 w2"]:
        return nn.functional.gelu(self.norm(self.proj(x)))


class ConvBlock(nn.Module):
    """Residual block whose 5x5 depthwise convolution is masked."""

    def __init__(self, width: int, ratio: float, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(width), ChannelNorm(width)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.attn = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.mlp = Mlp(width, int(width * ratio), use_conv=True)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b d h w"], visible: Float[Tensor, "b 1 h w"] | None) -> Tensor:
        y = self.conv1(self.norm1(x))
        x = x + self.drop_path(self.conv2(self.attn(y if visible is None else y * visible)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ConvMAEEncoder(nn.Module):
    """Three stages at strides 4, 8 and 16: convolutions, convolutions, ViT blocks. No class token.

    With the defaults it has 84,605,824 parameters.

    Args:
        img_size: Side, or (h, w), in pixels; multiples of 16.
        in_chans: Channels of the images.
        embed_dim: Width of each stage.
        depth: Blocks of each stage.
        num_heads: Attention heads of the third stage.
        mlp_ratio: Hidden width of MLPs / width.
        num_classes: 0: features. Otherwise a classifier: mean of the tokens -> fc_norm -> head.
        drop_path_rate: Stochastic depth of the last block, rising linearly from 0 over all stages.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        embed_dim: tuple[int, int, int] = (256, 384, 768),
        depth: tuple[int, int, int] = (2, 2, 11),
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        num_classes: int = 0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.img_size = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.grid = self.img_size[0] // PATCH, self.img_size[1] // PATCH
        self.in_chans, self.embed_dim, self.num_features = in_chans, embed_dim, embed_dim[2]
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.patch_embed1 = StageEmbed(in_chans, embed_dim[0], 4)
        self.patch_embed2 = StageEmbed(embed_dim[0], embed_dim[1], 2)
        self.patch_embed3 = StageEmbed(embed_dim[1], embed_dim[2], 2)
        self.patch_embed4 = nn.Linear(embed_dim[2], embed_dim[2])
        self.pos_embed = nn.Parameter(sincos_positions(embed_dim[2], self.grid)[None], requires_grad=False)
        drops = torch.linspace(0, drop_path_rate, sum(depth), device="cpu").split(depth)
        self.blocks1 = nn.ModuleList(ConvBlock(embed_dim[0], mlp_ratio, float(drop)) for drop in drops[0])
        self.blocks2 = nn.ModuleList(ConvBlock(embed_dim[1], mlp_ratio, float(drop)) for drop in drops[1])
        self.blocks3 = nn.Sequential(
            *(
                Block(embed_dim[2], num_heads, mlp_ratio, qkv_bias=True, norm_layer=norm, drop_path=float(drop))
                for drop in drops[2]
            )
        )
        self.norm = norm(embed_dim[2]) if num_classes == 0 else nn.Identity()
        self.fc_norm = norm(embed_dim[2]) if num_classes else nn.Identity()
        self.head = nn.Linear(embed_dim[2], num_classes) if num_classes else nn.Identity()

    def stages(
        self, images: Float[Tensor, "b c h w"], hidden: Bool[Tensor, "b n"] | None = None
    ) -> tuple[Tensor, Tensor, Float[Tensor, "b n d"]]:
        """Return the maps of the first two stages, masked where hidden, and all input tokens of the third."""
        grid = proportional_grid(images, PATCH, self.grid)
        visible1, visible2 = (
            None if hidden is None else hidden_pixels(~hidden, n, (n * grid[0], n * grid[1])).to(images.dtype)
            for n in (4, 2)
        )
        first = self.patch_embed1(images)
        for block in self.blocks1:
            first = block(first, visible1)
        second = self.patch_embed2(first)
        for block in self.blocks2:
            second = block(second, visible2)
        tokens = self.patch_embed4(self.patch_embed3(second).flatten(2).transpose(1, 2))
        return first, second, tokens + interpolate_positions(self.pos_embed, self.grid, grid)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
        """Return the mean of the tokens, or logits if the encoder has classes."""
        *_, tokens = self.stages(images)
        return self.head(self.fc_norm(self.norm(self.blocks3(tokens)).mean(dim=1)))


class ConvMAE(MaskedModel):
    """ConvMAE: the first two stages, downsampled to stride 16, are added to the third before decoding.

    115,041,408 parameters with convmae_base.

    Args:
        encoder: Its weights are initialized as MAE's; convolutions other than the third patch embedding keep PyTorch's.
        decoder: Sizes of the decoder.
    """

    def __init__(self, encoder: ConvMAEEncoder, decoder: DecoderOptions) -> None:
        super().__init__()
        self.encoder: ConvMAEEncoder = encoder
        self.patch = PATCH
        first, second, width = encoder.embed_dim
        self.stage1_output_decode = nn.Conv2d(first, width, 4, 4)
        self.stage2_output_decode = nn.Conv2d(second, width, 2, 2)
        init_like_mae(encoder)
        nn.init.xavier_uniform_(encoder.patch_embed3.proj.weight.data.flatten(1))
        self.decoder = Decoder(width, 0, encoder.grid, PATCH, encoder.in_chans, decoder)

    def encode(self, images: Float[Tensor, "b c h w"], mask: Mask) -> Float[Tensor, "b k d"]:
        """Return the visible tokens, summed over the three scales, after the final norm."""
        ids_keep, _ = mask.indices
        first, second, tokens = self.encoder.stages(images, mask.hidden)
        scales = (self.stage1_output_decode(first), self.stage2_output_decode(second))
        finer = [gather(scale.flatten(2).transpose(1, 2), ids_keep) for scale in scales]
        tokens = self.encoder.blocks3(gather(tokens, ids_keep))
        return self.encoder.norm(tokens + finer[0] + finer[1])

    def forward(self, images: Float[Tensor, "b c h w"], mask: Mask) -> Float[Tensor, "b m d"]:
        self.check_mask(images, mask)
        return self.decoder(self.encode(images, mask), mask)
