"""Read and write configurations as JSON: config.json, and the metadata of weights. Files are checked as untrusted."""

import json
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pixmim.config import ModelConfig, OnlineKnnConfig, PretrainConfig
from pixmim.utils.console import printable
from pixmim.utils.errors import UserError, did_you_mean, shown
from pixmim.utils.files import parse_json, read_text, readable
from pixmim.utils.trust import is_trusted
from pixmim.utils.validation import check_value, hints_of

VERSION = 1
"""Version of the format. Increment it when a field is renamed or changes its meaning."""

MAX_CHARACTERS = 2**20
"""Largest configuration to read; those that pixmim writes have about 3,000 characters."""

_TYPES: dict[str, type[ModelConfig]] = {"pixmim.PretrainConfig": PretrainConfig, "pixmim.ModelConfig": ModelConfig}

C = TypeVar("C", bound=ModelConfig)
T = TypeVar("T")


def to_json(config: ModelConfig) -> str:
    """Return a configuration as JSON text, with its type and version."""
    return json.dumps({"type": f"pixmim.{type(config).__name__}", "version": VERSION} | asdict(config), indent=2) + "\n"


def is_config(content: object) -> bool:
    """Return True if parsed JSON is a configuration of pixmim, rather than another project's config.json."""
    return isinstance(content, dict) and isinstance(content.get("type"), str) and content["type"] in _TYPES


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of nested values, such as those of `asdict`."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def read_config_text(path: Path) -> str:
    """Read the text of a config.json, up to `MAX_CHARACTERS`. Raises UserError if it cannot be read."""
    with readable(path):
        return read_text(path, MAX_CHARACTERS)


def from_json(text: str, source: str | Path = "the configuration") -> ModelConfig:
    """Parse the output of `to_json`. The text may be untrusted.

    Args:
        text: The JSON text.
        source: Its origin, for messages.

    Returns:
        A `PretrainConfig`, or a `ModelConfig` for weights from other projects.

    Raises:
        UserError: If the text is not a configuration of this version, or a key is unknown, duplicate, of the wrong
            type or out of range. The message names the key.
    """
    if len(text) > MAX_CHARACTERS:
        raise UserError(f"{source} is longer than {MAX_CHARACTERS:,} characters")
    content = parse_json(text, str(source), unique=True)
    if not is_config(content):
        raise UserError(f'{source} is not a configuration of pixmim: its "type" must be one of {", ".join(_TYPES)}')
    version = content.pop("version", None)
    if type(version) is not int or version != VERSION:
        raise UserError(
            f"{source} has version {shown(version)}, this pixmim reads version {VERSION}: use the one that wrote it"
        )
    return from_dict(_TYPES[content.pop("type")], content, source)


def from_dict(cls: type[T], values: Any, source: str | Path, prefix: str = "") -> T:
    """Build a configuration, or the part of one whose names have a prefix, from nested dictionaries.

    Each value is checked before it reaches a constructor. Raises UserError as `from_json` does.
    """
    if not isinstance(values, dict):
        raise UserError(f"{source}: '{prefix.rstrip('.') or 'the configuration'}' must be an object of keys and values")
    hints, fields = hints_of(cls), dict[str, Any]()  # type: ignore[arg-type]
    for key, value in values.items():
        if key not in hints:
            raise UserError(f"{source}: unknown key {shown(prefix + key)}{did_you_mean(key, hints)}")
        options = _options(hints[key])
        nested: Any = next((option for option in options if is_dataclass(option)), None)
        if nested is not None and not (value is None and type(None) in options):
            fields[key] = from_dict(nested, value, source, f"{prefix}{key}.")
            continue
        fields[key] = _from_json_type(value, options)
        try:
            check_value("--" + f"{prefix}{key}".replace("_", "-"), fields[key], hints[key])
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
    try:
        return cls(**fields)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def pretrain_config(config: ModelConfig, source: str | Path) -> PretrainConfig:
    """Return the configuration of a run. Raises UserError for imported weights, whose training is unknown."""
    if not isinstance(config, PretrainConfig):
        raise UserError(f"{source} describes imported weights, not a run: start a run from them with --init")
    return config


def load_config(path: Path) -> tuple[PretrainConfig, str]:
    """Read the configuration of a run, which may be untrusted.

    Returns:
        The configuration, and the text of the file.

    Raises:
        UserError: If the file does not exist or is not a valid configuration of a run.
    """
    if not path.exists():
        raise UserError(f"there is no {path}")
    text = read_config_text(path)
    config = pretrain_config(from_json(text, path), path)
    words = [value for _, value in flatten(asdict(config)) if isinstance(value, str)]
    unprintable = [word for word in words if printable(word) != word]
    if unprintable and not is_trusted(text):  # --help would print them as defaults
        raise UserError(f"{path} contains control characters: {shown(unprintable[0])}")
    return config, text


def defaults_for(config: C, values: Mapping[str, object]) -> C:
    """Return a configuration as the defaults of other values of its fields, as typed on a command line or in Python.

    Mean, std and bands belong to channels, dtype and stretch: other ones reset them. Another batch size scales the
    first and last learning rates of the schedule, as it does the peak. `epochs` replace `steps`.

    Raises:
        UserError: If there are both `epochs` and `steps`.
    """
    own = {name: getattr(config, name) for name in ("channels", "dtype", "stretch")}
    if any(str(values.get(name, value)) != str(value) for name, value in own.items()):
        config = replace(config, mean=None, std=None, bands="")
    if not isinstance(config, PretrainConfig):
        return config
    batch, optim, steps = str(values.get("batch_size", "")), config.optim, config.steps
    if batch.isdecimal() and len(batch) < 10 and optim.lr is None:
        times = int(batch) / config.batch_size
        optim = replace(optim, warmup_start_lr=optim.warmup_start_lr * times, min_lr=optim.min_lr * times)
    if values.get("epochs"):
        if values.get("steps"):
            raise UserError("epochs and steps both set the length of a run: give one, not both")
        steps = None
    return replace(config, optim=optim, steps=steps)


def portable(config: C) -> C:
    """Return a configuration without the data, folders and weights of this machine."""
    if not isinstance(config, PretrainConfig):
        return config
    init = config.init if config.init.startswith(("timm:", "hf:")) else ""
    return replace(config, data="", out="", init=init, knn=OnlineKnnConfig())


def _options(hint: Any) -> tuple[Any, ...]:
    """Return the types that a hint allows, without its rules."""
    plain = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return get_args(plain) if get_origin(plain) in (Union, types.UnionType) else (plain,)


def _from_json_type(value: Any, options: tuple[Any, ...]) -> Any:
    """Convert lists to tuples, and integers to floats, where the options require it."""
    inner = next((get_args(option)[0] for option in options if get_origin(option) is tuple), None)
    if inner is not None and isinstance(value, list | tuple):
        return tuple(_from_json_type(item, (inner,)) for item in value)
    if float in options and int not in options and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    return value
