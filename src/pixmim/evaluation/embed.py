"""Write the features of every image of a dataset to a file: embeddings for search, clustering or an external probe."""

import io
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Shaped
from rich.console import Console
from safetensors.numpy import save
from torch import Tensor

from pixmim.config import ModelConfig
from pixmim.data.bad_images import BadImageLog
from pixmim.data.dataset import ImageDataset
from pixmim.data.uri import HubSpec, split_options
from pixmim.evaluation.context import check_finite, read_batches
from pixmim.evaluation.frozen_encoder import FrozenEncoder, fingerprint, frozen_encoder_from_weights
from pixmim.evaluation.visualize import to_image, to_rgb
from pixmim.models import features
from pixmim.training.precision import Precision
from pixmim.transforms.crops import evaluation_crop
from pixmim.utils.console import csv_cell, print_plain, utf8
from pixmim.utils.errors import UserError
from pixmim.utils.files import atomic_write, check_output, read_json, write_csv, write_json, write_text_atomically
from pixmim.utils.lock import LOCK_NAME, locked_folder
from pixmim.weights.detect import Weights
from pixmim.weights.safe_load import read

Kind = Literal["cls", "mean", "both"]


def embed(
    weights: Weights,
    data: ImageDataset,
    out: Path,
    kind: Kind = "both",
    *,
    batch: int = 256,
    device: str = "auto",
    precision: Precision = "auto",
    thumbnails: bool = False,
    overwrite: bool = False,
    console: Console | None = None,
) -> list[str]:
    """Write one row for each readable image, in the order of the data. Resumes from OUT.partial, batch by batch.

    A .npy file has float32 (n, d), or (n, 2 d) with the class token first for "both", and a .csv of each row's file and
    class. A .parquet file has the columns file, class (if there are classes), cls (the class token after the final
    norm; without one pooled, the vector that the network pools) and mean (of the patch tokens); with `thumbnails` also
    thumbnail, a JPEG of at most 96 pixels a side, as the struct (bytes, path) of Hugging Face's datasets, and x and y,
    a projection by UMAP, if umap-learn is installed.

    Returns lines about the written files. Raises UserError if a file exists, no image can be read, or another process
    is writing the same file.
    """
    if out.suffix not in (".npy", ".parquet"):
        raise UserError(f"--out must end in .npy or .parquet, not in '{out.suffix}'")
    if thumbnails and out.suffix != ".parquet":
        raise UserError(f"--thumbnails needs --out FILE.parquet, not {out}")
    if out.suffix == ".parquet":
        import_parquet()  # before the work
    work, skipped_path = out.with_name(out.name + ".partial"), out.with_name(f"{out.name}.skipped.csv")
    if work.is_symlink():
        raise UserError(f"{work} is a symbolic link: remove it first")
    with locked_folder(work, partial(print_plain, console)):
        resuming = (work / "state.json").exists()
        if not resuming and any(path.name != LOCK_NAME for path in work.iterdir()):
            raise UserError(f"{work} is there already, and is not unfinished work: choose another --out")
        csv = [out.with_suffix(".csv")] if out.suffix == ".npy" else []
        sources = _source_files(data)
        for path in [out, *csv, *([] if resuming else [skipped_path])]:
            if os.path.realpath(path) in sources:
                raise UserError(f"--out {out} would replace the data themselves, {path}: choose another name")
            check_output(path, overwrite)
        if overwrite and not resuming:
            skipped_path.unlink(missing_ok=True)
        encoder = frozen_encoder_from_weights(weights, device=device, precision=precision)
        identity = {"model": fingerprint(encoder), "features": kind, "data": data.spec, "files": data.fingerprint()}
        identity |= {"precision": encoder.precision, "format": "safetensors"}
        first = _resume(work, identity)
        skipped = BadImageLog(skipped_path, len(data), 1.0)
        for rows, indices, end in embed_batches(encoder, data, skipped, batch, first, console, kind):
            write_text_atomically(work / f"{first:09d}.safetensors", save({"index": indices, **rows}))
            first = end
            write_json(work / "state.json", identity | {"done": end})
        if not any(work.glob("*.safetensors")):
            raise UserError(f"no image of {data.spec} can be read: see {skipped_path}")
        table = _read_batches(work, len(data))
        more, lines = dict[str, Any](), list[str]()
        if thumbnails:
            try:
                more["x"], more["y"] = project(next(reversed(table.values()))).T
            except UserError as error:
                lines.append(f"no columns x and y: {error}")
            more["thumbnail"] = thumbnail_column(data, table["index"].tolist(), weights.config)
        written = _write(out, table, data, more)
        shutil.rmtree(work)
    lines = [f"{len(table['index'])} rows: {', '.join(map(str, written))}", *lines]
    missing = len(data) - len(table["index"])
    return lines + ([f"{missing:,} images could not be read: see {skipped_path}"] if missing else [])


def embed_batches(
    encoder: FrozenEncoder,
    data: ImageDataset,
    skipped: BadImageLog,
    batch: int,
    first: int = 0,
    console: Console | None = None,
    kind: Kind = "mean",
) -> Iterator[tuple[dict[str, npt.NDArray[np.float32]], npt.NDArray[np.int64], int]]:
    """Yield features of the readable images of each batch by name, their indices, and the index of the next batch.

    The names are those of columns, see `embed`; the mean is the last one. Raises UserError if they are not finite.
    """
    encoder.check_batch(min(batch, len(data)))
    crop = evaluation_crop(encoder.size)
    for images, indices, end in read_batches(data, crop, skipped, "features of", console, batch, first):
        with encoder.evaluating():
            result = features(encoder.module, encoder.preprocess(images))
        both = {result.vector_name: result.vector[:, -1], "mean": result.mean}
        chosen = {
            key: value.float().cpu()
            for key, value in both.items()
            if kind == "both" or (kind == "mean") == (key == "mean")
        }
        for value in chosen.values():
            check_finite(value, f"features of {data.spec}")
        yield {key: value.numpy() for key, value in chosen.items()}, indices, end


