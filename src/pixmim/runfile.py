"""A Run as JSON and back, each key checked; for a run's config.json, and for the metadata of weights."""

import dataclasses
import json
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pixmim.config import Run
from pixmim.errors import UserError, nearest


def to_json(run: Run) -> str:
    """The run as JSON text that `from_json` takes back."""
    return json.dumps(dataclasses.asdict(run), indent=2) + "\n"


def from_json(text: str, source: str | Path = "the configuration") -> Run:
    """Read what `to_json` wrote. Raises UserError naming the key that is unknown or has a value of the wrong type."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"{source} is not JSON: {error}") from error
    run: Run = _build(Run, values, "", str(source))
    return run


def _build(cls: Any, values: Any, where: str, source: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{source}: '{where or 'the whole'}' must be an object of keys and values")
    hints = get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise UserError(f"{source}: unknown key '{where}{key}'{nearest(key, hints)}")
    return cls(**{key: _convert(hints[key], value, f"{where}{key}", source) for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str, source: str) -> Any:
    """`value` as the type `hint` asks for; JSON knows no tuples, and writes whole floats as integers at times."""
    kind, options = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where + ".", source)
    if kind is Literal:
        if value in options:
            return value
    elif kind in (Union, types.UnionType):
        for option in options:
            try:
                return _convert(option, value, where, source)
            except UserError:
                continue
    elif kind is tuple and isinstance(value, list | tuple):
        inner = [options[0]] * len(value) if options[-1] is Ellipsis else list(options)
        if len(inner) == len(value):
            return tuple(_convert(o, v, where, source) for o, v in zip(inner, value, strict=True))
    elif kind is dict and isinstance(value, dict):
        return dict(value)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif hint is type(None) and value is None:
        return None
    elif isinstance(hint, type) and type(value) is hint:
        return value
    raise UserError(f"{source}: '{where}' cannot be {json.dumps(value)}")
