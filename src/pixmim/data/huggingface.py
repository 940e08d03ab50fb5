"""Images in Hugging Face datasets: parquet, Arrow and `save_to_disk` folders, and names on the hub.

The `datasets` library downloads and prepares the files. A local folder may come from a stranger, so the library gets a
list of regular files inside it; nothing else in the folder has an effect. Bytes are copied out of the memory-mapped
table with the GIL released, so that waiting for the disk stalls one thread instead of all of them.
"""

from __future__ import annotations

import glob
import os
import re
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Shaped

from pixmim.data.dataset import RGB, BadImage, ImageDataset, ImageSpec
from pixmim.data.decode.image import decode
from pixmim.data.decode.limits import check_bytes, max_bytes
from pixmim.data.image_folder import EXTENSIONS
from pixmim.data.uri import HubSpec, read_options, read_root
from pixmim.transforms.crops import Array
from pixmim.utils.errors import UserError, did_you_mean
from pixmim.utils.files import open_regular, read_file

if TYPE_CHECKING:
    from datasets import Dataset

Splits = dict[str, list[str]]  # the files of each split

_READERS = {".parquet": "parquet", ".arrow": "arrow"}
"""Extensions of tables, and the library's names of their readers."""

_MAX_EXPANDED, _MAX_RATIO = 2**30, 200
"""A parquet column chunk above this size must not expand by more than this ratio."""

_ROWS_PER_BATCH = 256  # of parquet, unpacked at a time
_ZIPPED = re.compile(r"zip://([^:]+)::(.+)", re.DOTALL)
_SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-[0-9]{5}-of-[0-9]{5}[^/]*\.[^/]*")
_SPLITS = {"train": "train|training", "validation": "validation|valid|dev|val", "test": "test|testing|eval|evaluation"}


class ArrowDataset(ImageDataset):
    """Images in one column of a `datasets.Dataset`, with or without a selection or shuffle.

    Args:
        dataset: The rows.
        spec: What the user passed.
        image_spec: Channels and dtype that images are converted to.
        name: Prefix of row numbers in messages; `spec` by default.
        image: Column of the library's Image, bytes, structs of bytes and path, or paths. By default the only Image
            column, or else the only column of bytes.
        label: Column of ClassLabel, integers, strings or booleans. By default the only ClassLabel.
        roots: Folders that paths may lead to, after links are resolved. Relative ones start from the first.
        url_prefix: Prefix of URLs that may be opened; "" for none.

    Raises:
        UserError: If there are no rows, or a column is missing, ambiguous or of another type.
    """

    def __init__(
        self,
        dataset: Dataset,
        spec: str,
        image_spec: ImageSpec = RGB,
        *,
        name: str = "",
        image: str = "",
        label: str = "",
        roots: Sequence[Path] = (Path(),),
        url_prefix: str = "",
    ) -> None:
        if not len(dataset):
            raise UserError(f"{spec} has no rows")
        self._name, self._url_prefix = name or spec, url_prefix
        self._folder, self._roots = roots[0].absolute(), [root.resolve() for root in roots]
        indices = dataset._indices  # the library has no public access to the rows of a selection
        rows = None if indices is None else indices.column(0).to_numpy()
        self._rows: Any = range(len(dataset)) if rows is None else rows
        column = image or _find_image_column(dataset, spec)
        self._bytes, self._paths = _image_columns(dataset, column, spec)
        labels, classes, note = _read_labels(dataset, label, rows, spec)
        description = f"images from column '{column}', {note}"
        super().__init__(spec, image_spec, labels=labels, classes=classes, description=description)
        self._fingerprint = f"{dataset._fingerprint}-{column}"  # covers all rows and every change of the dataset

    def __len__(self) -> int:
        return len(self._rows)

    def path_of(self, index: int) -> str:
        path = self._path(int(self._rows[index]))
        return f"{self._name}#{index}" + (f" ({path})" if path else "")

    def fingerprint(self) -> str:
        return self._fingerprint

    def read(self, index: int) -> bytes:
        """Return the image file of a row. Raises BadImage."""
        import pyarrow

        row = int(self._rows[index])
        if self._bytes is not None and (cell := self._bytes[row]).is_valid:
            buffer = cell.as_buffer()
            check_bytes(buffer.size)
            return pyarrow.BufferReader(buffer).read()  # unlike as_py(), releases the GIL
        path = self._path(row)
        if not path:
            raise BadImage("the row has neither bytes nor a path")
        try:
            data = self._read_file(path)
        except BadImage:
            raise
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from None
        except Exception as error:  # archives, remote file systems and invalid names raise almost anything
            raise BadImage(f"{path}: {error}") from None
        check_bytes(len(data))
        return data

    def read_array(self, index: int) -> Shaped[Array, "h w c"]:
        return decode(self.read(index), self.image_spec)

    def _path(self, row: int) -> str:
        return (self._paths[row].as_py() or "") if self._paths is not None else ""

    def _read_file(self, path: str) -> bytes:
        """Read the file that a row names, which may be in a zip archive."""
        if zipped := _ZIPPED.fullmatch(path):
            with open(open_regular(self._inside(zipped[2])), "rb") as file, zipfile.ZipFile(file) as archive:
                return archive.open(zipped[1]).read(max_bytes() + 1)
        if self._url_prefix and re.match(re.escape(self._url_prefix) + "[@/]", path) and "::" not in path:
            import fsspec

            with fsspec.open(path, "rb") as remote:
                return bytes(remote.read(max_bytes() + 1))
        return read_file(self._inside(path), max_bytes())

    def _inside(self, path: str) -> Path:
        if "://" in path:
            raise BadImage(f"{path}: a path in a table must be that of a file, without a protocol")
        real = (self._folder / path).resolve()
        if not any(real.is_relative_to(root) for root in self._roots):
            raise BadImage(f"{path} leads out of {self._roots[0]}: add ,root=FOLDER to --data to allow it")
        return real


