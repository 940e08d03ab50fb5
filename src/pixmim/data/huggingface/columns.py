"""Which column of a Hugging Face data set holds the pictures and which the classes, and what is in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pixmim.utils.errors import UserError, nearest

if TYPE_CHECKING:
    from datasets import Dataset


def only_images(dataset: Dataset, spec: str) -> str:
    """The only column that holds pictures: of the library's Image feature, or else the only one of bytes.

    Raises UserError if there is none or more than one.
    """
    from datasets import Image

    found = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    found = found or [name for name in dataset.column_names if _holds_bytes(dataset.data.schema.field(name).type)]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{spec} has several columns of pictures: add ,image= and one of {', '.join(found)}")
    raise UserError(f"{spec} has no column of pictures; its columns: {_kinds(dataset)}")


def cells(dataset: Dataset, column: str, spec: str) -> list[list[Any]]:
    """Chunk by chunk, the bytes and the paths of a column; an empty list for what it does not have.

    Raises UserError if there is no such column, or one of another kind; pyarrow.ArrowInvalid for damaged data, which
    would be read from elsewhere in the memory.
    """
    from pyarrow import types

    _check(column, dataset, spec)
    chunks, kind = dataset.data.column(column).chunks, dataset.data.schema.field(column).type
    for chunk in chunks:
        chunk.validate(full=True)
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


def read_labels(
    dataset: Dataset, wanted: str, rows: npt.NDArray[Any] | None, spec: str
) -> tuple[npt.NDArray[np.int64] | None, list[str], str]:
    """Class numbers of the rows, names of the classes, and where they come from in words.

    wanted  a column of ClassLabel, whole numbers, words or booleans; empty: the only ClassLabel
    rows    the rows that are left by a selection, in their order

    Raises UserError if there is no such column, one of another kind, or a row without a class in a column asked for.
    """
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
    values.validate(full=True)
    values = values if rows is None else values.take(pyarrow.array(rows))
    if column in named:
        classes, numbers = list(feature.names), values
        if not all(isinstance(name, str) for name in classes):
            raise UserError(f"column '{column}' of {spec} names a class that is not a text")
    elif isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "string", "large_string", "bool")):
        different = sorted(value for value in values.unique().to_pylist() if value is not None)
        classes, numbers = (
            [str(value) for value in different],
            compute.index_in(values, pyarrow.array(different, values.type)),
        )
    else:
        raise UserError(f"column '{column}' of {spec} holds {_kind(feature)}; classes are ClassLabel, numbers or words")
    labels = numbers.cast(pyarrow.int64()).fill_null(-1).to_numpy()
    if len(labels) and labels.max() >= len(classes):
        raise UserError(f"{spec}: column '{column}' holds the class {labels.max()}, and there are {len(classes):,}")
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
        raise UserError(
            f"{spec} has no column '{column}'{nearest(column, names) or '.'} Its columns: {_kinds(dataset)}"
        )


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
