"""Files of a checkpoint: safetensors and a JSON manifest, from which any number of processes can restore tensors.

Each process writes its tensors, or its slices along dimension 0, to `rank-NNNNN.safetensors`, and rank 0 writes
`checkpoint.json`, which lists the pieces of each tensor. Nothing is unpickled. The folder may be untrusted: unless
names, shapes and dtypes are those of the model, it is refused before any tensor is read.
"""

import json
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from pixmim.utils.errors import UserError, first_line
from pixmim.utils.files import open_regular, parse_json, read_text
from pixmim.utils.trust import inside

MANIFEST = "checkpoint.json"
FORMAT = 1

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class DamagedError(Exception):
    """A checkpoint is incomplete or changed, or is not a checkpoint."""


class Piece(NamedTuple):
    """Rows `start` to `end` of a tensor: their byte offset in the file of a rank, and their checksum."""

    rank: int
    start: int
    end: int
    offset: int
    crc32: int


class Entry(NamedTuple):
    """A tensor of a manifest: dtype in the spelling of safetensors, shape, and pieces in order."""

    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


class Manifest(NamedTuple):
    """Contents of a checkpoint: steps done, size of the dataset, and tensors by name."""

    step: int
    images: int
    tensors: dict[str, Entry]


@dataclass(frozen=True)
class Part:
    """Rows of a tensor on this rank, from row `start`; `shape` is that of the full tensor."""

    rows: Tensor
    start: int
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + _rows(self.rows.shape)


def own_share(state: Mapping[str, Tensor], rank: int, size: int) -> dict[str, Part]:
    """Copy to the CPU what a rank writes of a state: its shards, and an equal share of the unsharded tensors."""
    mine, loads = {}, [0] * size
    for name, tensor in sorted(state.items(), key=lambda item: (-item[1].nbytes, item[0])):
        part = _part(tensor)
        writer = rank
        if not isinstance(tensor, DTensor):
            writer = loads.index(min(loads))
            loads[writer] += tensor.nbytes
        if writer == rank:
            mine[name] = Part(part.rows.to("cpu", copy=True).contiguous(), part.start, part.shape)
    return mine


def write_share(folder: Path, parts: Mapping[str, Part], rank: int) -> dict[str, Entry]:
    """Write the file of a rank and return the entries of its tensors: one piece each, or none without rows.

    Raises:
        OSError: If it exists or cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(parts.items(), key=lambda item: -item[1].rows.element_size())  # keeps tensors aligned
    at = 0
    for name, part in ordered:
        size = part.rows.nbytes
        dtype = _DTYPES[part.rows.dtype]
        header[name] = {"dtype": dtype, "shape": list(part.rows.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    entries = {}
    with (folder / _file(rank)).open("xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, part in ordered:
            content = _bytes(part.rows)
            piece = Piece(rank, part.start, part.end, file.tell(), zlib.crc32(content))
            file.write(content)
            entries[name] = Entry(_DTYPES[part.rows.dtype], part.shape, (piece,) if part.end > part.start else ())
        file.flush()
        os.fsync(file.fileno())
    return entries


def write_manifest(folder: Path, step: int, images: int, shares: Iterable[Mapping[str, Entry]]) -> None:
    """Write the manifest of all shares, which completes a checkpoint.

    Raises:
        OSError: If it cannot be written.
    """
    tensors: dict[str, dict[str, Any]] = {}
    for share in shares:
        for name, entry in share.items():
            tensor = tensors.setdefault(name, {"dtype": entry.dtype, "shape": entry.shape, "pieces": []})
            tensor["pieces"] += entry.pieces
    text = _text({"step": step, "images": images, "tensors": tensors})
    with (folder / MANIFEST).open("x") as file:
        file.write(f'{{"format":{FORMAT},"crc32":{zlib.crc32(text.encode())},"content":{text}}}')
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Read and check a manifest. Whether it fits a model and the other files is not checked.

    Raises:
        DamagedError: If it is not a manifest, or its pieces do not cover each tensor exactly once.
        UserError: If it has another format version.
    """
    try:
        path = inside(inside(folder.parent, folder.name), MANIFEST)
        manifest = parse_json(read_text(path), MANIFEST)
    except (OSError, UserError) as error:
        raise DamagedError(first_line(error)) from error
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise DamagedError(f"{MANIFEST} is not a manifest")
    if manifest["format"] != FORMAT:
        raise UserError(
            f"{folder / MANIFEST} has format {json.dumps(manifest['format'])[:40]}, but this version of "
            f"pixmim reads {FORMAT}: use the version that wrote it"
        )
    try:
        content = manifest["content"]
        if zlib.crc32(_text(content).encode()) != manifest["crc32"]:
            raise DamagedError(f"{MANIFEST} has a wrong checksum")
        tensors = {name: _entry(value) for name, value in content["tensors"].items()}
        return Manifest(_count(content["step"]), _count(content["images"]), tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"{MANIFEST} is not a manifest: {first_line(error)}") from error


