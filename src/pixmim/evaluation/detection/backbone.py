"""Feature pyramids of an encoder for detection, as in ViTDet (arXiv 2203.16527).

Most blocks of a ViT attend in windows. Only the input of the attention is partitioned, after the norm, because the rest
of a block treats each position alone. Windows beyond the map are padded with zeros. Prefix tokens are left out.
"""

from collections import OrderedDict
from typing import Any, cast

import torch
from jaxtyping import Float
from timm.layers.attention import Attention
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer, window_partition, window_reverse
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from pixmim.models.cnn import is_cnn
from pixmim.models.convmae import PATCH, ChannelNorm, ConvMAEEncoder
from pixmim.models.feature_maps import maps
from pixmim.training.parallelize import batch_norms
from pixmim.utils.errors import UserError

Grid = tuple[int, int]
FeatureMap = Float[Tensor, "b rows columns d"]
Pyramid = dict[str, Tensor]
"""Maps (b width rows columns) named "0" to "3" and "pool", finest first, each with half the rows and columns."""

_UNUSED = ("norm.", "fc_norm.", "head.", "cls_token", "reg_token")  # prefixes of parameters that get no gradient


def build_pyramid(
    encoder: nn.Module, width: int = 256, window: int = 14, global_blocks: int = 4, relative_positions: bool = True
) -> "ViTPyramid | StagePyramid":
    """Build a module that returns a Pyramid of a ViT, Beit, Swin, CNN or ConvMAE built for the size of the images.

    It has `.encoder`, `.out_channels` and `.strides`. Of a ViT, all blocks but `global_blocks`, evenly spaced, attend
    in windows of `window` patches a side, and `relative_positions` adds decomposed ones, initialized to zero. Raises
    UserError.
    """
    for name, parameter in encoder.named_parameters():
        if name.startswith(_UNUSED):
            parameter.requires_grad_(False)
    if isinstance(encoder, VisionTransformer | Beit):
        return ViTPyramid(encoder, width, window, global_blocks, relative_positions)
    if isinstance(encoder, SwinTransformer | ConvMAEEncoder) or is_cnn(encoder):
        return StagePyramid(encoder, width, window, global_blocks, relative_positions)
    raise UserError(f"detection supports ViT, Beit, Swin, CNNs and ConvMAE, not {type(encoder).__name__}")


class ViTPyramid(nn.Module):
    """ViTDet's simple feature pyramid: every scale is computed from the last map of a VisionTransformer or Beit."""

    def __init__(
        self, encoder: VisionTransformer | Beit, width: int, window: int, global_blocks: int, relative: bool
    ) -> None:
        super().__init__()
        self.encoder, self.out_channels = encoder, width
        grid, patch = cast(Grid, encoder.patch_embed.grid_size), int(encoder.patch_embed.patch_size[0])
        self.windowed = WindowedBlocks(list(encoder.blocks), grid, window, global_blocks, relative)
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

    def forward(self, images: Float[Tensor, "b c h w"]) -> Pyramid:
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


