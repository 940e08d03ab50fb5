"""Read checkpoint files as data: safetensors, and torch files without unpickling anything that could run code."""

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
from typing import IO, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pixmim.utils.errors import UserError, first_line, shown
from pixmim.utils.files import open_regular, read_file, read_json, readable
from pixmim.utils.trust import inside

MAX_FILES = 512  # in an index
MAX_TENSORS = 65_536
MAX_NAME = 512  # characters of a tensor's name
MAX_PICKLE_BYTES = 32 * 2**20  # of a torch file without tensors; usual training state takes less than 1 MiB
MAX_LEGACY_BYTES = 8 * 2**30  # of a file of torch before 1.6, which is read into memory; others are memory-mapped
_LEGACY_PICKLES = 5  # consecutive pickles in such a file: magic number, version, system, model, names of storages
_MAX_TUPLE = 1_000_000

PARTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.pth",
)
"""Names of weight files in a folder (Hugging Face, timm, `pixmim export`), in order of preference."""

_STATES = (
    *("model", "state_dict", "module", "model_state_dict", "model_state", "network", "backbone"),
    *("teacher", "student", "target_encoder", "encoder"),
)
"""Keys of a model in training files, best first. DINO evaluates its teacher, I-JEPA the target encoder."""

_AVERAGES = ("state_dict_ema", "model_ema", "ema_state_dict", "model_ema_state_dict", "ema")
"""Keys of a moving average of the model in training files."""

_DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}


@dataclass(frozen=True)
class RawCheckpoint:
    """Content of a checkpoint file and of the JSON files next to it."""

    path: Path
    tensors: dict[str, Tensor]  # the model's, by the file's own names
    settings: dict[str, Any] = field(default_factory=dict)  # training arguments, flat: {"DATA.IMG_SIZE": 192}
    config: dict[str, Any] = field(default_factory=dict)  # config.json (Hugging Face, timm)
    preprocessor: dict[str, Any] = field(default_factory=dict)  # preprocessor_config.json (Hugging Face)
    metadata: dict[str, str] = field(default_factory=dict)  # of a safetensors file
    state: str = ""  # key of the model in a training file
    note: str = ""  # line to print about the chosen model if the file contains several


def read(path: Path, state: str = "", ema: bool = False) -> RawCheckpoint:
    """Read a checkpoint file, or a folder that contains one, onto the CPU.

    Torch files are read with `weights_only=True` and a list of harmless classes. A pickle that refers to anything else
    is refused before any of it runs. Of a training file, the model with the key `state`, such as student, is preferred,
    or with `ema` its moving average. Raises UserError if the file cannot be read, or contains no such model.
    """
    if path.is_dir():
        existing = [path / name for name in PARTS if (path / name).exists()]
        if not existing:
            raise UserError(f"{path} contains no weights: expected one of {', '.join(PARTS)}")
        path = existing[0]
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if path.name.endswith(".index.json"):
        checkpoint = RawCheckpoint(path, _read_index(path))
    else:
        checkpoint = _read_file(path, state, ema)
    if ema and not checkpoint.note:
        raise UserError(f"--ema: {path} contains no average of its model: none of the keys {', '.join(_AVERAGES)}")
    config, preprocessor = (
        _read_json(path.with_name(name)) if path.with_name(name).exists() else {}
        for name in ("config.json", "preprocessor_config.json")
    )
    return replace(checkpoint, config=config, preprocessor=preprocessor)


