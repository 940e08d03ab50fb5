"""Images in a column of a Hugging Face data set, read straight from its Arrow table.

The table is memory-mapped and never changes, so any number of threads may read it. A row's bytes are copied out with
the GIL released: a page that is not in memory yet makes one thread wait, and not all of them.
"""

from __future__ import annotations

from bisect import bisect_right
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Shaped
from torch import Tensor

from pixmim.data.decode import decode
from pixmim.data.source import COLOUR, BadImage, Form, Source
from pixmim.errors import UserError, nearest

if TYPE_CHECKING:
    from datasets import Dataset


class Table(Source):
    """The images of a map-style `datasets.Dataset`, selected and shuffled as it may be.

    spec    what the user wrote to get it
    name    what stands before the row's number in messages
    image   column of pictures: the library's Image, bytes, a struct of bytes and path, or paths; by default the only
            column that holds pictures
    label   column of classes: ClassLabel, whole numbers, strings or booleans; by default the only ClassLabel
    folder  where paths without bytes begin

    Raises UserError for an empty data set, a column that is not there or cannot serve, and a choice left open.
    """

    def __init__(
        self,
        dataset: Dataset,
        spec: str,
        form: Form = COLOUR,
        *,
        name: str = "",
        image: str = "",
        label: str = "",
        folder: Path = Path(),
    ) -> None:
        if not len(dataset):
            raise UserError(f"{spec} holds no rows")
        self._spec, self._form, self._name, self._folder = spec, form, name or spec, folder
        indices = dataset._indices  # the rows left by a select or shuffle; there is no public name for them
        self._rows = None if indices is None else indices.column(0).to_numpy()
        self._length = len(dataset)
        column = image or _only_images(dataset, spec)
        self._bytes, self._paths = _cells(dataset, column, spec)
        self._starts = [0, *np.cumsum([len(chunk) for chunk in dataset.data.column(column).chunks]).tolist()]
        self._labels, self._classes, said = _read_labels(dataset, label, self._rows, spec)
        self._about = f"pictures from column '{column}', {said}"
        self._fingerprint = f"{dataset._fingerprint}-{column}"  # the library's own, of all rows and what was done

    @property
    def spec(self) -> str:
        return self._spec

    @property
    def form(self) -> Form:
        return self._form

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        return self._labels

    @property
    def classes(self) -> list[str]:
        return self._classes

    @property
    def about(self) -> str:
        return self._about

    def __len__(self) -> int:
        return self._length

    def locate(self, index: int) -> str:
        path = self._path(*self._find(index))
        return f"{self._name}#{index}" + (f" ({path})" if path else "")

    def fingerprint(self) -> str:
        return self._fingerprint

    def image(self, index: int) -> Shaped[Tensor, "c h w"]:
        pixels = decode(self._read(*self._find(index)), self._form.channels)
        writable = pixels if pixels.flags.writeable else pixels.copy()
        return torch.from_numpy(writable).permute(2, 0, 1)

    def _find(self, index: int) -> tuple[int, int]:
        """The chunk of the table that holds a row, and the row in it."""
        row = index if self._rows is None else int(self._rows[index])
        chunk = bisect_right(self._starts, row) - 1
        return chunk, row - self._starts[chunk]

    def _read(self, chunk: int, row: int) -> bytes:
        import pyarrow

        if self._bytes and (cell := self._bytes[chunk][row]).is_valid:
            return pyarrow.BufferReader(cell.as_buffer()).read()  # as_py() would copy while it holds the GIL
        path = self._path(chunk, row)
        if not path:
            raise BadImage("the row has neither bytes nor a path")
        try:
            if "://" in path:  # inside an archive, or far away
                import fsspec

                with fsspec.open(path, "rb") as file:
                    return bytes(file.read())
            return (self._folder / path).read_bytes()
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from None
        except Exception as error:  # fsspec hands on what its many file systems raise
            raise BadImage(f"{path}: {error}") from None

    def _path(self, chunk: int, row: int) -> str:
        return (self._paths[chunk][row].as_py() or "") if self._paths else ""