def is_arrow_dataset(path: Path) -> bool:
    """Return True for a parquet or Arrow file, a `save_to_disk` folder, or a folder of tables.

    A folder of tables has them at its top or in its data/, and has no image file at any depth: a folder of images may
    also hold a table of features. Hidden files and folders do not count.
    """
    if path.is_file():
        return _suffix(path.name) in _READERS
    if _is_saved(path):
        return True
    has_table = False
    for folder in filter(Path.is_dir, (path, path / "data")):
        with os.scandir(folder) as entries:
            for suffix in (_suffix(entry.name) for entry in entries if not entry.name.startswith(".")):
                if suffix in EXTENSIONS:  # do not list a million images
                    return False
                has_table |= suffix in _READERS
    return has_table and not any(_suffix(name) in EXTENSIONS for name in _walk_visible(path))


def _walk_visible(path: Path) -> Iterator[str]:
    """Yield the names of all files below a folder that are not hidden."""
    for _, subfolders, names in os.walk(path):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (name for name in names if not name.startswith("."))


def open_huggingface(spec: str, image_spec: ImageSpec = RGB) -> ArrowDataset:
    """Open the dataset that `hf:...` or a path names (see `HubSpec`). The default split is "train", or the only one.

    Raises:
        UserError: If it does not exist, cannot be loaded, or lacks the split or column.
    """
    if spec.startswith("hf:"):
        hub = HubSpec.read(spec)
    else:
        place, options = read_options(spec, "a table of images", ("image", "label", "root"))
        hub = HubSpec(place, **{name: value for name, (value,) in options.items()})
    root = read_root(hub.root, spec)
    roots = [] if root is None else [root]
    try:
        import datasets
        from huggingface_hub import constants
    except ImportError as error:
        raise UserError(f"{hub} needs the library datasets: pip install 'pixmim[hub]'") from error
    try:
        if hub.path is None:
            builder = datasets.load_dataset_builder(hub.place, hub.config or None, revision=hub.revision or None)
            splits, load = _prepare(builder)
            config = datasets.config
            caches = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE)
            roots, url_prefix = [*map(Path, caches), *roots], f"hf://datasets/{hub.place}"
        else:
            splits, load = _load_local(hub.path, roots, hub)
            roots, url_prefix = [hub.path if hub.path.is_dir() else hub.path.parent, *roots], ""
        split = hub.split or ("train" if "train" in splits or len(splits) > 1 else splits[0])
        if split not in splits:
            hint = did_you_mean(split, splits) or "."
            raise UserError(f"{hub} has no split '{split}'{hint} Its splits: {', '.join(splits)}")
        name, columns = f"hf:{hub.place}:{split}", {"image": hub.image, "label": hub.label}
        return ArrowDataset(load(split), spec, image_spec, name=name, roots=roots, url_prefix=url_prefix, **columns)
    except UserError:
        raise
    except Exception as error:  # networks, disks, parsers and the library's own checks
        raise _explained(hub, error) from error


