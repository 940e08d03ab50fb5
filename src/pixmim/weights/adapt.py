"""Adapt weights to a model of another image size or number of channels, by the rules of the projects they come from."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pixmim.config import ModelConfig
from pixmim.utils.errors import UserError, first_line
from pixmim.utils.patches import grid_of, interpolate_positions
from pixmim.weights.detect import Weights

Tensors = Mapping[str, Tensor]
Grid = tuple[int, int]


def interpolate_tables(weights: Weights, state: Tensors, config: ModelConfig) -> tuple[dict[str, Tensor], list[str]]:
    """Adapt position tables and the first convolution to a model, given by the shapes of its state and configuration.

    Returns all tensors of the weights, and a line for each adapted one. Raises UserError if a table does not permit it,
    or a tensor holds integers, as quantized files do, or values that are not finite.
    """
    adapted, lines = dict(weights.tensors), []
    first = next((name for name, value in state.items() if name.startswith("encoder.") and value.ndim == 4), "")
    for name, value in weights.tensors.items():
        if name not in state:
            continue
        if state[name].is_floating_point() and not (value.is_floating_point() and bool(value.isfinite().all())):
            kind = "NaN or infinity" if value.is_floating_point() else f"{value.dtype}, as in quantized models"
            raise UserError(f"the file ({weights.format_name}) holds {kind} in {original_key(weights, name)}: unusable")
        if state[name].shape == value.shape and weights.config.image_size == config.image_size:
            continue  # at another image size, even a table of the same length may belong to another grid: 6x6 and 4x9
        try:
            adapted[name], line = _adapt(weights, name, state[name], config, first)
        except (ValueError, IndexError, ArithmeticError, RuntimeError, np.linalg.LinAlgError) as error:
            raise UserError(f"{name} cannot be interpolated: {first_line(error)}") from error
        lines += [f"  {name}: {line}"] if line else []
    return adapted, lines


def _adapt(weights: Weights, name: str, target: Tensor, config: ModelConfig, first: str) -> tuple[Tensor, str]:
    """Return a tensor in the model's shape and what was changed; unchanged and an empty text if no rule applies.

    `first` is the name of the first convolution.
    """
    value, new = weights.tensors[name], target.shape
    embedding = weights.tensors.get("encoder.patch_embed.proj.weight")
    patch = 16 if embedding is None else int(embedding.shape[-1])  # ConvMAE has several patch embeddings: 4 * 2 * 2
    if name.endswith("pos_embed") and new[-1] == value.shape[-1]:
        old_grid, grid = (
            grid_of(c.image_size, patch * (c.model.decoder_stride if name.startswith("decoder.") else 1))
            for c in (weights.config, config)
        )
        line = f"positions interpolated from {format_shape(old_grid)} to {format_shape(grid)} patches"
        return interpolate_positions(value, old_grid, grid), line if old_grid != grid else ""
    if name.endswith("relative_position_bias_table") and new[-1] == value.shape[-1]:
        old_window, window = _window(name, value, weights.config, patch), _window(name, target, config, patch)
        if old_window == window and new == value.shape:
            return value, ""
        if old_window is None or window is None:
            length, size = (len(target), config.size) if old_window else (len(value), weights.config.size)
            raise UserError(f"{name} cannot be interpolated: {length} entries are of no window at {size} pixels")
        line = f"relative positions interpolated from {format_shape(old_window)} to {format_shape(window)} patches"
        return relative_biases(value, old_window, window), line
    old = value.shape
    if name == first and len(old) == 4 and new != old and (new[0], *new[2:]) == (old[0], *old[2:]):
        return channels(value, new[1]), f"adapted from {value.shape[1]} to {new[1]} channels"
    return value, ""


def _window(name: str, table: Tensor, config: ModelConfig, patch: int) -> Grid | None:
    """Return (rows, columns) of the window of a table of relative positions: for a Beit, the image's grid.

    A Swin's window is a square, cut to the map of its stage in each direction.
    """
    h, w = grid_of(config.image_size, patch)
    if ".layers." not in name:
        return h, w
    scale, side = 2 ** int(name.split(".layers.")[1].split(".")[0]), (round(table.shape[0] ** 0.5) + 1) // 2
    cut = ((min(n, h // scale), min(n, w // scale)) for n in range(1, max(h, w) // scale + 1))
    windows = (*cut, (side, side))  # timm can also partition a map that is smaller than the window
    return next((window for window in windows if (2 * window[0] - 1) * (2 * window[1] - 1) == len(table)), None)


def adapt_weights(weights: Weights, state: Tensors, config: ModelConfig) -> dict[str, Tensor]:
    """Adapt weights to a model by `interpolate_tables`. Raises UserError with the file's own names of tensors."""
    adapted, _ = interpolate_tables(weights, state, config)
    missing = [original_key(weights, name) for name in state if name not in adapted]
    unexpected = [original_key(weights, name) for name in adapted if name not in state]
    problems = [
        *([f"is missing {_listed(missing)}"] if missing else []),
        *([f"contains {_listed(unexpected)}, which {config.model.backbone} does not have"] if unexpected else []),
    ]
    mismatched = [name for name in state if name in adapted and adapted[name].shape != state[name].shape]
    problems += [
        f"has {format_shape(adapted[name].shape)} for {original_key(weights, name)}: "
        f"expected {format_shape(state[name].shape)}"
        for name in mismatched[:4]
    ]
    if problems:
        raise UserError(f"the file ({weights.format_name}) does not match: it {'; it '.join(problems)}")
    return adapted