def _source_files(data: ImageDataset) -> set[str]:
    """Return the real paths of what the parts of a dataset, also of a split, were opened from."""
    paths = set[str]()
    for spec in {source.spec for source, _ in map(data.locate, range(len(data)))}:
        is_hub = spec.startswith("hf:") and not spec.startswith("hf://")
        path = HubSpec.read(spec).path or "" if is_hub else split_options(spec)[0]
        paths.add(os.path.realpath(os.path.expanduser(path)))
    return paths


def _resume(work: Path, identity: dict[str, Any]) -> int:
    """Return the number of images that are done. Raises UserError for unfinished work of other arguments."""
    path = work / "state.json"
    if not path.exists():
        write_json(path, identity | {"done": 0})
        return 0
    state = read_json(path)
    done = state.get("done") if isinstance(state, dict) else None
    if type(done) is not int or done < 0:
        raise UserError(f"{path} is damaged: remove {work} first")
    if {key: state.get(key) for key in identity} != identity:
        raise UserError(
            f"{work} holds unfinished work of another model or other images, --features or --precision: remove it first"
        )
    for file in work.glob("*.safetensors"):  # written after the last saved state
        if not file.stem.isdecimal() or int(file.stem) >= done:
            file.unlink()
    return done


def _read_batches(work: Path, images: int) -> dict[str, npt.NDArray[Any]]:
    """Read and check all saved rows. Raises UserError if a file is damaged."""
    try:
        batches = [read(path).tensors for path in sorted(work.glob("*.safetensors"))]
        names = sorted(batches[0], key="mean".__eq__)  # the mean last
        table = {name: torch.cat([batch[name] for batch in batches]).numpy() for name in names}
        index = table["index"]
        if index.dtype != np.int64 or not ((index >= 0) & (index < images)).all():
            raise ValueError("its indices are out of range")
        rows = [value for key, value in table.items() if key != "index"]
        if not rows or any(len(v) != len(index) or v.ndim != 2 or v.dtype != np.float32 for v in rows):
            raise ValueError("its arrays differ in length or type")
    except (UserError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{work} holds damaged unfinished work ({error}): remove it first") from error
    return table


def thumbnail_column(data: ImageDataset, indices: Sequence[int], config: ModelConfig) -> list[dict[str, Any]]:
    """Return thumbnails of images as the struct (bytes, path) of Hugging Face's datasets. Raises BadImage."""
    return [{"bytes": thumbnail(data.image(index), config), "path": None} for index in indices]


def file_columns(data: ImageDataset, indices: Sequence[int]) -> dict[str, list[str]]:
    """Return the columns file and, if there are classes, class of images; the class of an image without one is ""."""
    labels = data.labels  # once: some datasets compute them at each access
    columns = {"file": [data.path_of(index) for index in indices]}
    if labels is not None:
        columns["class"] = [data.classes[labels[index]] if labels[index] >= 0 else "" for index in indices]
    return columns


def thumbnail(image: Shaped[Tensor, "c h w"], config: ModelConfig, side: int = 96) -> bytes:
    """Return a JPEG of an image, at most `side` pixels wide and high."""
    picture = to_image(to_rgb(image, config))
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def project(features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Project features (n d) to (n 2) by UMAP on cosine distances, the same for equal features. Raises UserError."""
    if len(features) < 4:
        raise UserError(f"UMAP needs at least four images, not {len(features)}")
    try:
        import umap
    except ImportError as error:
        raise UserError("UMAP needs umap-learn: pip install 'pixmim[map]'") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fixed seed excludes threads, and few images limit the neighbors
        model = umap.UMAP(n_neighbors=min(15, len(features) - 1), metric="cosine", random_state=0, init="random")
        return np.asarray(model.fit_transform(features), np.float32)


def _write(out: Path, table: dict[str, npt.NDArray[Any]], data: ImageDataset, more: dict[str, Any]) -> list[Path]:
    names = file_columns(data, table["index"].tolist())
    values = {key: value for key, value in table.items() if key != "index"}
    if out.suffix == ".parquet":
        arrow, parquet = import_parquet()
        columns: dict[str, Any] = {key: [utf8(name) for name in column] for key, column in names.items()}
        for key, value in values.items():
            columns[key] = arrow.FixedSizeListArray.from_arrays(arrow.array(value.reshape(-1)), value.shape[1])
        atomic_write(out, partial(parquet.write_table, arrow.table(columns | more)))
        return [out]
    rows = zip(*names.values(), strict=True)
    lines = [["row", *names], *([str(i), *map(csv_cell, row)] for i, row in enumerate(rows))]
    write_csv(out.with_suffix(".csv"), lines)
    array = np.concatenate(list(values.values()), axis=1)
    atomic_write(out, lambda file: np.save(file, array))
    return [out, out.with_suffix(".csv")]


def import_parquet() -> tuple[Any, Any]:
    """Return the modules pyarrow and pyarrow.parquet. Raises UserError without the extra."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("parquet needs pyarrow: pip install 'pixmim[parquet]'; or pass --out FILE.npy") from error
    return pyarrow, pyarrow.parquet