def _read_file(path: Path, state: str = "", ema: bool = False) -> RawCheckpoint:
    with readable(path), open(open_regular(path), "rb") as file:
        start, size = file.read(64), os.fstat(file.fileno()).st_size
    try:
        if path.suffix == ".safetensors" or start[8:9] == b"{":  # by any name: 8 bytes of length, and a JSON header
            with safe_open(path, "pt") as tensors_file:
                names = list(tensors_file.keys())
                if len(names) > MAX_TENSORS:
                    raise ValueError(f"{len(names):,} tensors, at most {MAX_TENSORS:,}")
                tensors = {name: tensors_file.get_tensor(name) for name in names}
                return RawCheckpoint(path, _checked(tensors, size), metadata=tensors_file.metadata() or {})
        if start.startswith(b"PK\x03\x04"):
            content = _read_zip(path)
        else:  # torch before 1.6: consecutive pickles, followed by the tensors' bytes
            data = read_file(path, MAX_LEGACY_BYTES)
            _check_pickles(data, path)
            content = _unpickle(_CountedBytes(data), mmap=False)
        tensors, state, note = _find_model(content, path, state, ema)
        return RawCheckpoint(path, _checked(tensors, size), _training_arguments(content), state=state, note=note)
    except UserError:
        raise
    except Exception as error:  # torch and safetensors raise many exception types for damaged files
        hint, refused = _guess_content(start), re.search(r"GLOBAL (\S+)", str(error))
        if refused and not hint:
            raise _refusal(path, refused[1]) from error
        hint = hint or f"it is damaged or not a weights file ({first_line(error).split('. ')[0]})"
        raise UserError(f"{path} cannot be read: {hint}") from error


def _read_index(index: Path) -> dict[str, Tensor]:
    """Read the tensors of all files that an index lists. They must be in its folder."""
    weight_map = _read_json(index).get("weight_map")
    values = weight_map.values() if isinstance(weight_map, dict) else ()
    names = sorted({value if isinstance(value, str) else shown(value) for value in values})
    if not 1 <= len(names) <= MAX_FILES:
        raise UserError(f"{index} lists {len(names):,} weight files: expected 1 to {MAX_FILES}")
    tensors: dict[str, Tensor] = {}
    for name in names:
        if Path(name).name != name or "\0" in name or name.endswith(".json"):
            raise UserError(f"{index} lists {shown(name)}, which is not a weight file in the same folder")
        path = index.with_name(name)
        target, index_target = (os.path.dirname(os.path.realpath(one)) for one in (path, index))
        if target != index_target:  # in the hub's cache, all files are links into one other folder
            path = inside(index.parent, name)
        tensors |= _read_file(path).tensors
    return tensors


def _read_zip(path: Path) -> Any:
    """Read a torch file: a zip of uncompressed entries, of which data.pkl is a pickle.

    torch reads zips with another library. Files that the two could interpret differently are refused: with bytes
    before, between or after the directory records, or with names that differ in case only.
    """
    with open(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        _check_zip_end(file, size)
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            unpacked = sum(entry.file_size for entry in entries)
            pickles = [entry for entry in entries if ".pkl" in entry.filename.casefold()]
            unique = {entry.filename.casefold() for entry in entries}
            if len(unique) < len(entries) or any(not entry.filename.endswith("/data.pkl") for entry in pickles):
                raise ValueError("entry names that torch does not write")
            stored = all(e.compress_type == zipfile.ZIP_STORED and e.compress_size == e.file_size for e in entries)
            if unpacked > size or not stored:
                raise ValueError(f"its entries would unpack to {unpacked:,} bytes, and torch does not compress them")
            for entry in pickles:
                if entry.file_size > MAX_PICKLE_BYTES:
                    raise ValueError(f"a pickle of more than {MAX_PICKLE_BYTES:,} bytes")
                del entry.CRC  # torch can omit checksums
                _check_pickles(archive.read(entry), path)
    return _unpickle(path, mmap=True)


def _check_zip_end(file: IO[bytes], size: int) -> None:
    """Refuse a zip unless its central directory is bounded and ends where the end record starts, at the file's end."""
    end = size - 22
    file.seek(max(0, end))
    signature, *_, length, offset, comment = struct.unpack("<4s4H2LH", file.read(22).ljust(22, b"\0"))
    if signature != b"PK\5\6" or comment:
        raise ValueError("bytes after its central directory")
    file.seek(max(0, end - 76))
    zip64 = file.read(76).ljust(76, b"\0")
    if zip64[56:60] == b"PK\6\7":  # the locator of a zip64, after its end record
        end -= 76
        length, offset, _, _, end_record = struct.unpack("<2Q2LQ", zip64[40:72])
        if zip64[:4] != b"PK\6\6" or end_record != end:
            raise ValueError("bytes around its zip64 records")
    if length > MAX_PICKLE_BYTES or offset + length != end:
        raise ValueError("bytes around its central directory, or too many in it")


def _unpickle(source: "Path | io.BytesIO", mmap: bool) -> Any:
    with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's warnings about damaged files
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)


