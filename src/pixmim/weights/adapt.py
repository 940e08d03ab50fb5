"""Weights fitted to a model, given as its shapes: refitted where a rule exists, refused with the reason where not."""

from collections.abc import Mapping
from dataclasses import replace

from numpy.linalg import LinAlgError
from torch import Tensor

from pixmim.config import ModelConfig
from pixmim.utils.errors import UserError, first_line
from pixmim.utils.patches import grid_of
from pixmim.weights import interpolate as resize
from pixmim.weights.detect import Weights

Tensors = Mapping[str, Tensor]


def interpolate_tables(weights: Weights, state: Tensors, config: ModelConfig) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors, with tables and first convolution refitted to the image size and channels of `run`; what was done.

    state  the tensors of the model they are for, of which only the shapes count

    Raises UserError for a table that cannot be refitted.
    """
    found, lines = dict(weights.tensors), []
    for name, value in weights.tensors.items():
        if name not in state or (state[name].shape == value.shape and weights.config.image_size == config.image_size):
            continue  # at another size, a table of as many rows may be for another grid: 6x6 and 4x9
        try:
            fitted, line = _refitted(weights, name, value, state[name], config)
        except (ValueError, IndexError, ArithmeticError, RuntimeError, LinAlgError) as error:  # shapes out of the way
            raise UserError(f"{name} cannot be refitted: {first_line(error)}") from error
        if line:
            found[name] = fitted
            lines.append(f"  {name}: {line}")
    return found, lines


def _refitted(weights: Weights, name: str, value: Tensor, wanted: Tensor, config: ModelConfig) -> tuple[Tensor, str]:
    """One tensor as the model wants it, and what was done; no words where no rule exists."""
    new = wanted.shape
    if name.endswith("pos_embed") and new[-1] == value.shape[-1]:
        patch = _patch(weights.tensors)
        strides = [r.model.decoder_stride if name.startswith("decoder.") else 1 for r in (weights.config, config)]
        old_grid, grid = (
            grid_of(r.image_size, patch * s) for r, s in zip((weights.config, config), strides, strict=True)
        )
        if old_grid == grid:
            return value, ""
        return resize.positions(value, old_grid, grid), f"positions of {_by(old_grid)} patches refitted to {_by(grid)}"
    if name.endswith("relative_position_bias_table") and new[-1] == value.shape[-1]:
        old_window, window = _window(weights, name, value), _window(replace(weights, config=config), name, wanted)
        if old_window == window and new == value.shape:
            return value, ""
        if old_window is None or window is None:
            raise UserError(f"{name} cannot be refitted: of what windows it was trained_at is not known")
        return (
            resize.relative_biases(value, old_window, window),
            f"biases in windows of {_by(old_window)} refitted to {_by(window)}",
        )
    same = (new[0], *new[2:]) == (value.shape[0], *value.shape[2:])
    if "patch_embed" in name and value.ndim == 4 and same and new != value.shape:
        return resize.channels(value, new[1]), f"{value.shape[1]} channels adapted to {new[1]}"
    return value, ""


def fit(weights: Weights, state: Tensors, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors for a model, each with its place and all places filled, once tables are refitted.

    Raises UserError naming keys as the file does.
    """
    fitted, _ = interpolate_tables(weights, state, config)
    missing = [original_key(weights, n) for n in state if n not in fitted]
    odd = [original_key(weights, n) for n in fitted if n not in state]
    wrong = [n for n in fitted if n in state and fitted[n].shape != state[n].shape]
    problems = []
    if missing:
        problems.append(f"lacks {_some(missing)}")
    if odd:
        problems.append(f"holds {_some(odd)}, which {config.model.backbone} does not have")
    problems += [f"has {shape(fitted[n])} for {original_key(weights, n)}, not {shape(state[n])}" for n in wrong[:4]]
    if problems:
        raise UserError(f"the file ({weights.origin}) does not fit: it " + "; it ".join(problems))
    return fitted


def _window(weights: Weights, name: str, table: Tensor) -> tuple[int, int] | None:
    """(rows, columns) of the window that a table of relative positions is for: the image's grid for a Beit."""
    if ".layers." not in name:
        return grid_of(weights.config.image_size, _patch(weights.tensors))
    side = (round(table.shape[0] ** 0.5) + 1) // 2
    return (side, side) if (2 * side - 1) ** 2 == table.shape[0] else None


def _patch(tensors: Mapping[str, Tensor]) -> int:
    """Pixels that a row of the encoder's table of positions stands for; 16 for ConvMAE."""
    first = tensors.get("encoder.patch_embed.proj.weight")
    return 16 if first is None else int(first.shape[-1])


def original_key(weights: Weights, name: str) -> str:
    """What the file calls a tensor, in quotes."""
    theirs = weights.source.names.theirs(name) if weights.source is not None else None
    return f"'{theirs or name}'"


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def shape(tensor: Tensor) -> str:
    """A shape in words, 768x3x16x16."""
    return "x".join(map(str, tensor.shape)) or "a scalar"


def _by(pair: tuple[int, int]) -> str:
    return f"{pair[0]}x{pair[1]}"
