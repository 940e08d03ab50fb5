"""Patches of images: patchify and its inverse, masks of pixels, sine-cosine positions.

Shapes: b batch, n patches (row by row), p patch size, c channels, h w image size in pixels, d width.
"""

import math

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import functional as F


def grid_of(size: tuple[int, int], patch: int) -> tuple[int, int]:
    """Return (rows, columns) of patches in an image of (h, w) pixels. Raises ValueError if it is not divisible."""
    h, w = size
    if h % patch or w % patch:
        raise ValueError(f"an image of {h}x{w} pixels is not divisible into patches of {patch}x{patch}")
    return h // patch, w // patch


def patchify(images: Shaped[Tensor, "b c h w"], patch: int) -> Shaped[Tensor, "b n d"]:
    """Cut images into patches of d = p*p*c values in the order (row, column, channel), as MAE does.

    Raises:
        ValueError: If h or w is not a multiple of `patch`.
    """
    b, c, h, w = images.shape
    rows, columns = grid_of((h, w), patch)
    patches = images.reshape(b, c, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
    return patches.reshape(b, rows * columns, patch * patch * c)


def unpatchify(patches: Float[Tensor, "b n d"], patch: int, size: tuple[int, int]) -> Float[Tensor, "b c h w"]:
    """Invert `patchify` for images of size (h, w). Raises ValueError if n or d does not match."""
    b, n, d = patches.shape
    rows, columns = grid_of(size, patch)
    if n != rows * columns or d % (patch * patch):
        raise ValueError(
            f"{n} patches of {d} values do not make an image of {size[0]}x{size[1]} with patches of {patch}x{patch}"
        )
    images = patches.reshape(b, rows, columns, patch, patch, d // (patch * patch)).permute(0, 5, 1, 3, 2, 4)
    return images.reshape(b, -1, *size)


def hidden_pixels(hidden: Bool[Tensor, "b n"], patch: int, size: tuple[int, int]) -> Bool[Tensor, "b 1 h w"]:
    """Expand a mask of patches to the pixels of an image of size (h, w)."""
    rows, columns = grid_of(size, patch)
    blocks = hidden.reshape(-1, 1, rows, 1, columns, 1)
    return blocks.expand(-1, 1, rows, patch, columns, patch).reshape(-1, 1, *size)


def hidden_share(hidden: Bool[Tensor, "b n"], patch: int, size: tuple[int, int]) -> Float[Tensor, "b m"]:
    """Return the hidden fraction of each patch of `patch` pixels, for a mask of patches of that size or smaller.

    Raises:
        ValueError: If `patch` is not a multiple of the mask's patch size.
    """
    n, (h, w) = hidden.shape[1], size
    finer = math.isqrt(h * w // n)
    if n * finer * finer != h * w or patch % finer:
        raise ValueError(f"a mask of {n} patches over {h}x{w} pixels does not match patches of {patch}x{patch}")
    (rows, columns), times = grid_of(size, patch), patch // finer
    return hidden.float().reshape(-1, rows, times, columns, times).mean(dim=(2, 4)).flatten(1)


def sincos_positions(width: int, grid: tuple[int, int]) -> Float[Tensor, "n d"]:
    """Return MAE's fixed 2-D sine-cosine positions for (rows, columns) patches, computed in float64.

    The first half of the width encodes the column, the second the row: [sin(x w_k), cos(x w_k)] with
    w_k = 10000^(-k/m), k = 0 .. m-1, m = width/4.

    Raises:
        ValueError: If the width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4, not {width}")
    m = width // 4
    frequency = 10000.0 ** (-torch.arange(m, dtype=torch.float64) / m)
    angles = [torch.arange(count, dtype=torch.float64)[:, None] * frequency for count in grid]
    by_row, by_column = (torch.cat([angle.sin(), angle.cos()], dim=1) for angle in angles)
    rows, columns = grid
    by_column, by_row = by_column.expand(rows, -1, -1), by_row[:, None].expand(-1, columns, -1)
    return torch.cat([by_column, by_row], dim=2).reshape(rows * columns, width).float()


def proportional_grid(images: Float[Tensor, "b c h w"], patch: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Return (rows, columns) of the patches of images. Raises ValueError unless `grid` has the same proportions."""
    rows, columns = grid_of((images.shape[-2], images.shape[-1]), patch)
    if rows * grid[1] != columns * grid[0]:
        h, w = images.shape[-2:]
        raise ValueError(
            f"images of {h}x{w} pixels do not have the proportions of {grid[0] * patch}x{grid[1] * patch}, which the "
            "model was made for"
        )
    return rows, columns


def scaled_grid(grid: tuple[int, int], patches: int) -> tuple[int, int]:
    """Return (rows, columns) of another number of patches in the same proportion. Raises ValueError if there are none.

    >>> scaled_grid((14, 28), 98)
    (7, 14)
    """
    rows = math.isqrt(patches * grid[0] // grid[1])
    columns = rows * grid[1] // grid[0]
    if rows * columns != patches or rows * grid[1] != columns * grid[0]:
        raise ValueError(f"{patches} patches do not have the proportions of {grid[0]}x{grid[1]}")
    return rows, columns


def interpolate_positions(
    table: Float[Tensor, "1 n d"], old: tuple[int, int], new: tuple[int, int]
) -> Float[Tensor, "1 m d"]:
    """Interpolate a table of positions from one grid of (rows, columns) to another.

    Bicubic with align_corners=False, without antialiasing, as in MAE's official code. Prefix tokens are kept. Raises
    ValueError if the table has fewer rows than the old grid.
    """
    prefix = table.shape[1] - old[0] * old[1]
    if prefix < 0:
        raise ValueError(f"a table of {table.shape[1]} positions is too short for a grid of {old[0]}x{old[1]}")
    if old == new:
        return table
    grid = table[:, prefix:].unflatten(1, old).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=new, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :prefix], grid.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], dim=1)