def original_key(weights: Weights, name: str) -> str:
    """Return the file's own name of a tensor, in quotes."""
    key = weights.format.keys.from_pixmim(name) if weights.format is not None else None
    return f"'{key or name}'"


def format_shape(shape: tuple[int, ...]) -> str:
    """Return a shape as text: 768x3x16x16."""
    return "x".join(map(str, shape)) or "a scalar"


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def relative_biases(table: Float[Tensor, "n heads"], old: Grid, new: Grid) -> Float[Tensor, "m heads"]:
    """Interpolate biases by relative position from one window of (rows, columns) to another.

    The table has (2 rows - 1)(2 columns - 1) entries. Any entries after them (Beit's three of the class token) are
    kept. The known distances are placed at 1, 1 + q, 1 + q + q^2 ..., where q in [1.01, 1.5] maps the largest one to
    the new largest distance, and interpolated by a cubic spline. Biases change most at small distances, which thus
    hardly move. Source: the fine-tuning code of SimMIM.
    """
    if old == new:
        return table
    (h, w), (rows, columns) = ((2 * a - 1, 2 * b - 1) for a, b in (old, new))
    vertical, horizontal = (
        torch.from_numpy(_spline_matrix(_geometric(a, b), np.arange(b) - b // 2.0))
        for a, b in ((h, rows), (w, columns))
    )
    grid = table[: h * w].double().unflatten(0, (h, w))
    fitted = torch.einsum("ay,yxn,bx->abn", vertical, grid, horizontal).flatten(0, 1)
    return torch.cat([fitted.to(table.dtype), table[h * w :]])


def channels(weight: Float[Tensor, "d c h w"], count: int) -> Float[Tensor, "d c2 h w"]:
    """Adapt a first convolution to other channels, so that equal channels give the same output: summed, or repeated."""
    old = weight.shape[1]
    if count == old:
        return weight
    if count == 1:
        return weight.sum(dim=1, keepdim=True)
    return weight.repeat(1, math.ceil(count / old), 1, 1)[:, :count] * (old / count)


def _geometric(old: int, new: int) -> np.ndarray:
    """Place `old` points (odd) in [-new//2, new//2], at distances that grow by a constant factor from the center."""
    reach, steps = new // 2, old // 2
    low, high = 1.01, 1.5
    for _ in range(60):
        q = (low + high) / 2
        low, high = (low, q) if sum(q**i for i in range(steps)) > reach else (q, high)
    distances = np.cumsum([low**i for i in range(steps)])
    return np.concatenate([-distances[::-1], [0.0], distances])


def _spline_matrix(known: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Return the matrix (targets known) of cubic spline interpolation with not-a-knot ends.

    Fewer than four points give a lower degree. Targets outside of the known points get the value of the outermost one.
    """
    if len(known) == 1:
        return np.ones((len(targets), 1))
    k = min(3, len(known) - 1)
    interior = known[2:-2]  # empty for three points, which determine a parabola
    knots = np.concatenate([np.full(k + 1, known[0]), interior, np.full(k + 1, known[-1])])
    targets = targets.clip(known[0], known[-1])
    return np.asarray(_b_splines(knots, k, targets) @ np.linalg.inv(_b_splines(knots, k, known)))


def _b_splines(knots: np.ndarray, degree: int, x: np.ndarray) -> np.ndarray:
    """Return the values (x basis) of the B-splines on these knots, by the recursion of Cox and de Boor."""
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
