"""A Run as JSON and back, each key checked; for a run's config.json, and for the metadata of weights."""

import dataclasses
import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pixmim.config import Knn, PretrainConfig
from pixmim.utils.errors import UserError, nearest, shown
from pixmim.utils.files import parse_json, read_text
from pixmim.utils.validation import check_options

MAX_CHARACTERS = 2**20
"""Longest configuration that is read. One that pixmim writes has about 3,000 characters."""


def to_json(run: PretrainConfig) -> str:
    """The run as JSON text that `from_json` takes back."""
    return json.dumps(dataclasses.asdict(run), indent=2) + "\n"


def read_config_text(path: Path) -> str:
    """Read the text of a config.json, within its bound. Raises UserError if it cannot be read."""
    try:
        return read_text(path, MAX_CHARACTERS)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def from_json(text: str, source: str | Path = "the configuration") -> PretrainConfig:
    """Parse what `to_json` wrote; the text may come from anybody.

    Raises:
        UserError: Naming the key that is unknown, twice there, or has a value of the wrong type or out of bounds.
    """
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{source} is longer than the {MAX_CHARACTERS:,} characters allowed")
    run: PretrainConfig = _build(PretrainConfig, parse_json(text, str(source), unique=True), "", str(source))
    return run


def portable(run: PretrainConfig) -> PretrainConfig:
    """Return the run without what it names on this machine: data, folders, weights. What trains it elsewhere stays."""
    return replace(run, data="", out="", init=run.init if run.init.startswith("timm:") else "", knn=Knn())


def _build(cls: Any, values: Any, where: str, source: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{source}: '{where or 'the whole'}' must be an object of keys and values")
    hints = get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise UserError(f"{source}: unknown key {shown(where + key)}{nearest(key, hints)}")
    fields = {key: _convert(hints[key], value, f"{where}{key}", source) for key, value in values.items()}
    try:
        return cls(**fields)
    except UserError as error:  # out of bounds
        raise UserError(f"{source}: {error}") from error


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
        try:
            check_options(value)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        return value
    elif hint is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:  # neither NaN nor infinite
        return float(value)
    elif hint is type(None) and value is None:
        return None
    elif (hint is str and isinstance(value, str) and _is_word(value)) or (hint in (int, bool) and type(value) is hint):
        return value
    raise UserError(f"{source}: '{where}' cannot be {_short(value)}")


def _is_word(text: str) -> bool:
    """Return True if the system can take the text, as part of a path."""
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a pair of surrogates
        return False
    return len(text) <= 2**16 and "\0" not in text


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
