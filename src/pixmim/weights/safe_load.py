"""Reading weights that others wrote, without running anything of theirs."""

import io
import os
import re
import struct
import warnings
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickletools import genops, markobject
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pixmim.utils.errors import UserError, first_line, shown
from pixmim.utils.files import open_regular, read_file, read_json
from pixmim.utils.trust import inside

MAX_FILES = 512
"""Most files that an index may name."""

_MAX_TUPLE = 1_000_000

_PICKLES = 5  # that torch wrote one after another before 1.6: what the file is, a model, and its storages' names

MAX_TENSORS = 65_536
MAX_NAME = 512
"""Most tensors of a model, and most characters of a tensor's name."""

MAX_PICKLE_BYTES = 32 * 2**20
"""Largest pickle in a torch file; tensors are beside it, and the rest of a training run takes less than a MiB."""

MAX_PLAIN_BYTES = 8 * 2**30
"""Largest file of torch before 1.6, which is read into memory. All others are mapped."""

PARTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.pth",
)
"""What holds the weights in a folder (Hugging Face's and timm's names, and what `pixmim export` writes), best first."""

_STATES = (
    *("model", "state_dict", "module", "model_state_dict", "model_state", "network", "backbone"),
    *("teacher", "student", "target_encoder", "encoder"),
)
"""Under what key training files keep a model's tensors, the likeliest first.

DINO evaluates its teacher; MSN and I-JEPA their target encoder.
"""

_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema")
"""Under what key they keep an average of it over steps."""


@dataclass(frozen=True)
class RawCheckpoint:
    """What a file holds.

    tensors   the model's, by the file's own names
    settings  the training arguments it came with, flat: {"input_size": 224, "DATA.IMG_SIZE": 192, ...}
    config    config.json beside it (Hugging Face's, timm's), or nothing
    prepared  preprocessor_config.json beside it (Hugging Face's), or nothing
    metadata  a safetensors file's own strings
    state     key of a training file under which the tensors were
    choice    of a file that holds several models: which one this is, in words
    """

    path: Path
    tensors: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    prepared: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    state: str = ""
    choice: str = ""


def read(path: Path, state: str = "", ema: bool = False) -> RawCheckpoint:
    """Read a file of weights, or a folder that holds one, onto the CPU.

    safetensors, whole or in parts, and torch's files, these with `weights_only=True` and a list of harmless classes:
    anything else that a pickle asks for is refused, and nothing of it runs.

    Args:
        path: The file or folder.
        state: Key of a training file's model, such as student; if there is no such key, the likeliest one.
        ema: Take the average that a training file holds besides the model.

    Raises:
        UserError: For what cannot be read, or holds no model, or with `ema` no average.
    """
    if path.is_dir():
        found = [path / name for name in PARTS if (path / name).exists()]
        if not found:
            raise UserError(f"{path} holds no weights: none of {', '.join(PARTS)} is in it")
        path = found[0]
    if not path.exists():
        raise UserError(f"there is no {path}")
    if path.name.endswith(".index.json"):
        file = RawCheckpoint(path, _read_parts(path))
    else:
        file = _read_one(path, state, ema)
    if ema and not file.choice:
        raise UserError(f"--ema: {path} holds no average of its model: none of {', '.join(_AVERAGES)}")
    config, prepared = (_beside(path, name) for name in ("config.json", "preprocessor_config.json"))
    return replace(file, config=config, prepared=prepared)


def _beside(path: Path, name: str) -> dict[str, Any]:
    beside = path.parent / name
    return _json(beside) if beside.exists() else {}


def _read_one(path: Path, state: str = "", ema: bool = False) -> RawCheckpoint:
    """A file's tensors, settings and metadata."""
    try:
        with open(open_regular(path), "rb") as file:
            start, size = file.read(64), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        if path.suffix == ".safetensors":
            tensors, metadata = _read_safetensors(path)
            return RawCheckpoint(path, _checked(tensors, size), metadata=metadata)
        content = _read_zip(path) if start.startswith(b"PK\x03\x04") else _read_plain(path)
        tensors, state, choice = _find_tensors(content, path, state, ema)
        return RawCheckpoint(path, _checked(tensors, size), _flat(content), state=state, choice=choice)
    except UserError:
        raise
    except Exception as error:  # torch and safetensors raise many kinds over a damaged file
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        if wanted and not _guess(start):
            raise _refusal(path, wanted[1]) from error
        reason = _guess(start) or f"it is damaged, or no file of weights ({first_line(error).split('. ')[0]})"
        raise UserError(f"{path} cannot be read: {reason}") from error