def _explained(hub: HubSpec, error: Exception) -> UserError:
    """Return the error for one of the library, with advice."""
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    cause = error.__cause__ if type(error) is DatasetGenerationError and error.__cause__ else error
    advice = ""
    if isinstance(error, DatasetNotFoundError):
        advice = "; check the name, and log in with `hf auth login` if the dataset is private or gated"
    elif isinstance(error, ConnectionError):
        advice = (
            "; without a network (or with HF_HUB_OFFLINE set) only datasets loaded before are available. There is no "
            f"folder {Path(hub.place).absolute()} either"
        )
    return UserError(f"{hub} cannot be loaded: {' '.join(str(cause).split())[:500]}{advice}")


def _prepare(builder: Any) -> tuple[list[str], Callable[[str], Dataset]]:
    """Download and unpack into the library's cache; return the names of the splits, and a function that opens one."""
    builder.download_and_prepare()
    return list(builder.info.splits), lambda split: builder.as_dataset(split=split)


def _load_local(path: Path, roots: list[Path], hub: HubSpec) -> tuple[list[str], Callable[[str], Dataset]]:
    """Do the same as `_prepare` for a local file or folder, after a check of each file that the library will open."""
    import datasets

    if hub.config or hub.revision:
        raise UserError(f"{hub}: config= and revision= are for datasets on the hub, but {path} is a local path")
    if _is_saved(path):
        saved = _saved_files(path, roots)
        return list(saved), lambda split: datasets.concatenate_datasets(
            [datasets.Dataset.from_file(file) for file in saved[split]]
        )
    suffix, splits = _find_tables(path, roots)
    options: dict[str, Any] = {}
    if suffix == ".parquet":
        for file in chain.from_iterable(splits.values()):
            check_parquet(file)
        options["batch_size"] = _ROWS_PER_BATCH
    literal = {split: [glob.escape(file) for file in files] for split, files in splits.items()}
    return _prepare(datasets.load_dataset_builder(_READERS[suffix], data_files=literal, **options))


