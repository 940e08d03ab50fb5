"""Data sets of the `datasets` library in a local folder that anybody may have filled: which of its files are read.

The library itself would follow a README.md and saved settings to any file or URL. Here it is handed a list of files
that are in the folder; nothing else in there has an effect.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pixmim.data.image_folder import EXTENSIONS
from pixmim.utils.errors import UserError
from pixmim.utils.files import read_json

KINDS = {".parquet": "parquet", ".arrow": "arrow"}
"""Extensions of tables, and what the library calls their readers."""

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-[0-9]{5}-of-[0-9]{5}[^/]*\.[^/]*")
_EDGE = "[-._ 0-9]"

_MOST_EXPANDED, _MOST_RATIO = 2**30, 200
"""Bytes from which on a column of a row group may not be so many times as large as its compressed form."""


def find_files(path: Path, roots: Sequence[Path]) -> tuple[str, dict[str, list[str]]]:
    """Return the library's reader for a file or folder, and the files of each split, chosen as the library does.

    Splits are told by names: `data/NAME-00000-of-00004`, or train, validation or test in the name of a folder or a
    file; otherwise all is "train". Hidden files and those with two underscores in front are left out.

    Args:
        path: A table, or a folder with tables, or with pictures and perhaps a metadata.csv.
        roots: Folders that links may lead to, besides the folder itself.

    Raises:
        UserError: If there is no such file, or one is not regular or a link that leads elsewhere.
    """
    if path.is_file():
        return KINDS[path.suffix], {"train": [_checked(path, [path.parent, *roots])]}
    found: dict[str, list[str]] = defaultdict(list)
    for folder, below, names in os.walk(path):
        below[:] = [name for name in below if not name.startswith((".", "__"))]
        inside = os.path.relpath(folder, path)
        for name in names:
            kind = "imagefolder" if name in _METADATA else _kind(name)
            if kind and not name.startswith((".", "__")):
                found[kind].append(name if inside == "." else f"{inside}/{name}")
    if not found or (set(found["imagefolder"]) and not any(_kind(name) for name in found["imagefolder"])):
        raise UserError(f"{path} holds no parquet, no Arrow and no picture files")
    kind = Counter({kind: len(names) for kind, names in found.items()}).most_common(1)[0][0]
    splits = _splits(sorted(found[kind]))
    return kind, {split: [_checked(path / name, [path, *roots]) for name in names] for split, names in splits.items()}


def check_saved(path: Path, roots: Sequence[Path]) -> list[str]:
    """Check the files that `save_to_disk` wrote, and return the names of the splits, or none of a single data set.

    Raises:
        UserError: If they name files elsewhere, or are not what the library writes.
    """
    splits: list[str] = []
    if not (path / "state.json").is_file():
        content = _json(path / "dataset_dict.json", [path, *roots])
        splits = [_plain(name, path) for name in _list(content.get("splits"), path)]
    for folder in [path / split for split in splits] or [path]:
        inside = [path, *roots]
        _json(folder / "dataset_info.json", inside)
        for entry in _list(_json(folder / "state.json", inside).get("_data_files"), folder):
            name = entry.get("filename") if isinstance(entry, dict) else None
            _checked(folder / _plain(name, folder), inside)
    return splits


def check_parquet(files: Sequence[str]) -> None:
    """Refuse parquet files that would expand beyond all measure.

    Raises:
        UserError: With the first such file.
    """
    import pyarrow
    from pyarrow import parquet

    for file in files:
        try:
            about = parquet.read_metadata(file)
        except (OSError, pyarrow.ArrowException):
            continue  # the library says why
        for group in range(about.num_row_groups):
            for column in range(about.num_columns):
                chunk = about.row_group(group).column(column)
                large, small = chunk.total_uncompressed_size, chunk.total_compressed_size
                if large > max(_MOST_EXPANDED, _MOST_RATIO * small):
                    raise UserError(f"{file} expands from {small:,} bytes to {large:,} in one column: refused")


def _kind(name: str) -> str:
    suffix = os.path.splitext(name)[1].lower()
    return KINDS.get(suffix, "imagefolder" if suffix in EXTENSIONS else "")


def _splits(names: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if match := _SHARD.fullmatch(name):
            found[match[1]].append(name)
    if found:
        return dict(found)
    for in_folders in (True, False):
        for split, words in _SPLITS.items():
            word = re.compile(f"(?:^|.*{_EDGE})(?:{'|'.join(words)})(?:{_EDGE}.*{'|$' if in_folders else ''})")
            for name in names:
                *folders, file = name.split("/")
                if any(map(word.fullmatch, folders if in_folders else [file])):
                    found[split].append(name)
        if found:
            return dict(found)
    return {"train": names}


def _checked(path: Path, roots: Sequence[Path]) -> str:
    """Return the whole path of a regular file that is below one of `roots`, links resolved."""
    if path.is_symlink() or path.parent != roots[0]:
        real = path.resolve()
        if not any(real.is_relative_to(root.resolve()) for root in roots):
            raise UserError(
                f"{path} leads out of {roots[0]}, to {real}: hf:{roots[0]},root=FOLDER allows what is below a folder"
            )
    if not path.is_file():
        raise UserError(f"{path} is not a regular file")
    if "::" in path.name:
        raise UserError(f"{path}: the library would take its name for an address; rename it")
    return os.path.abspath(path)


def _json(path: Path, roots: Sequence[Path]) -> dict[str, Any]:
    _checked(path, roots)
    try:
        content = read_json(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not what save_to_disk writes")
    return content


def _list(value: Any, folder: Path) -> list[Any]:
    if not isinstance(value, list):
        raise UserError(f"{folder} is not what save_to_disk writes: it lists no files")
    return value


def _plain(name: Any, folder: Path) -> str:
    """Return the name of a file or folder that can only be in `folder`."""
    if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\:\0]", name):
        raise UserError(f"{folder} names {str(name)[:80]!r}, which is not a file of its own")
    return name