def _read_parts(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index names, which are beside it."""
    named = _json(index).get("weight_map")
    values = named.values() if isinstance(named, dict) else ()
    parts = sorted({shown(value) if not isinstance(value, str) else value for value in values})
    if not 1 <= len(parts) <= MAX_FILES:
        raise UserError(f"{index} names {len(parts):,} files of weights: at least 1, at most {MAX_FILES}")
    tensors: dict[str, Tensor] = {}
    for part in parts:
        if Path(part).name != part or "\0" in part or part.endswith(".json"):
            raise UserError(f"{index} names {shown(part)}, which is no file of weights beside it")
        path = index.parent / part
        real, beside = (os.path.dirname(os.path.realpath(one)) for one in (path, index))
        if real != beside:  # in the hub's cache, all are links to one other folder
            path = inside(index.parent, part)
        tensors |= _read_one(path).tensors
    return tensors


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        if len(names) > MAX_TENSORS:
            raise ValueError(f"{len(names):,} tensors, at most {MAX_TENSORS:,}")
        return {name: file.get_tensor(name) for name in names}, file.metadata() or {}


def _read_zip(path: Path) -> Any:
    """What torch saves: a zip whose files are not compressed, of which data.pkl is a pickle.

    torch reads zips by another library. Files of which the two could think differently are refused: with anything
    before, between or after the tables at the end, or with names that differ in case only.
    """
    with open(open_regular(path), "rb", buffering=0) as raw:
        size = os.fstat(raw.fileno()).st_size
        _check_end(raw, size)
        with zipfile.ZipFile(_Capped(raw)) as archive:
            entries = archive.infolist()
            total = sum(entry.file_size for entry in entries)
            names = [entry.filename.casefold() for entry in entries]
            if len(set(names)) < len(names) or any(
                ".pkl" in name and not entry.filename.endswith("/data.pkl")
                for name, entry in zip(names, entries, strict=True)
            ):
                raise ValueError("names that torch does not write")
            if total > size or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError(f"its parts would unpack to {total:,} bytes, and torch does not pack them")
            for entry in entries:
                if entry.filename.endswith(".pkl"):
                    del entry.CRC  # torch can be told to write none
                    _check_pickle(archive.read(entry), path)
    return _unpickle(path, mmap=True)


def _check_end(raw: io.FileIO, size: int) -> None:
    """Refuse a zip unless its table of contents ends where the record of that table begins, at the file's end."""
    end = size - 22
    raw.seek(max(0, end))
    sign, *_, length, offset, comment = struct.unpack("<4s4H2LH", raw.read(22).ljust(22, b"\0"))
    if sign != b"PK\5\6" or comment:
        raise ValueError("something after its table of contents")
    raw.seek(max(0, end - 76))
    long = raw.read(76).ljust(76, b"\0")
    if long[:4] == b"PK\6\6" and long[56:60] == b"PK\6\7":  # the records of large zips, between the two
        length, offset = struct.unpack("<2Q", long[40:56])
        end -= 76
    if offset + length != end:
        raise ValueError("something beside its table of contents")


def _read_plain(path: Path) -> Any:
    """What torch saved before 1.6: pickles, and the tensors' bytes after them."""
    data = read_file(path, MAX_PLAIN_BYTES)
    _check_pickle(data, path)
    return _unpickle(_Counted(data), mmap=False)


def _unpickle(source: "Path | io.BytesIO", mmap: bool) -> Any:
    with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, over damaged files
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)


def _check_pickle(data: bytes, path: Path) -> None:
    """Refuse pickles that would take memory or time without end. Reads their instructions, and carries out none."""
    if b"bytearray\n" in data:  # torch allows it: a few bytes would ask for all of the memory
        raise _refusal(path, "bytearray")
    stream = io.BytesIO(data)
    for _ in range(_PICKLES):
        if stream.tell() < len(data):
            _check_tuples(stream)


def _check_tuples(stream: io.BytesIO) -> None:
    """Read one pickle. Raises ValueError for a tuple that is nested without end, or a pickle that is none."""
    stack: list[int] = []  # of each object, how many a tuple holds in all its depth; of a mark, 0
    memo: dict[int, int] = {}
    for code, argument, _ in genops(stream):
        name = code.name
        if name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo.get(int(argument or 0), 1))
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else int(argument or 0)] = stack[-1] if stack else 1
        else:
            held = [stack.pop() for _ in code.stack_before if stack and markobject not in code.stack_before]
            if markobject in code.stack_before:
                while stack and (top := stack.pop()):
                    held.append(top)
                if name in ("APPENDS", "SETITEMS", "ADDITEMS") and stack:
                    stack.pop()
            size = 1 + sum(held) if name.startswith("TUPLE") else 1
            if size > _MAX_TUPLE:  # hashing it, as a key, would take years inside of compiled code
                raise ValueError(f"a tuple of more than {_MAX_TUPLE:,} parts")
            stack += [0 if what is markobject else size for what in code.stack_after]


def _refusal(path: Path, wanted: str) -> UserError:
    return UserError(
        f"{path} is a pickle that asks for {wanted}, which could run any code: it is refused, and nothing "
        "of it was run. If you trust who trained_at it, save its tensors alone as safetensors where it came from."
    )