def _check_pickles(data: bytes, path: Path) -> None:
    """Refuse pickles that would take unbounded memory or time. Lists their opcodes without executing them."""
    if b"bytearray\n" in data:  # torch allows it, and a few bytes would allocate all memory
        raise _refusal(path, "bytearray")
    stream = io.BytesIO(data)
    for _ in range(_LEGACY_PICKLES):
        if stream.tell() < len(data):
            _check_tuples(stream)


def _check_tuples(stream: io.BytesIO) -> None:
    """Simulate one pickle's stack and raise ValueError for an exponentially nested tuple.

    As a dictionary key, such a tuple would be hashed for years inside compiled code.
    """
    stack: list[int] = []  # for each object, the number of objects in it if it is a tuple; 0 for a mark
    memo: dict[int, int] = {}
    for opcode, argument, _ in genops(stream):
        name = opcode.name
        if name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo.get(int(argument or 0), 1))
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else int(argument or 0)] = stack[-1] if stack else 1
        else:
            marked = markobject in opcode.stack_before
            popped = [] if marked else [stack.pop() for _ in opcode.stack_before if stack]
            if marked:
                while stack and (top := stack.pop()):
                    popped.append(top)
                if name in ("APPENDS", "SETITEMS", "ADDITEMS") and stack:
                    stack.pop()
            size = 1 + sum(popped) if name.startswith("TUPLE") else 1
            if size > _MAX_TUPLE:
                raise ValueError(f"a tuple of more than {_MAX_TUPLE:,} parts")
            stack += [0 if kind is markobject else size for kind in opcode.stack_after]


def _refusal(path: Path, name: str) -> UserError:
    return UserError(
        f"{path} is a pickle that refers to {name}, which could run any code. It was refused before any of it ran. If "
        "you trust its author, save only its tensors, as safetensors, where the file comes from."
    )


class _CountedBytes(io.BytesIO):
    """Bytes of which pickles may read a bounded amount. Tensors are read by `readinto`, which is not counted."""

    _remaining = MAX_PICKLE_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        return self._count(super().read(size))

    def readline(self, size: int | None = -1, /) -> bytes:
        return self._count(super().readline(size))

    def _count(self, data: bytes) -> bytes:
        self._remaining -= len(data)
        if self._remaining < 0:
            raise OSError(f"a pickle of more than {MAX_PICKLE_BYTES:,} bytes")
        return data


