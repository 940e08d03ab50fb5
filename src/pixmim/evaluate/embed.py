"""The features of every image of a data set, in a file: embeddings for search, clustering, or another's probe."""

import csv
import io
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from pixmim.data.feed.loader import in_order
from pixmim.data.patience import progress
from pixmim.data.skipped import Skipped
from pixmim.data.source import Source
from pixmim.disk import read_file, write_whole
from pixmim.engine.device import Precision, autocast
from pixmim.errors import UserError, first_line
from pixmim.evaluate.encoder import of_weights
from pixmim.models import features
from pixmim.transforms import evaluation_crop
from pixmim.weights.recognise import Weights

Kind = Literal["cls", "mean", "both"]


@torch.no_grad()
def embed(
    name: str,
    weights: Weights,
    data: Source,
    out: Path,
    kind: Kind = "both",
    *,
    batch: int = 256,
    device: str = "auto",
    precision: Precision = "auto",
    console: Console | None = None,
) -> list[str]:
    """Write one row for each readable image, in the order of the data; says in lines what was written.

    name  what the user calls the model, so that unfinished work on another one is not gone on with
    out   .npy: float32 (n, d), or (n, 2 d) with the global vector first for "both", and beside it a .csv with each
          row's file and class; .parquet: columns file, class (where there are classes), cls, mean
    kind  cls: the global token after the final norm; mean: the mean of the patch tokens; both

    What is done is kept in OUT.partial, batch by batch; the same call goes on from there. Raises UserError.
    """
    if out.suffix not in (".npy", ".parquet"):
        raise UserError(f"--out ends with .npy or .parquet, and not with '{out.suffix}'")
    if out.exists():
        raise UserError(f"{out} is there already: choose another --out")
    if out.suffix == ".parquet":
        _parquet()  # before the work, not after it
    encoder = of_weights(weights, device=device, precision=precision)
    encoder.module.eval()
    partial = out.with_name(out.name + ".partial")
    state = _resume(partial, {"model": name, "step": encoder.step, "data": data.spec, "files": data.fingerprint()})
    first = state["done"]
    skipped = Skipped(out.with_name(out.stem + "-skipped.csv"), len(data), 1.0)
    with progress(f"features of {data.spec}", len(data), console) as advance:
        advance(first)
        for images, indices, end in in_order(
            data, evaluation_crop(encoder.size), skipped=skipped, batch=batch, first=first
        ):
            if len(indices):
                x = encoder.ready(images)
                with autocast(encoder.device, encoder.precision):
                    found = features(encoder.module, x)
                rows = {"cls": found.vector[:, -1], "mean": found.mean}
                arrays: dict[str, Any] = {"index": indices}
                arrays |= {key: value.float().cpu().numpy() for key, value in rows.items() if kind in (key, "both")}
                np.savez(partial / f"{first:09d}.tmp.npz", **arrays)
                os.replace(partial / f"{first:09d}.tmp.npz", partial / f"{first:09d}.npz")
            first = end
            write_whole(partial / "state.json", json.dumps(state | {"done": end}))
            advance(end)
    parts = [_part(path) for path in sorted(partial.glob("*.npz"))]
    if not parts:
        raise UserError(f"not one image of {data.spec} can be read: see {out.stem}-skipped.csv")
    table = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    written = _write(out, table, data)
    shutil.rmtree(partial)
    lines = [f"{len(table['index'])} rows: {', '.join(map(str, written))}"]
    return lines + ([f"{len(skipped)} images could not be read: see {out.stem}-skipped.csv"] if len(skipped) else [])


def _resume(partial: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """What is done already of the same work; nothing of other work that was left unfinished under this name."""
    note = partial / "state.json"
    if note.is_file():
        state: dict[str, Any] = json.loads(note.read_text())
        if {key: state.get(key) for key in wanted} != wanted:
            raise UserError(f"{partial} holds unfinished work on another model or other images: remove it first")
        for path in partial.glob("*.npz"):  # written, but not noted
            if ".tmp" in path.name or int(path.stem) >= state["done"]:
                path.unlink()
        return state
    partial.mkdir(parents=True, exist_ok=True)
    write_whole(note, json.dumps(wanted | {"done": 0}))
    return wanted | {"done": 0}


def _part(path: Path) -> dict[str, np.ndarray]:
    """Read some rows of an unfinished table."""
    try:
        data = io.BytesIO(read_file(path, 2**30))
        with zipfile.ZipFile(data) as members:
            if any(member.compress_type != zipfile.ZIP_STORED for member in members.infolist()):
                raise ValueError("it is compressed")
        with np.load(data, allow_pickle=False) as part:
            return {key: part[key] for key in part.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}. Remove {path.parent} to begin again") from error


def _write(out: Path, table: dict[str, np.ndarray], data: Source) -> list[Path]:
    files = [data.locate(index) for index in table["index"].tolist()]
    classes = None if data.labels is None else [data.classes[data.labels[index]] for index in table["index"].tolist()]
    values = {key: value for key, value in table.items() if key != "index"}
    beside = out.with_name(out.name + ".tmp")
    if out.suffix == ".parquet":
        arrow, parquet = _parquet()
        columns: dict[str, Any] = {"file": files} | ({"class": classes} if classes is not None else {})
        for key, value in values.items():
            columns[key] = arrow.FixedSizeListArray.from_arrays(arrow.array(value.reshape(-1)), value.shape[1])
        parquet.write_table(arrow.table(columns), beside)
        os.replace(beside, out)
        return [out]
    with beside.open("wb") as file:
        np.save(file, np.concatenate(list(values.values()), axis=1))
    names = out.with_suffix(".csv")
    with names.open("w", newline="") as text:
        writer = csv.writer(text)
        writer.writerow(["row", "file"] + (["class"] if classes is not None else []))
        for row, name in enumerate(files):
            writer.writerow([row, name] + ([classes[row]] if classes is not None else []))
    os.replace(beside, out)
    return [out, names]


def _parquet() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("parquet needs pyarrow: pip install 'pixmim[parquet]'; or end --out with .npy") from error
    return pyarrow, pyarrow.parquet
