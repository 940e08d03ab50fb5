"""Configurations as JSON and back, with a version and every key checked: config.json, and the metadata of weights."""

import dataclasses
import json
import sys
import types
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pixmim.config import ModelConfig, OnlineKnnConfig, PretrainConfig
from pixmim.utils.console import printable
from pixmim.utils.errors import UserError, did_you_mean, shown
from pixmim.utils.files import parse_json, read_text
from pixmim.utils.trust import is_trusted
from pixmim.utils.validation import check_options

VERSION = 1
"""Version of the format. Raise it when a field is renamed or changes its meaning."""

MAX_CHARACTERS = 2**20
"""Longest configuration that is read. One that pixmim writes has about 3,000 characters."""

_TYPES: dict[str, type[ModelConfig]] = {"pixmim.PretrainConfig": PretrainConfig, "pixmim.ModelConfig": ModelConfig}

C = TypeVar("C", bound=ModelConfig)


def to_json(config: ModelConfig) -> str:
    """Return a configuration as JSON text, with its type and version, for `from_json`."""
    head = {"type": f"pixmim.{type(config).__name__}", "version": VERSION}
    return json.dumps(head | dataclasses.asdict(config), indent=2) + "\n"


def is_config(content: object) -> bool:
    """Return True if parsed JSON is one of pixmim's configurations, and not another project's config.json."""
    return isinstance(content, dict) and isinstance(content.get("type"), str) and content["type"] in _TYPES


def read_config_text(path: Path) -> str:
    """Read the text of a config.json, within its bound. Raises UserError if it cannot be read."""
    try:
        return read_text(path, MAX_CHARACTERS)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error


def from_json(text: str, source: str | Path = "the configuration") -> ModelConfig:
    """Parse what `to_json` wrote. The text may come from anybody.

    Args:
        text: The JSON text.
        source: Where it comes from, for messages.

    Returns:
        A `PretrainConfig`, or of weights from elsewhere a `ModelConfig`.

    Raises:
        UserError: If the text is not a configuration of this version, or a key is unknown, duplicated, of the wrong
            type or out of bounds. The message names the key.
    """
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{source} is longer than the {MAX_CHARACTERS:,} characters allowed")
    content = parse_json(text, str(source), unique=True)
    if not is_config(content):
        raise UserError(f'{source} is not a configuration of pixmim: its "type" must be one of {", ".join(_TYPES)}')
    version = content.pop("version", None)
    if type(version) is not int or version != VERSION:
        raise UserError(
            f"{source} has version {shown(version)}, but version {VERSION} is read here: use the pixmim that wrote it"
        )
    return from_dict(_TYPES[content.pop("type")], content, source)


def from_dict(cls: type[C], values: dict[str, Any], source: str | Path) -> C:
    """Build a configuration from nested dictionaries. Raises UserError as `from_json` does."""
    config: C = _build(cls, values, "", str(source))
    return config


def pretrain_config(config: ModelConfig, source: str | Path) -> PretrainConfig:
    """Return the configuration of a run. Raises UserError for imported weights, whose training is unknown."""
    if not isinstance(config, PretrainConfig):
        raise UserError(f"{source} describes imported weights, not a run: start one from them with --init")
    return config


def load_config(path: Path) -> tuple[PretrainConfig, str]:
    """Read a run's configuration from a file. The file may come from anybody.

    Returns:
        The configuration, and the text of the file.

    Raises:
        UserError: If there is no such file, or it does not hold a valid configuration of a run.
    """
    if not path.exists():
        raise UserError(f"there is no {path}")
    text = read_config_text(path)
    config = pretrain_config(from_json(text, path), path)
    strange = [word for word in _texts(dataclasses.asdict(config)) if printable(word) != word]
    if strange and not is_trusted(text):  # they would reach the terminal as defaults of --help
        raise UserError(f"{path} holds control characters: {shown(strange[0])}")
    return config, text


def _texts(value: object) -> list[str]:
    """Return all texts in nested settings."""
    if isinstance(value, str):
        return [value]
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [text for inner in values for text in _texts(inner)]


def portable(config: C) -> C:
    """Return a configuration without the data, folders and weights that it names on this machine."""
    if not isinstance(config, PretrainConfig):
        return config
    return replace(
        config, data="", out="", init=config.init if config.init.startswith("timm:") else "", knn=OnlineKnnConfig()
    )


def _build(cls: Any, values: Any, where: str, source: str) -> Any:
    if not isinstance(values, dict):
        raise UserError(f"{source}: '{where or 'the whole'}' must be an object of keys and values")
    hints = get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise UserError(f"{source}: unknown key {shown(where + key)}{did_you_mean(key, hints)}")
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