def _is_saved(path: Path) -> bool:
    """Return True for a folder written by `save_to_disk`."""
    single = (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    return single or (path / "dataset_dict.json").is_file()


def _saved_files(path: Path, roots: list[Path]) -> Splits:
    """Return the Arrow files of a `save_to_disk` folder. Names in its JSON files have no effect."""
    is_single = (path / "state.json").is_file()
    splits = {}
    for folder in [path] if is_single else sorted(file.parent for file in path.glob("*/state.json")):
        files = sorted(folder.glob("data*.arrow"))
        names = [file.name for file in files]
        complete = [f"data-{i:05d}-of-{len(names):05d}.arrow" for i in range(len(names))]
        if not names or names not in (complete, ["dataset.arrow"]):  # the latter is from old versions of the library
            listing = ", ".join(names[:5]) or "none"
            raise UserError(f"{folder} does not have one complete set of shards: {listing}. Save it again")
        splits["train" if is_single else folder.name] = [_check_file(file, [path, *roots]) for file in files]
    if not splits:
        raise UserError(f"{path} is incomplete: no folder in it has a state.json")
    return splits


def _find_tables(path: Path, roots: list[Path]) -> tuple[str, Splits]:
    """Return the extension of a dataset's tables and their files. Hidden files and folders are ignored."""
    if path.is_file():
        suffix = _suffix(path.name)
        if suffix not in _READERS:
            raise UserError(f"{path} is neither a {' nor a '.join(_READERS)} file")
        return suffix, {"train": [_check_file(path, [path.parent, *roots])]}
    tables: dict[str, list[str]] = defaultdict(list)
    for folder, subfolders, files in os.walk(path):
        subfolders[:] = [name for name in subfolders if not name.startswith((".", "__"))]
        for name in files:
            if _suffix(name) in _READERS and not name.startswith((".", "__")):
                tables[_suffix(name)].append(Path(folder, name).relative_to(path).as_posix())
    if not tables:
        raise UserError(f"{path} has no parquet or Arrow files; pass a folder of images without hf:")
    suffix = Counter({suffix: len(names) for suffix, names in tables.items()}).most_common(1)[0][0]
    splits = _group_by_split(sorted(tables[suffix]))
    return suffix, {
        split: [_check_file(path / name, [path, *roots]) for name in names] for split, names in splits.items()
    }


def _group_by_split(names: list[str]) -> Splits:
    """Group files by split as the library does.

    The split is NAME in `data/NAME-00000-of-00004`; or else train, validation or test in the name of a folder; or else
    in the name of a file.
    """
    splits: Splits = defaultdict(list)
    for name in names:
        if match := _SHARD.fullmatch(name):
            splits[match[1]].append(name)
    edge = "[-._ 0-9]"
    for end in (f"{edge}.*|$", f"{edge}.*"):  # of a folder's name, and of a file's
        if splits:
            break
        for split, words in _SPLITS.items():
            word = re.compile(f"(?:^|.*{edge})(?:{words})(?:{end})")
            for name in names:
                *folders, file = name.split("/")
                if any(map(word.fullmatch, folders if "$" in end else [file])):
                    splits[split].append(name)
    return dict(splits) or {"train": names}


def check_parquet(file: str) -> None:
    """Raise UserError for a decompression bomb."""
    import pyarrow
    from pyarrow import parquet

    try:
        metadata = parquet.read_metadata(file)
    except (OSError, pyarrow.ArrowException):
        return  # the library reports it
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(metadata.num_columns)):
            expanded, compressed = column.total_uncompressed_size, column.total_compressed_size
            if expanded > max(_MAX_EXPANDED, _MAX_RATIO * compressed):
                raise UserError(f"{file} expands from {compressed:,} bytes to {expanded:,} in one column: refused")


def _check_file(path: Path, roots: Sequence[Path]) -> str:
    """Return the absolute path of a regular file that is inside one of `roots` after links are resolved."""
    if path.is_symlink() or path.parent != roots[0]:
        real = path.resolve()
        if not any(real.is_relative_to(root.resolve()) for root in roots):
            raise UserError(
                f"{path} leads out of {roots[0]}, to {real}: hf:{roots[0]},root=FOLDER allows files inside a folder"
            )
    if not path.is_file():
        raise UserError(f"{path} is not a regular file")
    if "::" in path.name:
        raise UserError(f"{path}: the library would take this name for a URL; rename the file")
    return os.path.abspath(path)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


# Columns


def _find_image_column(dataset: Dataset, spec: str) -> str:
    """Return the only column of the library's Image feature, or else the only one of bytes."""
    from datasets import Image
    from pyarrow import types

    def holds_bytes(name: str) -> bool:
        arrow_type = dataset.data.schema.field(name).type
        field = arrow_type.get_field_index("bytes") if types.is_struct(arrow_type) else -1
        return _is_type(arrow_type.field(field).type if field >= 0 else arrow_type, "binary")

    columns = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    columns = columns or list(filter(holds_bytes, dataset.column_names))
    if len(columns) > 1:
        raise UserError(f"{spec} has several image columns: add ,image= and one of {', '.join(columns)}")
    if not columns:
        raise UserError(f"{spec} has no image column; its columns: {', '.join(dataset.column_names)}")
    return columns[0]