def _only_images(dataset: Dataset, spec: str) -> str:
    """The only column that holds pictures: of the library's Image feature, or else the only one of bytes."""
    from datasets import Image

    found = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    found = found or [name for name in dataset.column_names if _holds_bytes(dataset.data.schema.field(name).type)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{spec} has several columns of pictures: add ,image= and one of {', '.join(found)}")
    raise UserError(f"{spec} has no column of pictures; its columns: {_kinds(dataset)}")


def _cells(dataset: Dataset, column: str, spec: str) -> list[list[Any]]:
    """Chunk by chunk, the bytes and the paths of a column; an empty list for what it does not have."""
    from pyarrow import types

    _check(column, dataset, spec)
    chunks, kind = dataset.data.column(column).chunks, dataset.data.schema.field(column).type
    if _is_bytes(kind):
        return [chunks, []]
    if _is_text(kind):
        return [[], chunks]
    if types.is_struct(kind):
        fields = [kind.field(i) for i in range(kind.num_fields)]
        flat = [chunk.flatten() for chunk in chunks]  # a view; a row that is null as a whole is so in each field
        data = next((i for i, field in enumerate(fields) if field.name == "bytes" and _is_bytes(field.type)), -1)
        path = next((i for i, field in enumerate(fields) if field.name == "path" and _is_text(field.type)), -1)
        if data >= 0 or path >= 0:
            return [[arrays[i] for arrays in flat] if i >= 0 else [] for i in (data, path)]
    raise UserError(
        f"column '{column}' of {spec} holds {_kind(dataset.features[column])} and no pictures, which are the library's "
        f"Image, bytes, a struct of bytes and path, or paths; its columns: {_kinds(dataset)}"
    )


def _read_labels(
    dataset: Dataset, wanted: str, rows: npt.NDArray[Any] | None, spec: str
) -> tuple[npt.NDArray[np.int64] | None, list[str], str]:
    """Class numbers of the rows, names of the classes, and where they come from in words."""
    import pyarrow
    from datasets import ClassLabel, Value
    from pyarrow import compute

    named = [name for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    if not wanted and len(named) != 1:
        choice = f" chosen: add ,label= and one of {', '.join(named)}" if named else ""
        return None, [], f"no classes{choice}"
    column = wanted or named[0]
    _check(column, dataset, spec)
    feature, values = dataset.features[column], dataset.data.column(column)
    values = values if rows is None else values.take(pyarrow.array(rows))
    if column in named:
        classes, numbers = list(feature.names), values
    elif isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "string", "large_string", "bool")):
        different = sorted(value for value in values.unique().to_pylist() if value is not None)
        classes, numbers = [str(value) for value in different], compute.index_in(values, pyarrow.array(different))
    else:
        raise UserError(f"column '{column}' of {spec} holds {_kind(feature)}; classes are ClassLabel, numbers or words")
    labels = numbers.cast(pyarrow.int64()).fill_null(-1).to_numpy()
    without = np.flatnonzero(labels < 0)  # the library's own sets write -1 where a test set keeps its labels back
    if not len(without):
        return labels, classes, f"classes from '{column}'"
    said = f"column '{column}' names no class in {len(without):,} of {len(labels):,} rows"
    if wanted:
        raise UserError(f"{spec}: {said}, the first of them {without[0]}")
    return None, [], f"no classes ({said})"


def _check(column: str, dataset: Dataset, spec: str) -> None:
    names = dataset.column_names
    if column not in names:
        raise UserError(f"{spec} has no column '{column}'{nearest(column, names)} Its columns: {_kinds(dataset)}")


def _is_bytes(kind: Any) -> bool:
    from pyarrow import types

    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _is_text(kind: Any) -> bool:
    from pyarrow import types

    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    field = kind.get_field_index("bytes") if types.is_struct(kind) else -1
    return _is_bytes(kind.field(field).type if field >= 0 else kind)


def _kinds(dataset: Dataset) -> str:
    return ", ".join(f"{name} ({_kind(feature)})" for name, feature in dataset.features.items())


def _kind(feature: Any) -> str:
    """A column's kind in a word: what a Value holds, or the feature's name."""
    name = type(feature).__name__
    return str(feature.dtype) if name == "Value" else name
