"""Images and labels from a table: a .csv, .tsv or .parquet file with a column of paths and one of classes, or a .txt.

A .csv is separated by what Excel's first line `sep=;` names, or else by commas, semicolons or tabs, whichever its first
line has most of outside quotes; a .tsv by tabs, if its first line has any. A .txt has no header: each line is a path
and a class, after a tab, a comma or a space. All are in UTF-8, or in UTF-16 with a byte-order mark. A .parquet needs
pyarrow.
"""

import csv
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pixmim.data.dataset import RGB, ImageSpec, number_names
from pixmim.data.huggingface import check_parquet
from pixmim.data.image_folder import (
    MAX_LINES,
    ImageFolder,
    PathList,
    check_inside,
    from_list_file,
    is_image_name,
    read_utf8,
    root_remedy,
)
from pixmim.data.uri import read_options, read_root
from pixmim.utils.errors import UserError, did_you_mean, first_line, shown

USUAL_COLUMNS = {
    "path": (
        *("path", "file", "filename", "file_name", "filepath", "file_path"),
        *("image", "image_path", "image_file", "image_name", "img"),
    ),
    "label": ("label", "class", "category", "class_name", "label_name", "target"),
    "group": tuple(f"{name}{end}" for name in ("group", "patient", "subject", "slide", "video") for end in ("", "_id")),
}
"""Usual names of the columns of paths, classes, and what belongs together. The first that a table has is used."""

_EXCEL_SEPARATOR = re.compile(rb'(?i)"?sep=([\x20-\x7e\t])"?[,;\t]*\r?\n')
"""A first line that tells Excel the separator; it may be quoted, or filled up to the number of columns."""

_QUOTED = re.compile(r'"[^"]*"')

_MAX_COLUMNS, _MAX_LINE_BYTES = 10_000, 2**22
_MAX_LENGTH = 4096  # characters of a path, class or group
_MAX_SOUGHT = 100  # files that are looked for at opening
_MAX_LISTED = 20  # columns in a message

Rows = Callable[[Sequence[int]], Iterator[list[str]]]
"""Yields the values of some columns, by their numbers, for each row; "" for none. Raises UserError."""


def is_label_table(file: Path, options: Mapping[str, Sequence[str]]) -> bool:
    """Return True for a .csv or .tsv file, and for a .parquet file of paths.

    A parquet file that may hold images (a column of bytes or structs) has paths only if `options`, which the user gave
    after its name, include `path=` or `group=`.
    """
    if file.suffix.lower() in (".csv", ".tsv"):
        return file.is_file()
    if file.suffix.lower() != ".parquet" or not file.is_file() or "image" in options:
        return False
    if "path" in options or "group" in options:
        return True
    try:
        import pyarrow
        from pyarrow import parquet, types

        schema = parquet.read_schema(file)
    except ImportError:
        return False  # the reader of images names what to install
    except (OSError, pyarrow.ArrowException):
        return False  # the reader of images explains the damage
    kinds = (types.is_binary, types.is_large_binary, types.is_struct)
    return not any(is_kind(arrow_type) for arrow_type in schema.types for is_kind in kinds)


def open_label_table(spec: str, image_spec: ImageSpec = RGB) -> ImageFolder:
    """Open the images that a table lists, as in `labels.csv,path=file,label=finding,group=patient,root=FOLDER`.

    The first three options name columns, which are otherwise those of USUAL_COLUMNS. A table without a column of
    classes has no labels. Paths start from `root`, by default the folder of the file, and must stay below it. Rows
    without a label or a path, and repeated rows, are left out and counted. Classes are sorted by name.

    Raises:
        UserError: If the table cannot be read, lacks a column, lists no image, none that exists or one outside the
            folder, or gives one image two labels or groups.
    """
    name, options = read_options(spec, "a table of labels", ("path", "label", "group", "root"))
    file = Path(os.path.expanduser(name))
    root = read_root(options.get("root", [""])[0], spec) or file.parent
    header, rows = (_open_parquet if file.suffix.lower() == ".parquet" else open_csv)(file)
    if not any(header):
        raise UserError(f"{file} is empty: its first line must name the columns")
    if len(header) > _MAX_COLUMNS:
        raise UserError(f"{file} has {len(header):,} columns: more than {_MAX_COLUMNS:,}")
    found = {role: _find_column(file, header, role, options.get(role, [""])[0]) for role in USUAL_COLUMNS}
    columns = {role: index for role, index in found.items() if index is not None}
    about = f"paths from column '{header[columns['path']]}'"
    about += f", classes from '{header[columns['label']]}'" if "label" in columns else ", no classes"
    about += f", groups from '{header[columns['group']]}'" if "group" in columns else ""
    remedy = f"'{name},root=FOLDER' starts them from a folder that they are all below"
    dataset = _make(spec, image_spec, file, [root], rows, columns, about, remedy)
    dataset.label_hint = f"add ,label=COLUMN with one of its columns: {_listed(header)}"
    return dataset