def _image_columns(dataset: Dataset, column: str, spec: str) -> tuple[Any, Any]:
    """Return the bytes and the paths in a column; None for what it does not have. Raises UserError as `_column`."""
    from pyarrow import types

    values = _column(dataset, column, spec)
    if types.is_struct(values.type):
        names = [field.name for field in values.type]
        fields = dict(zip(names, values.flatten(), strict=True))  # views; a null struct is null in each field
    else:
        fields = {"bytes": values, "path": values}
    data, paths = fields.get("bytes"), fields.get("path")
    data = data if data is not None and _is_type(data.type, "binary") else None
    paths = paths if paths is not None and _is_type(paths.type, "string") else None
    if data is not None or paths is not None:
        return data, paths
    raise UserError(
        f"column '{column}' of {spec} holds {values.type} instead of images, which are the library's Image, bytes, "
        f"structs of bytes and path, or paths; its columns: {', '.join(dataset.column_names)}"
    )


def _read_labels(
    dataset: Dataset, name: str, rows: npt.NDArray[Any] | None, spec: str
) -> tuple[npt.NDArray[np.int64] | None, list[str], str]:
    """Return the class index of each row, the names of the classes, and a note on the column.

    If no name is given, the column is the only ClassLabel; there are no labels if it is not the only one or lacks
    values. `rows` are those of a selection, in order.

    Raises:
        UserError: If there is no such column, it has another type, or a row has no class although `name` is given.
    """
    import pyarrow
    from datasets import ClassLabel, Value
    from pyarrow import compute

    class_labels = [column for column, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    if not name and len(class_labels) != 1:
        hint = f" chosen: add ,label= and one of {', '.join(class_labels)}" if class_labels else ""
        return None, [], f"no classes{hint}"
    column = name or class_labels[0]
    values = _column(dataset, column, spec)
    feature, values = dataset.features[column], values if rows is None else values.take(pyarrow.array(rows))
    if column in class_labels:
        classes, numbers = list(feature.names), values
        if not all(isinstance(each, str) for each in classes):
            raise UserError(f"column '{column}' of {spec} has a class name that is not a string")
    elif isinstance(feature, Value) and feature.dtype.startswith(("int", "uint", "string", "large_string", "bool")):
        unique = sorted(value for value in values.unique().to_pylist() if value is not None and value != "")
        classes, numbers = list(map(str, unique)), compute.index_in(values, pyarrow.array(unique, values.type))
    else:
        raise UserError(f"column '{column}' of {spec} holds {values.type}; classes are ClassLabel, integers or strings")
    labels = numbers.cast(pyarrow.int64()).fill_null(-1).to_numpy().copy()
    if len(labels) and labels.max() >= len(classes):
        raise UserError(f"{spec}: column '{column}' has class {labels.max()}, but there are {len(classes):,} classes")
    missing = np.flatnonzero(labels < 0)  # the library uses -1 where the labels of a test split are withheld
    if not len(missing):
        return labels, classes, f"classes from '{column}'"
    reason = f"column '{column}' has no class in {len(missing):,} of {len(labels):,} rows"
    if name:
        raise UserError(f"{spec}: {reason}, the first of them row {missing[0]}")
    return None, [], f"no classes ({reason})"


def _column(dataset: Dataset, name: str, spec: str) -> Any:
    """Return a column's data after a check that it stays inside its buffers."""
    if name not in dataset.column_names:
        hint = did_you_mean(name, dataset.column_names) or "."
        raise UserError(f"{spec} has no column '{name}'{hint} Its columns: {', '.join(dataset.column_names)}")
    column = dataset.data.column(name)
    column.validate(full=True)
    return column


def _is_type(arrow_type: Any, name: str) -> bool:
    """Return True for an Arrow type `name`, "binary" or "string", or its large or view form."""
    return str(arrow_type) in (name, f"large_{name}", f"{name}_view")
