"""The features of every image of a data set, in a file: embeddings for search, clustering, or another's probe."""

import io
import json
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial as part_of
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console

from pixmim.data.bad_images import BadImageLog
from pixmim.data.dataset import ImageDataset
from pixmim.data.loader import iterate_in_order
from pixmim.evaluation.frozen_encoder import FrozenEncoder, fingerprint, frozen_encoder_from_weights
from pixmim.models import features
from pixmim.training.precision import Precision, autocast
from pixmim.transforms.crops import evaluation_crop
from pixmim.utils.console import csv_cell, print_plain, progress, utf8
from pixmim.utils.errors import UserError
from pixmim.utils.files import atomic_write, check_output, read_file, read_json, write_csv, write_text_atomically
from pixmim.utils.lock import LOCK_NAME, locked_folder
from pixmim.weights.detect import Weights

Kind = Literal["cls", "mean", "both"]

_MAX_BYTES = 2**31  # of a batch that is kept


@torch.no_grad()
def embed(
    weights: Weights,
    data: ImageDataset,
    out: Path,
    kind: Kind = "both",
    *,
    batch: int = 256,
    device: str = "auto",
    precision: Precision = "auto",
    overwrite: bool = False,
    console: Console | None = None,
) -> list[str]:
    """Write one row for each readable image, in the order of the data; says in lines what was written.

    out   .npy: float32 (n, d), or (n, 2 d) with the global vector first for "both", and beside it a .csv with each
          row's file and class; .parquet: columns file, class (where there are classes), cls, mean
    kind  cls: the global token after the final norm; mean: the mean of the patch tokens; both
    overwrite  replace files of these names

    What is done is kept in OUT.partial, batch by batch; the same call goes on from there. Raises UserError, also while
    another process writes the same file.
    """
    if out.suffix not in (".npy", ".parquet"):
        raise UserError(f"--out ends with .npy or .parquet, and not with '{out.suffix}'")
    if out.suffix == ".parquet":
        _parquet()  # before the work, not after it
    partial = out.with_name(out.name + ".partial")
    if partial.is_symlink():
        raise UserError(f"{partial} is a symbolic link: remove it first")
    with locked_folder(partial, part_of(print_plain, console or Console(quiet=True))):
        begun, left_out = (partial / "state.json").exists(), _left_out(out)
        if not begun and any(path.name != LOCK_NAME for path in partial.iterdir()):
            raise UserError(f"{partial} is there already, and holds no unfinished work: choose another --out")
        for path in [out, *[out.with_suffix(".csv")] * (out.suffix == ".npy"), *[left_out] * (not begun)]:
            check_output(path, overwrite)
        if overwrite and not begun:
            left_out.unlink(missing_ok=True)
        return _embed(weights, data, out, partial, kind, batch, device, precision, console)


def _embed(
    weights: Weights,
    data: ImageDataset,
    out: Path,
    partial: Path,
    kind: Kind,
    batch: int,
    device: str,
    precision: Precision,
    console: Console | None,
) -> list[str]:
    encoder = frozen_encoder_from_weights(weights, device=device, precision=precision)
    state = _resume(
        partial, {"model": fingerprint(encoder), "features": kind, "data": data.spec, "files": data.fingerprint()}
    )
    first = state["done"]
    skipped = BadImageLog(_left_out(out), len(data), 1.0)
    for rows, indices, end in embed_batches(encoder, data, skipped, batch, first, console):
        if len(indices):
            arrays: dict[str, Any] = {"index": indices}
            arrays |= {key: value for key, value in rows.items() if kind in (key, "both")}
            atomic_write(partial / f"{first:09d}.npz", part_of(np.savez, **arrays))
        first = end
        write_text_atomically(partial / "state.json", json.dumps(state | {"done": end}))
    if not any(partial.glob("*.npz")):
        raise UserError(f"not one image of {data.spec} can be read: see {_left_out(out)}")
    table = _gathered(partial, len(data))
    written = _write(out, table, data)
    shutil.rmtree(partial)
    lines = [f"{len(table['index'])} rows: {', '.join(map(str, written))}"]
    return lines + ([f"{len(skipped)} images could not be read: see {_left_out(out)}"] if len(skipped) else [])


