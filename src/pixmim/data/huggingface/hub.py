"""Hugging Face data sets: from a name on the hub, a folder or a file to a table in memory-mapped files.

The `datasets` library finds, downloads and prepares them. What it prepares lies in its own cache (HF_HOME) as Arrow
files, which is also where a local parquet set is unpacked to, once; what `save_to_disk` wrote is read where it lies.
Of a local folder, it is handed the files that `local` finds, and nothing in there can name others.
"""

import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pixmim.data.dataset import COLOUR, Form
from pixmim.data.huggingface.local import KINDS, check_parquet, check_saved, find_files
from pixmim.data.huggingface.table import Table
from pixmim.data.image_folder import EXTENSIONS
from pixmim.data.uri import HubSpec, split_root
from pixmim.utils.errors import UserError, nearest

_BATCH = 256  # rows of a parquet file that are unpacked at a time


def is_local(path: Path) -> bool:
    """Whether a path is a data set of the library, by its files' names: saved to disk, or parquet or Arrow.

    Parquet and Arrow files lie in the folder itself or in its data/, and no picture is anywhere below: a folder of
    pictures may well hold a table of their features.
    """
    if path.is_file():
        return path.suffix in KINDS
    if _is_saved(path):
        return True
    tables = False
    for suffix in (suffix for folder in (path, path / "data") for suffix in _suffixes(folder)):
        if suffix in EXTENSIONS:
            return False
        tables |= suffix in KINDS
    return tables and not any(
        suffix in EXTENSIONS for folder, *_ in os.walk(path) for suffix in _suffixes(Path(folder))
    )


def open_hub(spec: str, form: Form = COLOUR) -> Table:
    """The data set that `hf:...` or a path names (grammar: `HubSpec`). Split: "train", or the only one there is.

    Raises UserError if there is none, if it cannot be loaded, and for a split or column that it does not have.
    """
    if spec.startswith("hf:"):
        wanted = HubSpec.read(spec)
    else:
        place, named = split_root(spec)
        wanted = HubSpec(place, root=str(named or ""))
    root = [Path(os.path.expanduser(wanted.root))] if wanted.root else []
    if root and not root[0].is_dir():
        raise UserError(f"there is no folder {root[0]}, which '{spec}' names as root=")
    splits, load = _find(wanted, root)
    split = wanted.split or ("train" if "train" in splits or len(splits) > 1 else splits[0])
    if split not in splits:
        raise UserError(
            f"{wanted} has no split '{split}'{nearest(split, splits) or '.'} Its splits: {', '.join(splits)}"
        )
    path = wanted.path
    folders = _caches() if path is None else [path if path.is_dir() else path.parent]
    return _told(
        wanted,
        lambda: Table(
            load(split),
            spec,
            form,
            name=f"hf:{wanted.place}:{split}",
            image=wanted.image,
            label=wanted.label,
            folder=folders[0],
            roots=[*folders[1:], *root],
            address=f"hf://datasets/{wanted.place}" if path is None else "",
        ),
    )


def _find(wanted: HubSpec, roots: list[Path]) -> tuple[list[str], Callable[[str], Any]]:
    """The names of the splits, and what opens one."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{wanted} is read with the library datasets: pip install 'pixmim[hub]'") from error
    path = wanted.path
    if path and wanted.revision:
        raise UserError(f"revision= is for data sets on the hub, and {path} is on this machine")
    if path and wanted.config:
        raise UserError(f"{path} has no configurations: leave out config={wanted.config}, or name the folder of one")
    if path and path.is_file() and path.suffix not in KINDS:
        raise UserError(f"{path} is neither a {' nor a '.join(KINDS)} file")
    if path and _is_saved(path):
        names = check_saved(path, roots)
        if names:
            return names, lambda split: datasets.Dataset.load_from_disk(str(path / split))
        saved = _told(wanted, lambda: datasets.Dataset.load_from_disk(str(path)))
        return [str(saved.split or "train")], lambda split: saved

    def prepare() -> Any:
        if path is None:
            builder = datasets.load_dataset_builder(
                wanted.place, wanted.config or None, revision=wanted.revision or None
            )
        else:
            kind, files = find_files(path, roots)
            options: dict[str, Any] = {}
            if kind == "parquet":
                check_parquet([file for names in files.values() for file in names])
                options["batch_size"] = _BATCH
            literal = {split: [glob.escape(name) for name in names] for split, names in files.items()}
            builder = datasets.load_dataset_builder(kind, data_files=literal, **options)
        builder.download_and_prepare()
        return builder

    builder = _told(wanted, prepare)
    return list(builder.info.splits), lambda split: builder.as_dataset(split=split)


def _caches() -> list[Path]:
    """Return the folders that the library keeps what it downloads and prepares in."""
    from datasets import config
    from huggingface_hub import constants

    return [
        Path(folder) for folder in (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE)
    ]


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
    except UserError:
        raise
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