def open_list(spec: str, image_spec: ImageSpec = RGB) -> ImageFolder:
    """Open the images that a .txt file lists, with their classes if its first line has one.

    A line is a path as `from_list_file` takes it, or with classes `PATH, CLASS`, also separated by a tab or a space:
    the class is what follows the last of the first line's separator. Lines without a class are left out and counted.

    Raises:
        UserError: As `from_list_file`, and as `open_label_table` of a list with classes.
    """
    name, options = read_options(spec, "a .txt list", ("root",))
    file, root = Path(os.path.expanduser(name)), read_root(options.get("root", [""])[0], spec)
    text = read_utf8(file)
    separator = _separator(_first_line(text), file.parent)
    if not separator:
        return from_list_file(spec, image_spec, text)

    def rows(indices: Sequence[int]) -> Iterator[list[str]]:
        for line in map(str.strip, _lines(file, text)):
            path, _, label = line.rpartition(separator)
            if not path or is_image_name(label):  # a path that contains the separator
                path, label = line, ""
            if line:
                yield [(path.strip(), label.strip())[index] for index in indices]

    folders, remedy = [file.parent, *([] if root is None else [root])], root_remedy(name)
    return _make(
        spec, image_spec, file, folders, rows, {"path": 0, "label": 1}, "a path and a class in each line", remedy
    )


def _first_line(text: bytes) -> str:
    """Return the first line of a text in UTF-8 that is not blank; empty without one."""
    line = next(filter(None, map(bytes.strip, io.BytesIO(text))), b"")
    return line[: 4 * _MAX_LENGTH].decode("utf-8", "surrogateescape")


def _separator(line: str, folder: Path) -> str:
    """Return what separates the path and the class of a line; empty if it is a path alone."""
    mark = next((mark for mark in ("\t", ",", " ") if mark in line), "")
    path = line.rpartition(mark)[0].strip() if mark else ""
    if not path or is_image_name(line) or os.path.isfile(folder / line):
        return ""
    return mark if is_image_name(path) or os.path.isfile(folder / path) else ""


def _make(
    spec: str,
    image_spec: ImageSpec,
    file: Path,
    folders: Sequence[Path],
    rows: Rows,
    columns: Mapping[str, int],
    about: str,
    remedy: str,
) -> ImageFolder:
    """Open the images of the rows of a table, whose paths start from the first folder. Raises UserError."""
    images, counts = _collect(file, rows, columns)
    notes = [f"{count:,} rows {why}" for why, count in counts.items() if count]
    left_out = f"left out of {file.name}: {', '.join(notes)}" if notes else ""
    if not images:
        raise UserError(f"{file} lists no images" + f"; {left_out}" * bool(left_out))
    check_inside(images, folders, str(file), len(images), remedy)
    _check_files(
        list(images)[:_MAX_SOUGHT],
        folders[0],
        file,
        f"paths must include the extension and start from {folders[0]}; {remedy}",
    )
    paths = PathList(map(os.fsencode, images))
    named = _as_integers([label for label, _ in images.values()])
    labels, classes = number_names(named) if "label" in columns else (None, [])
    about += f"; {left_out}" * bool(left_out)
    dataset = ImageFolder(spec, folders[0], paths, image_spec, labels, classes, about, left_out)
    if "group" in columns:
        dataset.set_groups(_as_integers([group for _, group in images.values()]))
    return dataset


def _collect(file: Path, rows: Rows, columns: Mapping[str, int]) -> tuple[dict[str, tuple[str, str]], dict[str, int]]:
    """Return the label and the group of each path, and the number of rows left out for each reason."""
    images: dict[str, tuple[str, str]] = {}
    counts = dict.fromkeys(("without a label", "without a path", "that repeat another"), 0)
    for values in rows(list(columns.values())):
        row = dict(zip(columns, values, strict=True))
        if too_long := next((value for value in values if len(value) > _MAX_LENGTH), ""):
            raise UserError(f"{file} has a value of {len(too_long):,} characters, {shown(too_long)}: is it a table?")
        path, entry = row["path"].removeprefix("./"), (row.get("label", ""), row.get("group", ""))
        if "label" in row and not entry[0]:
            counts["without a label"] += 1
        elif not path:
            counts["without a path"] += 1
        elif (first := images.setdefault(path, entry)) is not entry:
            if first != entry:
                what, one, two = next(z for z in zip(("labels", "groups"), first, entry, strict=True) if z[1] != z[2])
                raise UserError(
                    f"{file} gives {shown(path)} two {what}, {shown(one)} and {shown(two)}: use one for each"
                )
            counts["that repeat another"] += 1
    return images, counts