def difference(tensors: Mapping[str, Entry], state: Mapping[str, Tensor]) -> str:
    """Describe the first difference between the tensors of a manifest and a state; empty if they are equal."""
    for name in state:
        if name not in tensors:
            return f"it lacks {name}"
        entry, part = tensors[name], _part(state[name])
        if (entry.dtype, entry.shape) != (_DTYPES[part.rows.dtype], part.shape):
            return f"{name} is {entry.dtype[:8]} {entry.shape[:8]} instead of {_DTYPES[part.rows.dtype]} {part.shape}"
    extra = next((name for name in tensors if name not in state), None)
    return "" if extra is None else f"it has {extra[:100]}, which the model lacks"


def restore(folder: Path, tensors: Mapping[str, Entry], state: Mapping[str, Tensor]) -> None:
    """Copy tensors into a state from which they have no `difference`, in place; for a shard, only its rows.

    Raises:
        DamagedError: If a file is damaged. The state may then be partly restored.
    """
    parts = {name: _part(tensor) for name, tensor in state.items()}
    needed = [
        (piece, name)
        for name, part in parts.items()
        for piece in tensors[name].pieces
        if piece.start < part.end and part.start < piece.end
    ]
    for rank, group in groupby(sorted(needed), key=lambda item: item[0].rank):
        try:
            with open(open_regular(inside(folder, _file(rank))), "rb") as file:
                for piece, name in group:
                    _copy(piece, _read(file, piece, parts[name]), parts[name])
        except (OSError, UserError) as error:
            raise DamagedError(f"{_file(rank)}: {first_line(error)}") from error


def _part(tensor: Tensor) -> Part:
    """Return the rows of a tensor on this rank: all of them, unless FSDP2 sharded it."""
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        return Part(tensor.detach(), 0, shape)
    if tuple(tensor.placements) != (Shard(0),):
        raise NotImplementedError(f"only shards along dimension 0 can be stored, not {tensor.placements}")
    mesh = tensor.device_mesh
    start = min(-(-shape[0] // mesh.size()) * mesh.get_local_rank(), shape[0])  # as torch.chunk does
    return Part(tensor.to_local().detach(), start, shape)


def _read(file: BufferedReader, piece: Piece, part: Part) -> Tensor:
    """Read a piece of the tensor that `part` belongs to, and check it."""
    shape = (piece.end - piece.start, *part.shape[1:]) if part.shape else ()
    rows = torch.empty(shape, dtype=part.rows.dtype)
    content = _bytes(rows)
    file.seek(piece.offset)
    if file.readinto(content) < len(content):
        raise DamagedError(f"{_file(piece.rank)} ends early")
    if zlib.crc32(content) != piece.crc32:
        raise DamagedError(f"{_file(piece.rank)} has a wrong checksum")
    return rows


def _copy(piece: Piece, rows: Tensor, part: Part) -> None:
    """Copy the rows that a piece and a part have in common."""
    if not part.shape:
        part.rows.copy_(rows)
        return
    low, high = max(piece.start, part.start), min(piece.end, part.end)
    part.rows[low - part.start : high - part.start].copy_(rows[low - piece.start : high - piece.start])


def _entry(value: Any) -> Entry:
    """Parse an entry of an untrusted manifest. Raises ValueError, or the errors of wrong types."""
    shape = tuple(_count(size) for size in value["shape"])
    pieces = sorted((Piece(*map(_count, piece)) for piece in value["pieces"]), key=lambda piece: piece.start)
    at = 0
    for piece in pieces:
        if piece.start != at or piece.end <= at:
            raise ValueError("pieces overlap or leave a gap")
        at = piece.end
    if at != _rows(shape):
        raise ValueError("pieces do not make up a tensor")
    return Entry(str(value["dtype"]), shape, tuple(pieces))


def _count(value: object) -> int:
    """Return an integer of 0 or more, within 63 bits. Raises ValueError."""
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError("a number is out of range")
    return value


def _rows(shape: tuple[int, ...]) -> int:
    """Return the length along dimension 0; a scalar is one row."""
    return shape[0] if shape else 1


def _file(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, without copying."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _text(content: object) -> str:
    return json.dumps(content, separators=(",", ":"))