class _Capped(io.BufferedReader):
    """A file that gives no more at once than a pickle may have: a zip's own table of contents is read whole."""

    def read(self, size: int | None = -1, /) -> bytes:
        wanted = MAX_PICKLE_BYTES + 1
        data = super().read(wanted if size is None or size < 0 else min(size, wanted))
        if len(data) == wanted:
            raise OSError(f"a part of more than {MAX_PICKLE_BYTES:,} bytes")
        return data


class _Counted(io.BytesIO):
    """Bytes of which pickles may take a bounded part; tensors are read by `readinto`."""

    _left = MAX_PICKLE_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        return self._count(super().read(size))

    def readline(self, size: int | None = -1, /) -> bytes:
        return self._count(super().readline(size))

    def _count(self, data: bytes) -> bytes:
        self._left -= len(data)
        if self._left < 0:
            raise OSError(f"a pickle of more than {MAX_PICKLE_BYTES:,} bytes")
        return data


def _checked(tensors: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """The tensors, if they are plain ones that hold no more than their file of `size` bytes (shared ones twice)."""
    if len(tensors) > MAX_TENSORS:
        raise ValueError(f"{len(tensors):,} tensors, at most {MAX_TENSORS:,}")
    for name, value in tensors.items():
        plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and value.device.type == "cpu"
        if not plain or value.dtype not in _DTYPES or len(name) > MAX_NAME:
            raise ValueError(f"{shown(name)} is no plain tensor")
    held = sum(value.numel() * value.element_size() for value in tensors.values())
    if held > 2 * size:
        raise ValueError(f"tensors of {held:,} bytes in a file of {size:,}")
    return {name: value.detach() for name, value in tensors.items()}


def _guess(start: bytes) -> str:
    """What a file is that is not what its name says, as far as its first bytes tell."""
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS, not the file itself: get it with `git lfs pull`"
    if start.lstrip()[:1] == b"<":
        return "it is a web page, not a file of weights: download it again"
    return ""


def _find_tensors(content: Any, path: Path, state: str, ema: bool) -> tuple[dict[str, Tensor], str, str]:
    """The model's tensors in what a training run saved, under what key, and of several models which one, in words."""
    if isinstance(content, Mapping):
        keys = dict.fromkeys((*((state,) if state else ()), *_STATES, *_AVERAGES))
        found = [key for key in keys if isinstance(content.get(key), Mapping) and _tensors(content[key])]
        averages = [key for key in found if key in _AVERAGES]
        if ema and not averages:
            return {}, "", ""
        if found:
            key = averages[0] if ema else found[0]
            others = " and ".join(f"'{other}'" for other in found if other != key)
            how = "--ema takes the average" if averages and not ema else "--prefix names another one"
            also = f"; it also holds {others}: {how}" if others else ""
            return _tensors(content[key]), key, f"taken: '{key}'{also}" if also or ema else ""
        if any(isinstance(value, Tensor) for value in content.values()):
            return _tensors(content), "", ""
    there = [str(key)[:40] for key in list(content)[:8]] if isinstance(content, Mapping) else type(content).__name__
    raise UserError(f"{path} holds no model: it has {there}, and under none of {', '.join(_STATES)} are there tensors")


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def _flat(content: Any) -> dict[str, Any]:
    """The training arguments of a file, nested names joined by dots: `args` of argparse, `config` of yacs, `meta`."""
    found: dict[str, Any] = {}
    left = 10_000  # a pickle can hold itself, and one dict in many places

    def walk(value: Any, name: str, depth: int) -> None:
        nonlocal left
        left -= 1
        if isinstance(value, Namespace):
            value = vars(value)
        if isinstance(value, Mapping) and depth < 8:
            for key, inner in value.items():
                if left > 0 and isinstance(key, str) and len(key) <= MAX_NAME:
                    walk(inner, f"{name}.{key}" if name else key, depth + 1)
        elif isinstance(value, str | int | float | bool | list | tuple):
            found[name] = value

    if isinstance(content, Mapping):
        for key in ("args", "config", "meta"):
            walk(content.get(key), "", 0)
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
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
    (OrderedDict, "lightning.fabric.utilities.data.AttributeDict"),  # Lightning's hyper_parameters, here and below
    (OrderedDict, "lightning_fabric.utilities.data.AttributeDict"),
    (OrderedDict, "pytorch_lightning.utilities.parsing.AttributeDict"),
    (_Inert, "mmengine.config.config.Config"),
    (_Inert, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_Inert, "pathlib.PosixPath"),
    (_Inert, "pathlib._local.PosixPath"),  # the same, of Python 3.13
    (_nothing, "getattr"),  # a HistoryBuffer's table of its own methods
    (_nothing, "builtins.getattr"),
    # numpy's scalars and arrays, of accuracies and losses: numpy itself would trust what a file says of their memory
    (_Inert, "numpy.dtype"),
    (_Inert, "numpy.ndarray"),
    (_Inert, "numpy.core.multiarray._reconstruct"),
    (_Inert, "numpy._core.multiarray._reconstruct"),
    (_Inert, "numpy.core.multiarray.scalar"),
    (_Inert, "numpy._core.multiarray.scalar"),
]

_DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}
