"""From an encoder to the maps that a detector looks at: four scales by factors of two, and a fifth thinned out."""

from collections import OrderedDict
from typing import Any, cast

from jaxtyping import Float
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from pixmim.evaluation.detection.window_attention import (
    Grid,
    RelativePositions,
    beit_bias,
    beit_table,
    check_blocks,
    spread,
    through,
)
from pixmim.models.convmae import PATCH, ChannelNorm, ConvMAEEncoder
from pixmim.utils.errors import UserError

Maps = dict[str, Tensor]
"""Maps (b width rows columns) named "0" to "3" and "pool", the finest first, each with half the rows and columns."""

UNUSED = ("norm.", "fc_norm.", "head.", "cls_token", "reg_token")
"""How names begin of what a detector does not use of an encoder."""


class Windowed(nn.Module):
    """What the attention of a ViT's blocks sees of a map: windows, but for some blocks that see all of it.

    Holds the relative positions, and not the blocks.
    """

    def __init__(self, blocks: list[nn.Module], grid: Grid, window: int, whole: int, relative: bool) -> None:
        super().__init__()
        check_blocks(blocks, relative)
        relative = relative and not isinstance(cast(Any, blocks[0]).attn, BeitAttention)  # which has its own
        small = min(window, grid[0]), min(window, grid[1])
        everything = spread(len(blocks), whole)
        self.windows = [grid if i in everything else small for i in range(len(blocks))]
        widths = [cast(Any, block).attn.head_dim if relative else 0 for block in blocks]
        self.positions = nn.ModuleList(
            RelativePositions(seen, width) for seen, width in zip(self.windows, widths, strict=True) if relative
        )

    def forward(
        self, encoder: nn.Module, blocks: list[nn.Module], x: Float[Tensor, "b rows columns d"]
    ) -> Float[Tensor, "b rows columns d"]:
        """The map after all blocks."""
        grid, biases = (x.shape[1], x.shape[2]), dict[tuple[int, Grid], Tensor]()
        for i, block in enumerate(blocks):
            window, bias = self.windows[i], None
            positions = cast(RelativePositions, self.positions[i]) if len(self.positions) else None
            table = beit_table(encoder, block) if isinstance(encoder, Beit) else None
            if table is not None:  # one for all blocks is large for a large map, and made once
                key = id(table), window
                biases[key] = bias = biases[key] if key in biases else beit_bias(table, grid, window)
            x = through(block, x, window, positions, bias)
        return x


