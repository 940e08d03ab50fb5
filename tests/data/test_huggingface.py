"""Hugging Face datasets give the same pixels as files, from any thread and in any layout."""

import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from helpers.cli import say
from helpers.runs import train
from pixmim.config import PretrainConfig
from pixmim.data import open_dataset
from pixmim.data.build_resized_cache import make_cache
from pixmim.data.dataset import BadImage, ImageDataset, ImageSpec
from pixmim.data.huggingface import ArrowDataset, is_arrow_dataset
from pixmim.data.image_folder import ImageFolder
from pixmim.utils.errors import UserError

datasets = pytest.importorskip("datasets")
arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

Make = Callable[..., PretrainConfig]


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


@pytest.fixture
def files(pictures: Path) -> ImageFolder:
    """The images as files, in the order of the datasets below."""
    data = open_dataset(str(pictures))
    assert isinstance(data, ImageFolder)
    return data


@pytest.fixture
def library(files: ImageFolder) -> Any:
    """A dataset of the ten images, with columns of several types."""
    paths = [Path(files.path_of(i)) for i in range(len(files))]
    columns = {
        "image": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
        "label": [path.parent.name for path in paths],
        "number": [7 if i % 2 else 30 for i in range(10)],
        "word": ["b" if i % 2 else "a" for i in range(10)],
        "share": [i / 10 for i in range(10)],
    }
    kinds = {
        "image": datasets.Image(),
        "label": datasets.ClassLabel(names=["cats", "dogs"]),
        "number": datasets.Value("int32"),
        "word": datasets.Value("string"),
        "share": datasets.Value("float32"),
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def same(data: ImageDataset, files: ImageDataset, order: list[int] | None = None) -> bool:
    """Return True if a dataset has the images and classes of the files, in an order."""
    order = list(range(len(files))) if order is None else order
    assert data.labels is not None and files.labels is not None and data.classes == ["cats", "dogs"]
    return (
        len(data) == len(order)
        and all(torch.equal(data.image(i), files.image(j)) for i, j in enumerate(order))
        and data.labels.tolist() == files.labels[order].tolist()
    )


def shards(library: Any, folder: Path, split: str, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        library.shard(count, i, contiguous=True).to_parquet(folder / f"{split}-{i:05d}-of-{count:05d}.parquet")


def test_parquet_in_shards_and_splits(library: Any, files: ImageFolder, tmp_path: Path) -> None:
    shards(library, tmp_path / "set" / "data", "train", 3)
    shards(library.select([8, 2]), tmp_path / "set" / "data", "test", 1)
    for spec in (f"{tmp_path}/set", f"hf:{tmp_path}/set", f"hf:{tmp_path}/set:train,image=image,label=label"):
        data = open_dataset(spec)
        assert same(data, files) and data.spec == spec
        assert data.description == "images from column 'image', classes from 'label'"
    assert data.path_of(6) == f"hf:{tmp_path}/set:train#6 (1.jpg)"
    assert same(open_dataset(f"hf:{tmp_path}/set:test"), files, [8, 2])
    assert open_dataset(f"{tmp_path}/set", ImageSpec(1)).image(0).shape[0] == 1


def test_one_file_and_a_folder_of_files(library: Any, files: ImageFolder, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    library.to_parquet(tmp_path / "flat" / "birds.parquet")
    assert same(open_dataset(f"{tmp_path}/flat"), files) and same(open_dataset(f"{tmp_path}/flat/birds.parquet"), files)
    library.save_to_disk(tmp_path / "saved", num_shards=2)
    (tmp_path / "loose").mkdir()
    for path in (tmp_path / "saved").glob("*.arrow"):
        (tmp_path / "loose" / path.name).write_bytes(path.read_bytes())
    assert same(open_dataset(f"{tmp_path}/loose"), files)
    one = open_dataset(f"{tmp_path}/loose/data-00000-of-00002.arrow")
    assert same(one, files, [0, 1, 2, 3, 4])


def test_saved_to_disk_with_and_without_splits(library: Any, files: ImageFolder, tmp_path: Path) -> None:
    library.save_to_disk(tmp_path / "one", num_shards=3)
    assert same(open_dataset(f"{tmp_path}/one"), files)
    mixed = library.shuffle(seed=1)
    order = [int(np.flatnonzero([row == other for other in library["share"]])[0]) for row in mixed["share"]]
    datasets.DatasetDict(train=mixed, test=library.select([3])).save_to_disk(tmp_path / "two")
    assert same(open_dataset(f"{tmp_path}/two"), files, order) and order != sorted(order)
    assert same(open_dataset(f"hf:{tmp_path}/two:test"), files, [3])
    with pytest.raises(UserError, match=r"no split 'tests'; did you mean 'test'\? Its splits: test, train"):
        open_dataset(f"hf:{tmp_path}/two:tests")


@pytest.mark.parametrize(
    ("change", "order"),
    [
        (lambda d: d.select([9, 0, 4]), [9, 0, 4]),
        (lambda d: d.select(range(3, 8)), [3, 4, 5, 6, 7]),
        (lambda d: d.shard(3, 1, contiguous=False), [1, 4, 7]),
        (lambda d: d.select(range(2, 9)).select([6, 1]), [8, 3]),
        (lambda d: datasets.concatenate_datasets([d.select([5]), d.select(range(4)), d]), [5, 0, 1, 2, 3, *range(10)]),
        (lambda d: d.filter(lambda row: row["word"] == "b"), [1, 3, 5, 7, 9]),
    ],
)
def test_selections_of_any_kind(
    change: Callable[[Any], Any], order: list[int], library: Any, files: ImageFolder
) -> None:
    data = ArrowDataset(change(library), "some rows")
    assert same(data, files, order)
    assert data.path_of(0).startswith("some rows#0 (")


def test_eight_threads_read_the_same_images(library: Any, files: ImageFolder, tmp_path: Path) -> None:
    library.save_to_disk(tmp_path / "set", num_shards=4)
    data = open_dataset(f"{tmp_path}/set")
    expected = [files.image(i) for i in range(10)]
    order = np.random.default_rng(0).integers(0, 10, 2000).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert all(torch.equal(image, expected[i]) for i, image in zip(order, pool.map(data.image, order), strict=True))


@pytest.mark.parametrize("kind", ["bytes", "struct", "large", "paths"])
def test_plain_parquet_of_any_tool(kind: str, files: ImageFolder, tmp_path: Path) -> None:
    paths = [Path(files.path_of(i)) for i in range(10)]
    contents = [path.read_bytes() for path in paths]
    (tmp_path / "set").mkdir()
    column = {
        "bytes": lambda: arrow.array(contents),
        "large": lambda: arrow.array(contents, arrow.large_binary()),
        "struct": lambda: arrow.array([{"bytes": content, "path": None} for content in contents]),
        "paths": lambda: arrow.array([str(path.relative_to(tmp_path)) for path in paths]),
    }[kind]()
    table = arrow.table({"photo": column, "kind": [path.parent.name for path in paths], "n": list(range(10))})
    parquet.write_table(table, tmp_path / "set.parquet", row_group_size=4)
    spec = f"hf:{tmp_path}/set.parquet,label=kind"
    if kind == "paths":
        with pytest.raises(UserError, match="no image column; its columns: photo, kind, n"):
            open_dataset(spec)
        spec += ",image=photo"
    assert same(open_dataset(spec), files)


def test_paths_without_bytes_and_inside_an_archive(files: ImageFolder, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.write(files.path_of(1), "one.jpg")
    rows = [
        {"path": files.path_of(0)},
        {"path": f"zip://one.jpg::{tmp_path}/all.zip"},
        {"path": "zip://no::x"},
        None,
        {},
    ]
    cells = [row if row is None else {"bytes": None, "path": None} | row for row in rows] + [{"path": "/no/such"}]
    column = arrow.array(cells, arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())]))
    table = datasets.Dataset(arrow.table({"x": column}))
    data = ArrowDataset(table, "rows", image="x", roots=[tmp_path])
    assert torch.equal(data.image(0), files.image(0)) and torch.equal(data.image(1), files.image(1))
    for index, reason in ((2, "No such file"), (3, "neither bytes nor a path"), (4, "neither"), (5, "leads out of")):
        with pytest.raises(BadImage, match=reason):
            data.image(index)
    assert data.path_of(0) == f"rows#0 ({files.path_of(0)})" and data.path_of(3) == "rows#3"


def test_labels(library: Any, files: ImageFolder) -> None:
    by_number, by_word = (
        ArrowDataset(library, "set", label="number"),
        ArrowDataset(library.select([3, 2, 1]), "set", label="word"),
    )
    assert by_number.classes == ["7", "30"] and by_number.labels is not None and by_number.labels.tolist() == [1, 0] * 5
    assert by_word.classes == ["a", "b"] and by_word.labels is not None and by_word.labels.tolist() == [1, 0, 1]
    two = library.add_column("fine", [0] * 10).cast_column("fine", datasets.ClassLabel(names=["all"]))
    assert (ArrowDataset(two, "set").labels, ArrowDataset(two, "set").classes) == (None, [])
    assert ArrowDataset(two, "set").description.endswith("no classes chosen: add ,label= and one of label, fine")
    assert ArrowDataset(two, "set", label="fine").classes == ["all"]
    assert ArrowDataset(library.remove_columns("label"), "set").description.endswith("'image', no classes")
    hidden = library.remove_columns("label").add_column("label", [0, -1, None, 1] + [1] * 6)
    hidden = hidden.cast_column("label", datasets.ClassLabel(names=["cats", "dogs"]))
    assert (
        ArrowDataset(hidden, "set").labels is None
        and "has no class in 2 of 10 rows" in ArrowDataset(hidden, "set").description
    )
    with pytest.raises(UserError, match="has no class in 2 of 10 rows, the first of them row 1"):
        ArrowDataset(hidden, "set", label="label")
    empty = library.add_column("name", ["", "a", None] + ["b"] * 7)
    with pytest.raises(UserError, match="has no class in 2 of 10 rows, the first of them row 0"):
        ArrowDataset(empty, "set", label="name")


def test_unusable_columns_and_options(library: Any, tmp_path: Path) -> None:
    library.save_to_disk(tmp_path / "set")
    for options, message in (
        ("image=imgae", "no column 'imgae'; did you mean 'image'"),
        ("image=number", r"column 'number' of .* holds int32 instead"),
        ("label=labels", "no column 'labels'; did you mean 'label'"),
        ("label=share", "holds float; classes are"),
        ("config=en", "config="),
        ("revision=main", "revision="),
    ):
        with pytest.raises(UserError, match=message):
            open_dataset(f"hf:{tmp_path}/set,{options}")
    two = library.add_column("second", library["word"]).cast_column("second", datasets.Image())
    with pytest.raises(UserError, match="add ,image= and one of image, second"):
        ArrowDataset(two, "set")
    with pytest.raises(UserError, match="has no rows"):
        ArrowDataset(library.select([]), "set")
    (tmp_path / "table.csv").write_text("a\n1\n")
    with pytest.raises(UserError, match=r"neither a \.parquet nor a \.arrow file"):
        open_dataset(f"hf:{tmp_path}/table.csv")


def test_load_errors_explain_the_cause(library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    not_found = datasets.exceptions.DatasetNotFoundError(
        "Dataset 'a/b' is a gated dataset on the Hub.\nAsk for access."
    )
    for error, message in (
        (ConnectionError("no network"), r"hf:a/b cannot be loaded: no network.*HF_HUB_OFFLINE.*a/b"),
        (not_found, r"gated dataset on the Hub. Ask for access.*hf auth login"),
    ):
        with monkeypatch.context() as patch, pytest.raises(UserError, match=message):
            patch.setattr(datasets, "load_dataset_builder", Mock(side_effect=error))
            open_dataset("hf:a/b")
    library.save_to_disk(tmp_path / "saved")
    shards(library, tmp_path / "set", "train", 2)
    for path in (tmp_path / "saved" / "data-00000-of-00001.arrow", tmp_path / "set" / "train-00001-of-00002.parquet"):
        path.write_bytes(path.read_bytes()[:-2000])
        with pytest.raises(UserError, match=f"{path.parent.name} cannot be loaded: "):
            open_dataset(str(path.parent))
    with pytest.raises(UserError, match=r"config="):
        open_dataset(f"hf:{tmp_path}/set,config=en")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'pixmim\[hub\]'"):
        open_dataset("hf:a/b")


def test_a_broken_image_is_a_bad_image() -> None:
    rows = [{"bytes": b"<html>", "path": "x.jpg"}, {"bytes": b"", "path": "y.jpg"}]
    data = ArrowDataset(
        datasets.Dataset.from_dict({"image": rows}, features=datasets.Features(image=datasets.Image())), "set"
    )
    with pytest.raises(BadImage, match="not an image"):
        data.image(0)
    with pytest.raises(BadImage, match="empty"):
        data.image(1)


def test_fingerprint_depends_on_the_rows(library: Any, tmp_path: Path) -> None:
    shards(library, tmp_path / "set", "train", 2)
    library.save_to_disk(tmp_path / "saved")
    for spec in (f"{tmp_path}/set", f"{tmp_path}/saved"):
        assert open_dataset(spec).fingerprint() == open_dataset(spec).fingerprint()
    prints = [
        ArrowDataset(data, "set").fingerprint() for data in (library, library.select([1, 2]), library.select([1, 3]))
    ]
    assert len(set(prints)) == 3


def test_is_arrow_dataset(library: Any, files: ImageFolder, pictures: Path, tmp_path: Path) -> None:
    """A table of features in a folder of images, or above it, does not hide the images."""
    shards(library, pictures, "features", 1)
    assert not is_arrow_dataset(pictures) and len(open_dataset(str(pictures))) == 10
    shards(library, pictures / "cats", "features", 1)
    assert not is_arrow_dataset(pictures / "cats")
    shards(library, tmp_path / "set" / "data", "train", 1)
    for hidden in ("._train.jpg", "data/._train.jpg", ".thumbnails/1.png"):
        (tmp_path / "set" / hidden).parent.mkdir(exist_ok=True)
        (tmp_path / "set" / hidden).write_bytes(b"of a file manager")
    assert (
        is_arrow_dataset(tmp_path / "set")
        and is_arrow_dataset(tmp_path / "set" / "data")
        and not is_arrow_dataset(tmp_path / "nosuch")
    )


def test_a_run_from_parquet(
    library: Any, pictures: Path, tmp_path: Path, tiny_run: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pre-training, a cache, an embedding and an evaluation accept the same spec."""
    shards(library, tmp_path / "set", "train", 3)
    spec = f"hf:{tmp_path}/set:train"
    text = train(tiny_run(data=spec, steps=1), tmp_path / "table")
    assert "images from column 'image', classes from 'label'" in text
    assert same(open_dataset(spec), open_dataset(str(pictures)))

    assert make_cache(open_dataset(spec), tmp_path / "cache", (32, 32)).images == 10
    assert open_dataset(f"{tmp_path}/cache").classes == ["cats", "dogs"]
    run = tmp_path / "table"
    assert say(capsys, "embed", run, "--data", spec, "--out", tmp_path / "f.npy", "--device", "cpu")[0] == 0
    assert "set:train#9 (4.jpg),dogs" in (tmp_path / "f.csv").read_text()
    status, text = say(
        capsys, "evaluate", "knn", run, "--train", f"{spec}*2+{pictures}", "--test", spec, "--device", "cpu"
    )
    assert status == 0 and "k-NN" in text
