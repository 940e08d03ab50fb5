"""Images and labels from a table: a .csv, .tsv or .parquet file with a column of paths and one of classes."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pixmim.data.dataset import RGB, ImageSpec
from pixmim.data.image_folder import ImageFolder, PathList, check_inside
from pixmim.data.table_reader import Rows, column_list, open_table
from pixmim.data.uri import read_options, read_root
from pixmim.utils.errors import UserError, did_you_mean, shown

PATH_COLUMNS = (
    *("path", "file", "filename", "file_name", "filepath", "file_path"),
    *("image", "image_path", "image_file", "image_name", "img"),
)
"""Usual names of a column of paths. The first that a table has is used; case does not matter."""

LABEL_COLUMNS = ("label", "class", "category", "class_name", "label_name", "target")
"""Usual names of a column of classes, likewise."""

GROUP_COLUMNS = tuple(
    f"{name}{suffix}" for name in ("group", "patient", "subject", "slide", "video") for suffix in ("", "_id")
)
"""Usual names of a column of what belongs together, likewise."""

_MAX_LENGTH = 4096  # characters of a path, class or group
_MAX_SOUGHT = 100  # files that are looked for at opening


class LabelTable(ImageFolder):
    """Images that a table lists."""

    header: Sequence[str] = ()
    """Names of the columns."""

    @property
    def no_labels_message(self) -> str:
        return f"{self.spec} has no labels: add ,label=COLUMN with one of its columns: {column_list(self.header)}"


def is_label_table(file: Path, options: Mapping[str, Sequence[str]]) -> bool:
    """Return True for a .csv or .tsv file, and for a .parquet file of paths.

    A parquet file that may hold images (a column of bytes or structs) has paths only if `options`, which the user gave
    after its name, include `path=` or `group=`.
    """
    if file.suffix.lower() in (".csv", ".tsv"):
        return file.is_file()
    if file.suffix != ".parquet" or not file.is_file() or "image" in options:
        return False
    if "path" in options or "group" in options:
        return True
    try:
        import pyarrow
        from pyarrow import parquet, types
    except ImportError:
        return False  # the reader of images names what to install
    try:
        schema = parquet.read_schema(file)
    except (OSError, pyarrow.ArrowException):
        return False  # the reader of images explains the damage
    kinds = (types.is_binary, types.is_large_binary, types.is_struct)
    return not any(is_kind(arrow_type) for arrow_type in schema.types for is_kind in kinds)


def open_label_table(spec: str, form: ImageSpec = RGB) -> LabelTable:
    """Open the images that a table lists. A table without a column of classes has no labels.

    Rows without a label or a path, and repeated rows, are left out and counted. Classes are sorted by name.

    Args:
        spec: The file, with options as in `labels.csv,path=file,label=finding,group=patient,root=FOLDER`. The first
            three name columns, which are otherwise those of PATH_COLUMNS, LABEL_COLUMNS and GROUP_COLUMNS. Paths start
            from `root`, by default the folder of the file, and must stay below it.
        form: Channels and dtype that images are converted to.

    Raises:
        UserError: If the table cannot be read, lacks a column, lists no image, none that exists or one outside the
            folder, or gives one image two labels or groups.
    """
    name, options = read_options(spec, "a table of labels", ("path", "label", "group", "root"))
    file = Path(os.path.expanduser(name))
    root = read_root(options, spec) or file.parent
    header, rows = open_table(file)
    usual = {"path": PATH_COLUMNS, "label": LABEL_COLUMNS, "group": GROUP_COLUMNS}
    found = {role: _find_column(file, header, role, options.get(role), names) for role, names in usual.items()}
    columns = {role: index for role, index in found.items() if index is not None}
    images, counts = _collect(file, rows, columns)
    notes = [f"{count:,} rows {why}" for why, count in counts.items() if count]
    left_out = f"left out of {file.name}: {', '.join(notes)}" if notes else ""
    if not images:
        raise UserError(f"{file} lists no images" + f"; {left_out}" * bool(left_out))
    remedy = f"'{name},root=FOLDER' starts them from a folder that they are all below"
    check_inside(images, [root], str(file), len(images), remedy)
    paths = PathList(map(os.fsencode, images))
    _check_files(paths, root, file)
    labels, classes = _number([label for label, _ in images.values()]) if "label" in columns else (None, [])
    about = f"paths from column '{header[columns['path']]}'"
    about += f", classes from '{header[columns['label']]}'" if classes else ", no classes"
    about += f", groups from '{header[columns['group']]}'" if "group" in columns else ""
    dataset = LabelTable(
        spec, root, paths, form, labels, classes, about + f"; {left_out}" * bool(left_out), left_out=left_out
    )
    dataset.header = header
    if "group" in columns:
        unique = [group or f"\0{row}" for row, (_, group) in enumerate(images.values())]
        dataset.groups, names = _number(unique)
        dataset.group_names = ["" if name.startswith("\0") else name for name in names]
    return dataset


def _collect(file: Path, rows: Rows, columns: Mapping[str, int]) -> tuple[dict[str, tuple[str, str]], dict[str, int]]:
    """Return the label and the group of each path, and the number of rows left out for each reason."""
    images: dict[str, tuple[str, str]] = {}
    counts = dict.fromkeys(("without a label", "without a path", "that repeat another"), 0)
    for values in rows(list(columns.values())):
        row = dict(zip(columns, values, strict=True))
        if too_long := next((value for value in values if len(value) > _MAX_LENGTH), ""):
            raise UserError(f"{file} has a value of {len(too_long):,} characters, {shown(too_long)}: is it a table?")
        path, entry = row["path"], (row.get("label", ""), row.get("group", ""))
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


def _number(names: Sequence[str]) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Return the number of each name among the unique ones, sorted, and these."""
    unique = sorted(set(names))
    index = {name: number for number, name in enumerate(unique)}
    return np.asarray([index[name] for name in names], np.int64), unique


def _check_files(paths: PathList, root: Path, file: Path) -> None:
    """Raise UserError if none of the first files exists. Single ones that are missing are counted when read."""
    sought = [paths[index] for index in range(min(len(paths), _MAX_SOUGHT))]
    if not any(os.path.isfile(os.path.join(root, path)) for path in sought):
        raise UserError(
            f"{os.path.join(root, sought[0])}, which {file} lists, does not exist"
            + f", nor do the next {len(sought) - 1}" * (len(sought) > 1)
            + f": paths must include the extension and start from {root}, or from FOLDER with ,root=FOLDER"
        )


def _find_column(
    file: Path, header: Sequence[str], role: str, given: Sequence[str] | None, usual: Sequence[str]
) -> int | None:
    """Return the number of the column that was given, or else of the first with a usual name; None without any."""
    names = list(header)
    if given and given[0] not in names:
        raise UserError(
            f"{file} has no column '{given[0]}' ({role}=){did_you_mean(given[0], names[:1000]) or '.'} Its columns: "
            f"{column_list(header)}"
        )
    if given:
        wanted = given[0]
    else:
        names = [name.lower() for name in names]
        wanted = next((name for name in usual if name in names), "")
    if not wanted and role == "path":
        raise UserError(
            f"{file} has no column named {', '.join(usual[:3])} or similar: add ,path=COLUMN with one of its columns: "
            f"{column_list(header)}"
        )
    if wanted and names.count(wanted) > 1:
        raise UserError(f"{file} has {names.count(wanted)} columns '{wanted}': rename them")
    return names.index(wanted) if wanted else None
