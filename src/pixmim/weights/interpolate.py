"""Tables trained_at for one image size, refitted to another, each by the rule of the project that it comes from."""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Grid = tuple[int, int]


def positions(table: Float[Tensor, "1 n d"], old: Grid, new: Grid) -> Float[Tensor, "1 m d"]:
    """A table of positions on a grid of (rows, columns) for another grid; rows of prefix tokens stay as they are.

    Bicubic, corners not aligned, no antialias: the rule of MAE's official code. Raises ValueError if the table holds
    fewer rows than `old`.
    """
    prefix = table.shape[1] - old[0] * old[1]
    if prefix < 0:
        raise ValueError(f"a table of {table.shape[1]} positions does not hold a grid of {old[0]}x{old[1]}")
    if old == new:
        return table
    grid = table[:, prefix:].unflatten(1, old).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=new, mode="bicubic", align_corners=False)
    return torch.cat([table[:, :prefix], grid.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], dim=1)


def relative_biases(table: Float[Tensor, "n heads"], old: Grid, new: Grid) -> Float[Tensor, "m heads"]:
    """A table of biases by relative position in a window of (rows, columns) for another window.

    It holds (2 rows - 1)(2 columns - 1) entries, and whatever follows them (Beit's three of the cls token) stays. The
    known distances are taken to lie at 1, 1 + q, 1 + q + q^2 ..., with the ratio q from [1.01, 1.5] that brings the
    farthest one to the new farthest distance; between them runs a cubic spline. Near distances, where biases change
    most, thus keep their values almost; a smaller window keeps the near ones. Source: the fine-tuning code of SimMIM.
    """
    if old == new:
        return table
    (h, w), (rows, columns) = ((2 * a - 1, 2 * b - 1) for a, b in (old, new))
    extra = table[h * w :]
    down, across = (
        torch.from_numpy(_spline(_spread(a, b), np.arange(b) - b // 2.0)) for a, b in ((h, rows), (w, columns))
    )
    grid = table[: h * w].double().unflatten(0, (h, w))
    fitted = torch.einsum("ay,yxn,bx->abn", down, grid, across).flatten(0, 1)
    return torch.cat([fitted.to(table.dtype), extra])


def channels(weight: Float[Tensor, "d c h w"], count: int) -> Float[Tensor, "d c2 h w"]:
    """A first convolution for another number of channels: repeated and scaled, so that equal channels give the same.

    For one channel this is the sum over the old ones.
    """
    old = weight.shape[1]
    if count == old:
        return weight
    if count == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight.repeat(1, math.ceil(count / old), 1, 1)[:, :count] * (old / count)


def _spread(old: int, new: int) -> np.ndarray:
    """Where `old` places (odd) stand among `new` ones, from -new//2 to new//2, in steps that grow by a fixed ratio."""
    reach, steps = new // 2, old // 2
    low, high = 1.01, 1.5
    for _ in range(60):
        q = (low + high) / 2
        low, high = (low, q) if sum(q**i for i in range(steps)) > reach else (q, high)
    distances = np.cumsum([low**i for i in range(steps)])
    return np.concatenate([-distances[::-1], [0.0], distances])


def _spline(known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The matrix (wanted known) of cubic interpolation, with de Boor's not-a-knot ends (of lower degree on few places).

    Places outside the known ones get the value of the last one.
    """
    if len(known) == 1:
        return np.ones((len(wanted), 1))
    k = min(3, len(known) - 1)
    inner = known[2:-2]  # none on three places, through which a parabola goes
    knots = np.concatenate([np.full(k + 1, known[0]), inner, np.full(k + 1, known[-1])])
    wanted = wanted.clip(known[0], known[-1])
    return np.asarray(_b_splines(knots, k, wanted) @ np.linalg.inv(_b_splines(knots, k, known)))


def _b_splines(knots: np.ndarray, degree: int, x: np.ndarray) -> np.ndarray:
    """Values (x basis) of the B-splines on these knots, by Cox and de Boor's recursion."""
    last = np.flatnonzero(knots < knots[-1])[-1]
    spans = np.clip(np.searchsorted(knots, x, side="right") - 1, 0, last)
    basis = (np.arange(len(knots) - 1)[None, :] == spans[:, None]).astype(np.float64)
    for k in range(1, degree + 1):
        left, right = knots[k:-1] - knots[: -k - 1], knots[k + 1 :] - knots[1:-k]
        with np.errstate(divide="ignore", invalid="ignore"):
            rising = np.where(left > 0, (x[:, None] - knots[: -k - 1]) / left, 0.0)
            falling = np.where(right > 0, (knots[k + 1 :] - x[:, None]) / right, 0.0)
        basis = rising * basis[:, :-1] + falling * basis[:, 1:]
    return basis