def embed_batches(
    encoder: FrozenEncoder,
    data: ImageDataset,
    skipped: BadImageLog,
    batch: int,
    first: int = 0,
    console: Console | None = None,
) -> Iterator[tuple[dict[str, npt.NDArray[np.float32]], npt.NDArray[np.int64], int]]:
    """Yield features of the readable images of each batch, by kind, their indices, and the index where the next begins.

    Args:
        encoder: The encoder.
        data: The images.
        skipped: Log of images that cannot be read.
        batch: Images per forward pass.
        first: Index of the first image.
        console: Shows a bar if it is a terminal.
    """
    encoder.module.eval()
    encoder.check_batch(min(batch, len(data)))
    with progress(f"features of {data.spec}", len(data), console) as advance:
        advance(first)
        for images, indices, end in iterate_in_order(
            data, evaluation_crop(encoder.size), skipped=skipped, batch=batch, first=first
        ):
            rows = {}
            if len(indices):
                with torch.no_grad(), autocast(encoder.device, encoder.precision):
                    found = features(encoder.module, encoder.preprocess(images))
                both = {"cls": found.vector[:, -1], "mean": found.mean}
                rows = {key: value.float().cpu().numpy() for key, value in both.items()}
            yield rows, indices, end
            advance(end)


def _left_out(out: Path) -> Path:
    """The account of images that could not be read."""
    return out.with_name(f"{out.name}.skipped.csv")


def _resume(partial: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """What is done already of the same work; nothing of other work that was left unfinished under this name."""
    note = partial / "state.json"
    if note.exists():
        state = read_json(note)
        done = state.get("done") if isinstance(state, dict) else None
        if type(done) is not int or done < 0:
            raise UserError(f"{note} is damaged: remove {partial} first")
        if {key: state.get(key) for key in wanted} != wanted:
            raise UserError(
                f"{partial} holds unfinished work of another model, other images or --features: remove it first"
            )
        for path in partial.glob("*.npz"):  # written, but not noted
            if not path.stem.isdecimal() or int(path.stem) >= done:
                path.unlink()
        return wanted | {"done": done}
    write_text_atomically(note, json.dumps(wanted | {"done": 0}))
    return wanted | {"done": 0}


def _gathered(partial: Path, images: int) -> dict[str, np.ndarray]:
    """All rows that were kept. Raises UserError if a file of them is damaged."""
    try:
        files = [io.BytesIO(read_file(path, _MAX_BYTES)) for path in sorted(partial.glob("*.npz"))]
        for file in files:
            with zipfile.ZipFile(file) as members:
                if any(member.compress_type != zipfile.ZIP_STORED for member in members.infolist()):
                    raise ValueError("it is compressed")
            file.seek(0)
        parts = [dict(np.load(file, allow_pickle=False)) for file in files]
        table = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        index = table["index"]
        if index.dtype != np.int64 or not ((index >= 0) & (index < images)).all():
            raise ValueError("it has rows of images that are not there")
        rows = [value for key, value in table.items() if key != "index"]
        if not rows or any(len(v) != len(index) or v.ndim != 2 or v.dtype != np.float32 for v in rows):
            raise ValueError("it has more rows of one kind than of another")
    except (
        *(OSError, ValueError, KeyError, EOFError, MemoryError, TypeError, RuntimeError),  # NotImplementedError as well
        *(zipfile.BadZipFile, zlib.error),
    ) as error:
        raise UserError(f"{partial} holds unfinished work that is damaged ({error}): remove it first") from error
    return table


def _write(out: Path, table: dict[str, np.ndarray], data: ImageDataset) -> list[Path]:
    files = [data.path_of(index) for index in table["index"].tolist()]
    classes = None if data.labels is None else [data.classes[data.labels[index]] for index in table["index"].tolist()]
    values = {key: value for key, value in table.items() if key != "index"}
    if out.suffix == ".parquet":
        arrow, parquet = _parquet()
        columns: dict[str, Any] = {"file": [utf8(name) for name in files]}
        columns |= {"class": [utf8(name) for name in classes]} if classes is not None else {}
        for key, value in values.items():
            columns[key] = arrow.FixedSizeListArray.from_arrays(arrow.array(value.reshape(-1)), value.shape[1])
        atomic_write(out, part_of(parquet.write_table, arrow.table(columns)))
        return [out]
    names = out.with_suffix(".csv")
    rows = [["row", "file"] + (["class"] if classes is not None else [])]
    for row, name in enumerate(files):
        rows.append([str(row), csv_cell(name)] + ([csv_cell(classes[row])] if classes is not None else []))
    write_csv(names, rows)
    whole = np.concatenate(list(values.values()), axis=1)
    atomic_write(out, lambda file: np.save(file, whole))
    return [out, names]


def _parquet() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("parquet needs pyarrow: pip install 'pixmim[parquet]'; or end --out with .npy") from error
    return pyarrow, pyarrow.parquet