def _as_integers(names: Sequence[str]) -> Sequence[str]:
    """Return names such as 1.0 as 1 if all are so, or empty: pandas makes integers with a missing value float."""
    if all(re.fullmatch(r"-?[0-9]+\.0", name) for name in set(names) - {""}):
        return [name.removesuffix(".0") for name in names]
    return names


def _check_files(sought: Sequence[str], root: Path, file: Path, remedy: str) -> None:
    """Raise UserError if none of these files exists. Single ones that are missing are counted when read."""
    if any(os.path.isfile(os.path.join(root, path)) for path in sought):
        return
    example = f"{os.path.join(root, sought[0])}, which {file} lists, does not exist"
    example += f", nor does any of the first {len(sought)}" * (len(sought) > 1)
    if os.sep == "/" and "\\" in sought[0]:
        raise UserError(f"{example}: its paths are those of Windows. Replace each \\ by /, and leave out the drive")
    raise UserError(f"{example}: {remedy}")


def _find_column(file: Path, header: Sequence[str], role: str, given: str) -> int | None:
    """Return the number of the column that was given, or else of the first with a usual name; None without any."""
    names = list(header) if given else [name.lower() for name in header]
    wanted = given or next((name for name in USUAL_COLUMNS[role] if name in names), "")
    if given and given not in names:
        raise UserError(
            f"{file} has no column '{given}' ({role}=){did_you_mean(given, names[:1000]) or '.'} Its columns: "
            f"{_listed(header)}"
        )
    if not wanted and role == "path":
        if any(map(is_image_name, header)):
            raise UserError(f"{file} has no header: its first line must name the columns, such as path,label")
        raise UserError(
            f"{file} has no column named path, file, filename or similar: add ,path=COLUMN with one of its columns: "
            f"{_listed(header)}"
        )
    if wanted and names.count(wanted) > 1:
        raise UserError(f"{file} has {names.count(wanted)} columns '{wanted}': rename them")
    return names.index(wanted) if wanted else None


def _listed(header: Sequence[str]) -> str:
    more = f" and {len(header) - _MAX_LISTED:,} more" if len(header) > _MAX_LISTED else ""
    return ", ".join(name[:100] for name in header[:_MAX_LISTED]) + more


def open_csv(file: Path) -> tuple[list[str], Rows]:
    """Return the header of a .csv or .tsv, and its rows. Raises UserError."""
    data = read_utf8(file)
    first = _QUOTED.sub("", data.partition(b"\n")[0].decode("utf-8", "replace"))
    delimiter = "\t" if file.suffix.lower() == ".tsv" and "\t" in first else max(",;\t", key=first.count)
    lines, skipped = _lines(file, data), 0
    if named := _EXCEL_SEPARATOR.match(data):
        delimiter, skipped = named[1].decode(), 1
        next(lines)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)

    def records() -> Iterator[list[str]]:
        try:
            yield from reader
        except csv.Error as error:
            raise UserError(
                f"{file}, line {skipped + reader.line_num:,}: {error}. Is a quotation mark missing or too much before "
                "it?"
            ) from None

    header = [name.strip() for name in next(records(), [])]

    def rows(indices: Sequence[int]) -> Iterator[list[str]]:
        for row in records():
            if len(row) == len(header):
                yield [row[index].strip() for index in indices]
            elif len(row) > 1 or "".join(row).strip():  # not a blank line
                line = skipped + reader.line_num
                raise UserError(f"{file}, line {line:,}: {len(row):,} values, but the header has {len(header):,}")

    return header, rows


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
    if count > MAX_LINES:
        raise UserError(f"{file} has {count:,} rows: more than {MAX_LINES:,}")

    def rows(indices: Sequence[int]) -> Iterator[list[str]]:
        names = [schema.names[index] for index in indices]
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

    return list(schema.names), rows


def _texts(array: Any) -> list[str]:
    """Return the values of an Arrow array as text; "" for null and NaN."""
    if hasattr(array, "dictionary"):
        texts = _texts(array.dictionary)
        return ["" if index is None else texts[index] for index in array.indices.to_pylist()]
    return ["" if value is None or value != value else str(value).strip() for value in array.to_pylist()]