def _checked(tensors: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """Return the tensors, if they are dense CPU tensors of at most twice the bytes of their file (shared storages)."""
    if len(tensors) > MAX_TENSORS:
        raise ValueError(f"{len(tensors):,} tensors, at most {MAX_TENSORS:,}")
    for name, value in tensors.items():
        dense = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and value.device.type == "cpu"
        if not dense or value.dtype not in _DTYPES or len(name) > MAX_NAME:
            raise ValueError(f"{shown(name)} is not a plain tensor")
    nbytes = sum(value.numel() * value.element_size() for value in tensors.values())
    if nbytes > 2 * size:
        raise ValueError(f"tensors of {nbytes:,} bytes in a file of {size:,}")
    return {name: value.detach() for name, value in tensors.items()}


def _guess_content(start: bytes) -> str:
    """Return what a file is instead of weights, judged by its first bytes, and what to do; empty if unclear."""
    if not start:
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer instead of the file itself: run `git lfs pull`"
    return "it is a web page instead of weights: download it again" if start.lstrip()[:1] == b"<" else ""


def _find_model(content: Any, path: Path, state: str, ema: bool) -> tuple[dict[str, Tensor], str, str]:
    """Return the model's tensors in a training file, their key, and a note if there are several models."""
    if isinstance(content, Mapping):
        keys = [key for key in dict.fromkeys((state, *_STATES, *_AVERAGES)) if key]
        models = {key: _tensors(content[key]) for key in keys if isinstance(content.get(key), Mapping)}
        present = [key for key, tensors in models.items() if tensors]
        averages = [key for key in present if key in _AVERAGES]
        if ema and not averages:
            return {}, "", ""
        if present:
            key = averages[0] if ema else present[0]
            others = " and ".join(f"'{other}'" for other in present if other != key)
            flag = "--ema takes the average" if averages and not ema else "--prefix selects another one"
            also = f"; the file also contains {others}: {flag}" if others else ""
            return models[key], key, f"using '{key}'{also}" if also or ema else ""
        if any(isinstance(value, Tensor) for value in content.values()):
            return _tensors(content), "", ""
    keys_or_type = (
        [str(key)[:40] for key in list(content)[:8]] if isinstance(content, Mapping) else type(content).__name__
    )
    raise UserError(f"{path} contains no model: found {keys_or_type}, but tensors under none of {', '.join(_STATES)}")


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


def _training_arguments(content: Any) -> dict[str, Any]:
    """Flatten the training arguments of a file: `args` of argparse, `config` of yacs, `meta`."""
    arguments: dict[str, Any] = {}
    budget = 10_000  # a pickle can contain itself, or one dictionary many times

    def walk(value: Any, name: str, depth: int) -> None:
        nonlocal budget
        budget -= 1
        if isinstance(value, Namespace):
            value = vars(value)
        if isinstance(value, Mapping) and depth < 8:
            for key, inner in value.items():
                if budget > 0 and isinstance(key, str) and len(key) <= MAX_NAME:
                    walk(inner, f"{name}.{key}" if name else key, depth + 1)
        elif isinstance(value, str | int | float | bool | list | tuple):
            arguments[name] = value

    for key in ("args", "config", "meta") if isinstance(content, Mapping) else ():
        walk(content.get(key), "", 0)
    return arguments


def _read_json(path: Path) -> dict[str, Any]:
    with readable(path):
        content = read_json(path)
    return content if isinstance(content, dict) else {}


class _Inert:
    """A placeholder for objects in checkpoints that are not needed."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _no_op(*_: Any) -> None:
    """A placeholder for functions that checkpoints call."""


_LIGHTNING = "lightning.fabric.utilities.data", "lightning_fabric.utilities.data", "pytorch_lightning.utilities.parsing"

# weights_only substitutes the first of a pair for the name that a pickle refers to. numpy's own reconstruction would
# trust the file's claims about memory, so its scalars and arrays (accuracies, losses) are placeholders too.
_HARMLESS: list[Any] = [
    Namespace,  # training scripts of MAE, ConvMAE and timm
    *((OrderedDict, name) for name in ("yacs.config.CfgNode", "mmengine.config.config.ConfigDict")),
    *((OrderedDict, f"{module}.AttributeDict") for module in _LIGHTNING),  # of hyper_parameters
    *((_no_op, name) for name in ("getattr", "builtins.getattr")),  # HistoryBuffer's table of its own methods
    *((_Inert, f"mmengine.{name}") for name in ("config.config.Config", "logging.history_buffer.HistoryBuffer")),
    *((_Inert, f"pathlib.{name}") for name in ("PosixPath", "_local.PosixPath")),  # before and since Python 3.13
    *((_Inert, f"numpy.{name}") for name in ("dtype", "ndarray")),
    *((_Inert, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
]