class StagePyramid(nn.Module):
    """A feature pyramid network over the normalized stages of a Swin, CNN or ConvMAE.

    ConvMAE has three stages; max-pooling adds a fourth. Its last stage attends in windows as a ViT does. Batch norms of
    a CNN keep their statistics, since few images of this size are computed at once; their weights are trained.
    """

    def __init__(self, encoder: nn.Module, width: int, window: int, global_blocks: int, relative: bool) -> None:
        super().__init__()
        self.encoder, self.out_channels = encoder, width
        if isinstance(encoder, ConvMAEEncoder):
            self.windowed = WindowedBlocks(list(encoder.blocks3), encoder.grid, window, global_blocks, relative)
            widths = list(encoder.embed_dim)
            self.strides = _strides(PATCH)
        else:
            info: Any = cast(Any, encoder).feature_info
            widths, strides = ([int(stage[key]) for stage in info[-4:]] for key in ("num_chs", "reduction"))
            if [stride // strides[0] for stride in strides] != [1, 2, 4, 8]:
                raise UserError(
                    f"detection needs 4 stages that each halve the map; this encoder's strides are {strides}"
                )
            self.strides = [*strides, 2 * strides[-1]]
        self.norms = nn.ModuleList(ChannelNorm(channels) for channels in widths)
        channels = widths + widths[-1:] * (4 - len(widths))
        self.pyramid = FeaturePyramidNetwork(channels, width, LastLevelMaxPool(), ChannelNorm)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Pyramid:
        stages = [norm(stage) for norm, stage in zip(self.norms, self._stages(images), strict=True)]
        if len(stages) == 3:
            stages.append(F.max_pool2d(stages[-1], 2))
        return dict(self.pyramid(OrderedDict((str(i), m) for i, m in enumerate(stages))))

    def _stages(self, images: Float[Tensor, "b c h w"]) -> list[Tensor]:
        encoder = self.encoder
        if isinstance(encoder, ConvMAEEncoder):
            first, second, tokens = encoder.stages(images)
            third = self.windowed(encoder, list(encoder.blocks3), tokens.unflatten(1, encoder.grid))
            return [first, second, third.permute(0, 3, 1, 2)]
        return maps(encoder, images)

    def train(self, mode: bool = True) -> "StagePyramid":
        super().train(mode)
        for norm in batch_norms(self.encoder):
            norm.eval()
        return self


def _strides(patch: int) -> list[int]:
    """Return the stride in pixels of each map; that of the third is the patch size. Raises UserError."""
    if patch % 4:
        raise UserError(f"detection needs a patch size that is a multiple of 4 pixels; this encoder's is {patch}")
    return [patch // 4, patch // 2, patch, 2 * patch, 4 * patch]


class WindowedBlocks(nn.Module):
    """Run the blocks of a ViT over a map of `grid`, all but `global_blocks` in windows of `window` patches a side.

    Holds the relative positions, which blocks of a VisionTransformer get if `relative`, but not the blocks.
    """

    def __init__(self, blocks: list[nn.Module], grid: Grid, window: int, global_blocks: int, relative: bool) -> None:
        super().__init__()
        _check_blocks(blocks, relative)
        relative = relative and not isinstance(cast(Any, blocks[0]).attn, BeitAttention)  # Beit has its own
        small, full = (min(window, grid[0]), min(window, grid[1])), evenly_spaced(len(blocks), global_blocks)
        self.windows = [grid if i in full else small for i in range(len(blocks))]
        widths = [cast(Any, block).attn.head_dim if relative else 0 for block in blocks]
        self.positions = nn.ModuleList(
            RelativePositions(window, width) for window, width in zip(self.windows, widths, strict=True) if relative
        )

    def forward(self, encoder: nn.Module, blocks: list[nn.Module], x: FeatureMap) -> FeatureMap:
        grid, biases = (x.shape[1], x.shape[2]), dict[tuple[int, Grid], Tensor]()
        for i, block in enumerate(blocks):
            window, bias = self.windows[i], None
            positions = cast(RelativePositions, self.positions[i]) if len(self.positions) else None
            table = _beit_table(encoder, block) if isinstance(encoder, Beit) else None
            if table is not None:  # a table shared by all blocks is expanded once
                key = id(table), window
                biases[key] = bias = biases[key] if key in biases else beit_bias(table, grid, window)
            x = run_block(block, x, window, positions, bias)
        return x


def evenly_spaced(depth: int, count: int) -> set[int]:
    """Return the last block of each of `count` equal parts of `depth` blocks: 2, 5, 8, 11 for 4 of 12."""
    count = min(count, depth)
    return {round((i + 1) * depth / count) - 1 for i in range(count)}


def run_block(
    block: nn.Module, x: FeatureMap, window: Grid, positions: "RelativePositions | None", bias: Tensor | None
) -> FeatureMap:
    """Run a timm Block of a VisionTransformer or Beit, whose bias is (1 heads n n), with its attention in windows."""
    b: Any = block
    y = attend(b.attn, partition(b.norm1(x), window), positions, bias)
    y = merge(y, window, (x.shape[1], x.shape[2]))
    if isinstance(block, Block):
        x = x + b.drop_path1(b.ls1(y))
        return x + b.drop_path2(b.ls2(b.mlp(b.norm2(x))))
    first, second = (1.0, 1.0) if b.gamma_1 is None else (b.gamma_1, b.gamma_2)
    x = x + b.drop_path1(first * y)
    return x + b.drop_path2(second * b.mlp(b.norm2(x)))


def attend(
    attention: nn.Module, x: FeatureMap, positions: "RelativePositions | None", bias: Tensor | None
) -> FeatureMap:
    """Apply a block's attention to all positions of each map."""
    grid, tokens = (x.shape[1], x.shape[2]), x.flatten(1, 2)
    if positions is None and isinstance(attention, Attention):
        return attention(tokens).unflatten(1, grid)
    a: Any = attention
    if isinstance(attention, BeitAttention):
        biases = None if a.q_bias is None else torch.cat([a.q_bias, a.k_bias, a.v_bias])
        qkv = F.linear(tokens, a.qkv.weight, biases)
    else:
        qkv = a.qkv(tokens)
    q, k, v = qkv.unflatten(2, (3, a.num_heads, -1)).permute(2, 0, 3, 1, 4)
    if positions is not None:
        q, k = a.q_norm(q), a.k_norm(k)
        bias = positions(q, grid)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
    return a.proj_drop(a.proj(out.transpose(1, 2).flatten(2))).unflatten(1, grid)


def partition(x: FeatureMap, window: Grid) -> Float[Tensor, "windows rows2 columns2 d"]:
    """Split maps into windows, padded with zeros at the right and the bottom."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % window[1], 0, -x.shape[1] % window[0]))
    return window_partition(x, window)


def merge(windows: Float[Tensor, "windows rows2 columns2 d"], window: Grid, grid: Grid) -> FeatureMap:
    """Invert `partition` for maps of `grid`."""
    rows, columns = (-(-side // part) * part for side, part in zip(grid, window, strict=True))
    return window_reverse(windows, window, rows, columns)[:, : grid[0], : grid[1]]


class RelativePositions(nn.Module):
    """Decomposed relative positions (MViTv2, arXiv 2112.01526) in an attention over `grid`, initialized to zero.

    Each attention score gains the products of its query with a vector per vertical and one per horizontal distance.
    """

    def __init__(self, grid: Grid, width: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(2 * grid[0] - 1, width))
        self.columns = nn.Parameter(torch.zeros(2 * grid[1] - 1, width))

    def forward(self, q: Float[Tensor, "b heads n width"], grid: Grid) -> Float[Tensor, "b heads n n"]:
        """Return what to add to the scaled products of queries and keys of a map."""
        q = q.unflatten(2, grid)
        down, across = self.rows[_distances(grid[0], grid[0], q)], self.columns[_distances(grid[1], grid[1], q)]
        rows = torch.einsum("bhyxc,ykc->bhyxk", q, down)
        columns = torch.einsum("bhyxc,xkc->bhyxk", q, across)
        return (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)


def _beit_table(encoder: Beit, block: nn.Module) -> Float[Tensor, "entries heads"] | None:
    """Return the table of relative position biases that a block uses, its own or the shared one."""
    own, shared = cast(Any, block).attn.relative_position_bias_table, cast(Any, encoder.rel_pos_bias)
    return own if own is not None else None if shared is None else shared.relative_position_bias_table


def beit_bias(table: Float[Tensor, "entries heads"], grid: Grid, window: Grid) -> Float[Tensor, "1 heads n n"]:
    """Return a Beit's biases in a window, from the table for the full map of `grid`."""
    (rows, columns), (h, w) = grid, window
    table = table[: (2 * rows - 1) * (2 * columns - 1)].unflatten(0, (2 * rows - 1, 2 * columns - 1))
    down, across = _distances(h, rows, table), _distances(w, columns, table)
    bias = table[down[:, None, :, None], across[None, :, None, :]]  # query row, query column, key row, key column
    return bias.flatten(2, 3).flatten(0, 1).permute(2, 0, 1)[None]


def _distances(count: int, limit: int, like: Tensor) -> Tensor:
    """Return the index of each distance between query and key (n n) in a table from 1 - limit to limit - 1."""
    position = torch.arange(count, device=like.device)
    return position[:, None] - position[None, :] + limit - 1


def _check_blocks(blocks: list[nn.Module], relative: bool) -> None:
    """Raise UserError for blocks that `run_block` does not support."""
    for block in blocks:
        attention: Any = getattr(block, "attn", None)
        if isinstance(attention, BeitAttention):
            continue
        if type(block) is not Block or type(attention) is not Attention:
            raise UserError(f"detection supports plain blocks of timm's ViT, Beit or Swin, not {type(block).__name__}")
        if relative and (getattr(attention, "gate", None) or not isinstance(attention.norm, nn.Identity)):
            raise UserError("relative positions need plain attention: add --no-relative-positions")
