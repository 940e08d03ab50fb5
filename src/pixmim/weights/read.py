"""Reading weights that others wrote, without running anything of theirs."""

import json
import pickle
import re
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pixmim.errors import UserError, first_line

PARTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "encoder.safetensors",
)
"""What holds the weights in a folder (Hugging Face's, timm's and pixmim's names), the best first."""

_STATES = ("model", "state_dict", "module", "model_state_dict", "model_state", "network", "student", "teacher")
"""Under what key training files keep a model's tensors, the likeliest first."""


@dataclass(frozen=True)
class Foreign:
    """What a file holds.

    tensors   the model's, by the file's own names; wrappers' prefixes (module., _orig_mod.) are gone
    settings  the training arguments it came with, flat: {"input_size": 224, "DATA.IMG_SIZE": 192, ...}
    config    config.json beside it (Hugging Face's, timm's), or nothing
    metadata  a safetensors file's own strings
    """

    path: Path
    tensors: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def read(path: Path) -> Foreign:
    """Read a file of weights, or a folder that holds one, onto the CPU.

    safetensors, whole or in parts, and torch's files, these with `weights_only=True` and a list of harmless classes:
    anything else that a pickle asks for is refused, and nothing of it runs. Raises UserError.
    """
    if path.is_dir():
        found = [path / name for name in PARTS if (path / name).is_file()]
        if not found:
            raise UserError(f"{path} holds no weights: none of {', '.join(PARTS)} is in it")
        path = found[0]
    if not path.is_file():
        raise UserError(f"there is no {path}")
    settings: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    if path.name.endswith(".index.json"):
        tensors = _read_parts(path)
    elif path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
    else:
        content = _read_torch(path)
        tensors, settings = _find_tensors(content, path), _flat(content)
    beside = path.parent / "config.json"
    config = _json(beside) if beside.is_file() else {}
    return Foreign(path, _unwrap(tensors), settings, config, metadata)


def _read_parts(index: Path) -> dict[str, Tensor]:
    parts = sorted(set(_json(index).get("weight_map", {}).values()))
    tensors: dict[str, Tensor] = {}
    for part in parts:
        tensors |= read(index.parent / part).tensors
    return tensors


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} cannot be read: {_guess(path) or error}") from error


def _read_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted and not _guess(path):
            raise UserError(
                f"{path} is a pickle that asks for {wanted[1]}, which could run any code: it is refused, and nothing "
                "of it was run. If you trust who made it, save its tensors alone as safetensors where it came from."
            ) from error
        raise UserError(f"{path} cannot be read: {_guess(path) or 'it is damaged, or no file of weights'}") from error
    except Exception as error:  # torch raises many kinds over a damaged file
        reason = _guess(path) or f"it is damaged, or no file of weights ({first_line(error).split('. ')[0]})"
        raise UserError(f"{path} cannot be read: {reason}") from error


def _guess(path: Path) -> str:
    """What a file is that is not what its name says, as far as its first bytes tell."""
    start = path.read_bytes()[:64] if path.stat().st_size < 64 else path.open("rb").read(64)
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file itself: get it with `git lfs pull`"
    if start.lstrip()[:1] == b"<":
        return "it is a web page, not a file of weights: download it again"
    return ""


def _find_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """The model's tensors in what a training run saved."""
    if isinstance(content, Mapping):
        for key in _STATES:
            if isinstance(content.get(key), Mapping) and any(isinstance(v, Tensor) for v in content[key].values()):
                return _tensors(content[key])
        if any(isinstance(value, Tensor) for value in content.values()):
            return _tensors(content)
    keys = list(content)[:8] if isinstance(content, Mapping) else type(content).__name__
    raise UserError(f"{path} holds no model: it has {keys}, and under none of {', '.join(_STATES)} are there tensors")


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def _unwrap(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes that DistributedDataParallel and torch.compile add."""
    for prefix in ("module.", "_orig_mod."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            return _unwrap({name.removeprefix(prefix): value for name, value in tensors.items()})
    return tensors


def _flat(content: Any) -> dict[str, Any]:
    """The training arguments of a file, `args` of argparse or `config` of yacs, nested names joined by dots."""
    found: dict[str, Any] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, Namespace):
            value = vars(value)
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(inner, f"{name}.{key}" if name else str(key))
        elif isinstance(value, str | int | float | bool | list | tuple):
            found[name] = value

    if isinstance(content, Mapping):
        for key in ("args", "config"):
            walk(content.get(key), "")
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}


class _Inert:
    """Stands in for an object of somebody else's that weights come with, and that nobody needs."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _nothing(*_: Any) -> None:
    """Stands in for a function that a file wants called."""


# Classes under other names: weights_only puts the value on the left where a pickle asks for the name on the right.
_HARMLESS: list[Any] = [
    Namespace,  # of MAE's, ConvMAE's and timm's training scripts
    (OrderedDict, "yacs.config.CfgNode"),  # SimMIM's
    (OrderedDict, "mmengine.config.config.ConfigDict"),
    (_Inert, "mmengine.config.config.Config"),
    (_Inert, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_Inert, "pathlib.PosixPath"),
    (_Inert, "pathlib._local.PosixPath"),  # the same, of Python 3.13
    (_nothing, "getattr"),  # a HistoryBuffer's table of its own methods
    (_nothing, "builtins.getattr"),
    # numpy's scalars and arrays, of accuracies and losses
    np.dtype,
    np.ndarray,
    (np.empty(0).__reduce__()[0], "numpy.core.multiarray._reconstruct"),
    (np.empty(0).__reduce__()[0], "numpy._core.multiarray._reconstruct"),
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
    *(type(np.dtype(kind)) for kind in ("bool", "int32", "int64", "float16", "float32", "float64")),
]
