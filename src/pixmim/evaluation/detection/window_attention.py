"""Running the blocks of a ViT over a map in windows, as ViTDet does (arXiv 2203.16527), driven from outside.

Everything in a block but the attention treats each place alone, so only the attention's input is cut into windows.
Windows that reach beyond the map are filled with zeros after the norm. Prefix tokens are left out.
"""

from typing import Any, cast

import torch
from jaxtyping import Float
from timm.layers.attention import Attention
from timm.models.beit import Attention as BeitAttention
from timm.models.beit import Beit
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from pixmim.utils.errors import UserError

Grid = tuple[int, int]
Map = Float[Tensor, "b rows columns d"]


class RelativePositions(nn.Module):
    """Decomposed relative positions (MViTv2, arXiv 2112.01526): to each attention score, the query's products with a
    vector for the distance in rows and one for that in columns. They begin at zero, where they change nothing.

    grid   (rows, columns) that the attention sees
    width  of a head
    """

    def __init__(self, grid: Grid, width: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(2 * grid[0] - 1, width))
        self.columns = nn.Parameter(torch.zeros(2 * grid[1] - 1, width))

    def forward(self, q: Float[Tensor, "b heads n width"], grid: Grid) -> Float[Tensor, "b heads n n"]:
        """What is added to the scaled products of queries and keys of a map."""
        q = q.unflatten(2, grid)
        down, across = self.rows[_distances(grid[0], grid[0], q)], self.columns[_distances(grid[1], grid[1], q)]
        rows = torch.einsum("bhyxc,ykc->bhyxk", q, down)
        columns = torch.einsum("bhyxc,xkc->bhyxk", q, across)
        return (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)


def through(block: nn.Module, x: Map, window: Grid, positions: RelativePositions | None, bias: Tensor | None) -> Map:
    """A timm Block of a VisionTransformer or Beit, its attention in windows; a window as large as the map is global.

    positions  for the window; None: without
    bias       a Beit's biases in the window (1 heads n n); None: without
    """
    b: Any = block
    y = attend(b.attn, cut(b.norm1(x), window), positions, bias)
    y = join(y, window, (x.shape[1], x.shape[2]))
    if isinstance(block, Block):
        x = x + b.drop_path1(b.ls1(y))
        return x + b.drop_path2(b.ls2(b.mlp(b.norm2(x))))
    first, second = (1.0, 1.0) if b.gamma_1 is None else (b.gamma_1, b.gamma_2)
    x = x + b.drop_path1(first * y)
    return x + b.drop_path2(second * b.mlp(b.norm2(x)))


def attend(attention: nn.Module, x: Map, positions: RelativePositions | None, bias: Tensor | None) -> Map:
    """Attention over all places of each map."""
    grid, tokens = (x.shape[1], x.shape[2]), x.flatten(1, 2)
    if positions is None and isinstance(attention, Attention):
        return attention(tokens).unflatten(1, grid)
    a: Any = attention
    if isinstance(attention, BeitAttention):
        biased = None if a.q_bias is None else torch.cat([a.q_bias, a.k_bias, a.v_bias])
        qkv = F.linear(tokens, a.qkv.weight, biased)
    else:
        qkv = a.qkv(tokens)
    q, k, v = qkv.unflatten(2, (3, a.num_heads, -1)).permute(2, 0, 3, 1, 4)
    if positions is not None:
        q, k = a.q_norm(q), a.k_norm(k)
        bias = positions(q, grid)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
    return a.proj_drop(a.proj(mixed.transpose(1, 2).flatten(2))).unflatten(1, grid)


def cut(x: Map, window: Grid) -> Float[Tensor, "b2 rows2 columns2 d"]:
    """The windows of maps, row by row, one after another; filled with zeros on the right and below."""
    (h, w), (rows, columns) = window, x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -columns % w, 0, -rows % h))
    return x.unflatten(1, (-1, h)).unflatten(3, (-1, w)).transpose(2, 3).flatten(0, 2)


def join(windows: Float[Tensor, "b2 rows2 columns2 d"], window: Grid, grid: Grid) -> Map:
    """The maps that `cut` was given."""
    (h, w), (rows, columns) = window, grid
    down, across = -(-rows // h), -(-columns // w)
    x = windows.unflatten(0, (-1, down, across)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x[:, :rows, :columns]


def spread(depth: int, count: int) -> set[int]:
    """Which of `depth` blocks see the whole map: `count` of them, the last of each equal part; 2, 5, 8, 11 of 12."""
    count = min(count, depth)
    return {round((i + 1) * depth / count) - 1 for i in range(count)}


def check_blocks(blocks: list[nn.Module], relative: bool) -> None:
    """Raises UserError for blocks that `through` cannot drive."""
    for block in blocks:
        attention: Any = getattr(block, "attn", None)
        if isinstance(attention, BeitAttention):
            continue
        if type(block) is not Block or type(attention) is not Attention:
            raise UserError(
                f"detection drives plain blocks of timm's ViT, Beit or Swin, and not {type(block).__name__}"
            )
        if relative and (getattr(attention, "gate", None) or not isinstance(attention.norm, nn.Identity)):
            raise UserError("relative positions need plain attention: add --no-relative-positions")


def beit_table(encoder: Beit, block: nn.Module) -> Float[Tensor, "entries heads"] | None:
    """The table of biases by relative position that a block of a Beit uses, its own or all blocks'; None if neither."""
    own, shared = cast(Any, block).attn.relative_position_bias_table, cast(Any, encoder.rel_pos_bias)
    return own if own is not None else None if shared is None else shared.relative_position_bias_table


def beit_bias(table: Float[Tensor, "entries heads"], grid: Grid, window: Grid) -> Float[Tensor, "1 heads n n"]:
    """A Beit's biases in a window, out of the near distances of a table for the whole map."""
    (rows, columns), (h, w) = grid, window
    table = table[: (2 * rows - 1) * (2 * columns - 1)].unflatten(0, (2 * rows - 1, 2 * columns - 1))
    down, across = _distances(h, rows, table), _distances(w, columns, table)
    bias = table[down[:, None, :, None], across[None, :, None, :]]  # query row, query column, key row, key column
    return bias.flatten(2, 3).flatten(0, 1).permute(2, 0, 1)[None]


def _distances(count: int, reach: int, like: Tensor) -> Tensor:
    """Where the distance of each query (n) to each key (n) stands in a table from 1 - reach to reach - 1."""
    place = torch.arange(count, device=like.device)
    return place[:, None] - place[None, :] + reach - 1
