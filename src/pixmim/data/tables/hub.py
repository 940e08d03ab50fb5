"""Hugging Face data sets: from a name on the hub, a folder or a file to a table in memory-mapped files.

The `datasets` library finds, downloads and prepares them. What it prepares lies in its own cache (HF_HOME) as Arrow
files, which is also where a local parquet set is unpacked to, once; what `save_to_disk` wrote is read where it lies.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pixmim.data.folders.files import EXTENSIONS
from pixmim.data.source import COLOUR, Form
from pixmim.data.spec import HubSpec
from pixmim.data.tables.table import Table
from pixmim.errors import UserError, nearest

_KINDS = {".parquet": "parquet", ".arrow": "arrow"}


def is_local(path: Path) -> bool:
    """Whether a path is a data set of the library, by its files' names: saved to disk, or parquet or Arrow.

    Parquet and Arrow files lie in the folder itself or in its data/, and no picture is anywhere below: a folder of
    pictures may well hold a table of their features.
    """
    if path.is_file():
        return path.suffix in _KINDS
    if _is_saved(path):
        return True
    tables = False
    for suffix in (suffix for folder in (path, path / "data") for suffix in _suffixes(folder)):
        if suffix in EXTENSIONS:
            return False
        tables |= suffix in _KINDS
    return tables and not any(
        suffix in EXTENSIONS for folder, *_ in os.walk(path) for suffix in _suffixes(Path(folder))
    )


def open_hub(spec: str, form: Form = COLOUR) -> Table:
    """The data set that `hf:...` or a path names (grammar: `HubSpec`). Split: "train", or the only one there is.

    Raises UserError if there is none, if it cannot be loaded, and for a split or column that it does not have.
    """
    wanted = HubSpec.read(spec) if spec.startswith("hf:") else HubSpec(spec)
    splits, load = _find(wanted)
    split = wanted.split or ("train" if "train" in splits or len(splits) > 1 else splits[0])
    if split not in splits:
        raise UserError(
            f"{wanted} has no split '{split}'{nearest(split, splits) or '.'} Its splits: {', '.join(splits)}"
        )
    path = wanted.path
    return Table(
        _told(wanted, lambda: load(split)),
        spec,
        form,
        name=f"hf:{wanted.place}:{split}",
        image=wanted.image,
        label=wanted.label,
        folder=Path() if path is None else path if path.is_dir() else path.parent,
    )


def _find(wanted: HubSpec) -> tuple[list[str], Callable[[str], Any]]:
    """The names of the splits, and what opens one."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{wanted} is read with the library datasets: pip install 'pixmim[hub]'") from error
    path = wanted.path
    if path and wanted.revision:
        raise UserError(f"revision= is for data sets on the hub, and {path} is on this machine")
    if path and wanted.config and (path.is_file() or _is_saved(path)):
        raise UserError(f"{path} has no configurations: leave out config={wanted.config}")
    if path and path.is_file() and path.suffix not in _KINDS:
        raise UserError(f"{path} is neither a {' nor a '.join(_KINDS)} file")
    if path and _is_saved(path):
        saved = _told(wanted, lambda: datasets.load_from_disk(str(path)))
        parts = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
        return list(parts), parts.__getitem__

    def prepare() -> Any:
        if path and path.is_file():
            builder = datasets.load_dataset_builder(_KINDS[path.suffix], data_files=str(path.resolve()))
        else:
            place = wanted.place if path is None else str(path.resolve())
            builder = datasets.load_dataset_builder(place, wanted.config or None, revision=wanted.revision or None)
        builder.download_and_prepare()
        return builder

    builder = _told(wanted, prepare)
    return list(builder.info.splits), lambda split: builder.as_dataset(split=split)


def _suffixes(folder: Path) -> Iterator[str]:
    """The extensions of what lies in a folder; nothing if it is none."""
    if folder.is_dir():
        with os.scandir(folder) as entries:
            for entry in entries:
                yield os.path.splitext(entry.name)[1].lower()


def _is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    one = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    return one or (path / "dataset_dict.json").is_file()


def _told(wanted: HubSpec, load: Callable[[], Any]) -> Any:
    """What `load` gives; whatever the library raises, as one sentence with what to do."""
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    try:
        return load()
    except Exception as error:  # the library hands on what networks, disks, parsers and its own checks raise
        cause = error.__cause__ if type(error) is DatasetGenerationError and error.__cause__ else error
        reason = " ".join(str(cause).split())
        advice = ""
        if isinstance(error, DatasetNotFoundError):
            advice = "; check the name, and for a private or gated data set log in with `hf auth login`"
        elif isinstance(error, ConnectionError):
            advice = (
                "; without a network (or with HF_HUB_OFFLINE set) only what was loaded before is there. A folder is "
                f"given by its path: there is none at {Path(wanted.place).absolute()}"
            )
        raise UserError(f"{wanted} cannot be loaded: {reason[:500]}{advice}") from error