class ViTMaps(nn.Module):
    """A VisionTransformer or Beit with ViTDet's simple feature pyramid: every scale is made of the last map."""

    def __init__(self, encoder: VisionTransformer | Beit, width: int, window: int, whole: int, relative: bool) -> None:
        super().__init__()
        self.encoder, self.out_channels = encoder, width
        grid, patch = cast(Grid, encoder.patch_embed.grid_size), int(encoder.patch_embed.patch_size[0])
        self.windowed = Windowed(list(encoder.blocks), grid, window, whole, relative)
        self.strides = _strides(patch)
        d = encoder.embed_dim
        up = [
            nn.ConvTranspose2d(d, d // 2, 2, 2),
            ChannelNorm(d // 2),
            nn.GELU(),
            nn.ConvTranspose2d(d // 2, d // 4, 2, 2),
        ]
        scales: list[tuple[list[nn.Module], int]] = [
            (up, d // 4),
            ([nn.ConvTranspose2d(d, d // 2, 2, 2)], d // 2),
            ([], d),
            ([nn.MaxPool2d(2)], d),
        ]
        self.scales = nn.ModuleList(
            nn.Sequential(
                *steps,
                nn.Conv2d(channels, width, 1, bias=False),
                ChannelNorm(width),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                ChannelNorm(width),
            )
            for steps, channels in scales
        )

    def forward(self, images: Float[Tensor, "b c h w"]) -> Maps:
        encoder: Any = self.encoder
        x = encoder.patch_embed(images)
        if encoder.pos_embed is not None:
            x = x + encoder.pos_embed[:, encoder.pos_embed.shape[1] - x.shape[1] :]
        if isinstance(encoder, VisionTransformer):
            x = encoder.norm_pre(x)
        x = x.unflatten(1, encoder.patch_embed.grid_size)
        x = self.windowed(encoder, list(encoder.blocks), x).permute(0, 3, 1, 2)
        maps = {str(i): scale(x) for i, scale in enumerate(self.scales)}
        return {**maps, "pool": F.max_pool2d(maps["3"], 1, 2)}


class StageMaps(nn.Module):
    """A Swin or ConvMAE with a feature pyramid network over its stages, each normalized first.

    ConvMAE's three stages get a fourth scale by max-pooling, and its third runs in windows as a ViT does.
    """

    def __init__(
        self, encoder: SwinTransformer | ConvMAEEncoder, width: int, window: int, whole: int, relative: bool
    ) -> None:
        super().__init__()
        self.encoder, self.out_channels = encoder, width
        if isinstance(encoder, ConvMAEEncoder):
            self.windowed = Windowed(list(encoder.blocks3), encoder.grid, window, whole, relative)
            widths = list(encoder.embed_dim)
            self.strides = _strides(PATCH)
        else:
            widths = [int(info["num_chs"]) for info in cast(Any, encoder).feature_info]
            self.strides = _strides(4 * int(cast(Any, encoder).patch_embed.patch_size[0]))
            if len(widths) != 4:
                raise UserError(f"detection needs a Swin of 4 stages, and this one has {len(widths)}")
        self.norms = nn.ModuleList(ChannelNorm(channels) for channels in widths)
        channels = widths + widths[-1:] * (4 - len(widths))
        self.pyramid = FeaturePyramidNetwork(channels, width, LastLevelMaxPool(), ChannelNorm)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Maps:
        maps = [norm(stage) for norm, stage in zip(self.norms, self._stages(images), strict=True)]
        if len(maps) == 3:
            maps.append(F.max_pool2d(maps[-1], 2))
        return dict(self.pyramid(OrderedDict((str(i), m) for i, m in enumerate(maps))))

    def _stages(self, images: Float[Tensor, "b c h w"]) -> list[Tensor]:
        encoder = self.encoder
        if isinstance(encoder, ConvMAEEncoder):
            first, second, tokens = encoder.stages(images)
            third = self.windowed(encoder, list(encoder.blocks3), tokens.unflatten(1, encoder.grid))
            return [first, second, third.permute(0, 3, 1, 2)]
        x, found = encoder.patch_embed(images), []
        for stage in cast(Any, encoder.layers):
            x = stage(x)
            found.append(x.permute(0, 3, 1, 2))
        return found


def build_maps(
    encoder: nn.Module, width: int = 256, window: int = 14, whole: int = 4, relative: bool = True
) -> ViTMaps | StageMaps:
    """The encoder with its pyramid: a module that gives Maps, with `.encoder`, `.out_channels` and `.strides`.

    encoder   made for the size of the images
    width     channels of the maps
    window    side in patches of the windows of a ViT's attention
    whole     blocks of a ViT that see the whole map, evenly spread
    relative  add decomposed relative positions to a ViT that has none; they begin at zero

    Raises UserError for an encoder that it cannot drive.
    """
    for name, parameter in encoder.named_parameters():
        if name.startswith(UNUSED):
            parameter.requires_grad_(False)
    if isinstance(encoder, VisionTransformer | Beit):
        return ViTMaps(encoder, width, window, whole, relative)
    if isinstance(encoder, SwinTransformer | ConvMAEEncoder):
        return StageMaps(encoder, width, window, whole, relative)
    raise UserError(f"detection knows ViT, Beit, Swin and ConvMAE, and not {type(encoder).__name__}")


def _strides(patch: int) -> list[int]:
    """Pixels between the places of each map, for patches of `patch` pixels at the third scale. Raises UserError."""
    if patch % 4:
        raise UserError(f"detection needs patches of a multiple of 4 pixels, and this encoder's have {patch}")
    return [patch // 4, patch // 2, patch, 2 * patch, 4 * patch]
