"""Columns of text from .csv, .tsv and .parquet files of untrusted origin."""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pixmim.data.huggingface import check_parquet
from pixmim.data.image_folder import MAX_LINES, read_utf8
from pixmim.utils.errors import UserError, first_line

_MAX_COLUMNS, _MAX_LINE_BYTES = 10_000, 2**22
_MAX_LISTED = 20  # columns in a message

Rows = Callable[[Sequence[int]], Iterator[list[str]]]
"""Yields the values of some columns, by their numbers, for each row; "" for none. Raises UserError."""


def open_table(file: Path) -> tuple[list[str], Rows]:
    """Open a table.

    A .csv is separated by commas, semicolons or tabs, whichever its first line has most of; a .tsv by tabs. Both are in
    UTF-8, or in UTF-16 with a byte-order mark. A .parquet needs pyarrow.

    Returns:
        The names of the columns, and a function that reads some of them, once.

    Raises:
        UserError: If the file cannot be read or has no column.
    """
    header, rows = (_open_parquet if file.suffix == ".parquet" else _open_text)(file)
    if not any(header):
        raise UserError(f"{file} is empty: its first line must name the columns")
    if len(header) > _MAX_COLUMNS:
        raise UserError(f"{file} has {len(header):,} columns: more than {_MAX_COLUMNS:,}")
    return header, rows


def column_list(header: Sequence[str]) -> str:
    """Return the first columns, for a message."""
    more = f" and {len(header) - _MAX_LISTED:,} more" if len(header) > _MAX_LISTED else ""
    return ", ".join(name[:100] for name in header[:_MAX_LISTED]) + more


def _open_text(file: Path) -> tuple[list[str], Rows]:
    """Return the header of a .csv or .tsv, and its rows. A .csv may be separated by commas, semicolons or tabs."""
    data = read_utf8(file)
    if b"\n" not in data:
        data = data.replace(b"\r", b"\n")
    first = data.partition(b"\n")[0].decode("utf-8", "replace")
    delimiter = "\t" if file.suffix.lower() == ".tsv" else max(",;\t", key=first.count)
    reader = csv.reader(_lines(file, data), delimiter=delimiter, strict=True)
    records = _explain_errors(file, reader)
    header = [name.strip() for name in next(records, [])]

    def rows(indices: Sequence[int]) -> Iterator[list[str]]:
        for row in records:
            if len(row) != len(header):
                if len(row) < 2 and not "".join(row).strip():
                    continue  # a blank line
                raise UserError(
                    f"{file}, line {reader.line_num:,}: {len(row):,} values, but the header has {len(header):,}"
                )
            yield [row[index].strip() for index in indices]

    return header, rows


def _explain_errors(file: Path, reader: Any) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num:,}: {error}") from None


def _lines(file: Path, data: bytes) -> Iterator[str]:
    for number, line in enumerate(io.BytesIO(data), 1):
        if len(line) > _MAX_LINE_BYTES:
            raise UserError(f"{file}, line {number:,}: longer than {_MAX_LINE_BYTES:,} bytes; is it a table?")
        try:
            yield line.decode()
        except UnicodeDecodeError:
            raise UserError(f"{file}, line {number:,}: not text in UTF-8. Save it as UTF-8") from None


def _open_parquet(file: Path) -> tuple[list[str], Rows]:
    """Return the columns of a .parquet, and its rows."""
    try:
        import pyarrow
        from pyarrow import parquet, types
    except ImportError as error:
        raise UserError(f"{file} needs pyarrow: pip install 'pixmim[parquet]'") from error
    check_parquet(str(file))
    try:
        table = parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file} cannot be read: {first_line(error)}") from error
    schema, count = table.schema_arrow, table.metadata.num_rows
    header = list(schema.names)
    if count > MAX_LINES:
        raise UserError(f"{file} has {count:,} rows: more than {MAX_LINES:,}")

    def rows(indices: Sequence[int]) -> Iterator[list[str]]:
        names = [header[index] for index in indices]
        for name in names:
            kind = schema.field(name).type
            if types.is_nested(kind) or types.is_binary(kind) or types.is_large_binary(kind):
                raise UserError(f"column '{name}' of {file} holds {kind}: paths, labels and groups are text or numbers")
        try:  # as dictionaries: a text that repeats in each row is in memory once
            reader = parquet.ParquetFile(file, read_dictionary=names)
            for batch in reader.iter_batches(columns=names):
                yield from map(list, zip(*(_texts(batch.column(name)) for name in names), strict=True))
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise UserError(f"{file} cannot be read: {first_line(error)}") from error

    return header, rows


def _texts(array: Any) -> list[str]:
    """Return the values of an Arrow array as text; "" for null and NaN."""
    if hasattr(array, "dictionary"):
        texts = _texts(array.dictionary)
        return ["" if index is None else texts[index] for index in array.indices.to_pylist()]
    return ["" if value is None or value != value else str(value).strip() for value in array.to_pylist()]
