"""Lists, tables and annotations may name only files below their own folder, and no URLs."""

import json
import os
import pickle
import socket
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pixmim.cli.flags import absolute
from pixmim.data import open_dataset
from pixmim.data.dataset import BadImage, ImageSpec
from pixmim.data.image_folder import from_list_file
from pixmim.data.uri import HubSpec, Part, read_parts, split_options
from pixmim.evaluation.detection.dataset import open_detection
from pixmim.utils.errors import UserError

datasets = pytest.importorskip("datasets")
arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


pytestmark = pytest.mark.usefixtures("own_datasets_cache")


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """Return an image next to an untrusted folder."""
    Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / "secret.png")
    (tmp_path / "given").mkdir()
    Image.new("RGB", (8, 8), (1, 0, 0)).save(tmp_path / "given" / "a.png")
    return tmp_path / "secret.png"


@pytest.fixture
def server() -> Iterator[Any]:
    """Run a server that records requests."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        vars(server).update(requests=requests, url=f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()


# Lists


@pytest.mark.parametrize(
    "line", ["../secret.png", "{}/secret.png", "x/../../secret.png", "/etc/passwd", "//etc/passwd"]
)
def test_a_list_must_not_lead_out_of_its_folder(secret: Path, line: str) -> None:
    given = secret.parent / "given"
    (given / "list.txt").write_text("a.png\n" + line.format(secret.parent) + "\n")
    with pytest.raises(UserError, match=rf"1 of the 2 paths in {given}/list.txt lead out .*,root=FOLDER"):
        open_dataset(f"{given}/list.txt")


def test_a_null_byte_hides_no_line(secret: Path) -> None:
    (secret.parent / "given" / "list.txt").write_bytes(b"a.png\0" + os.fsencode(secret) + b"\n")
    with pytest.raises(UserError, match="zero byte"):
        open_dataset(f"{secret.parent}/given/list.txt")


def test_a_root_allows_paths_below_another_folder(secret: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = secret.parent / "given"
    (given / "list.txt").write_text(f"a.png\n../secret.png\n{secret}\n{given}/a.png\n./a.png\na..b.png\n")
    for root in (secret.parent, "/", f"{given}/.."):
        data = open_dataset(f"{given}/list.txt,root={root}")
        assert [int(data.image(i)[0, 0, 0]) for i in range(5)] == [1, 200, 200, 1, 1]
    with pytest.raises(UserError, match=r"2 of the 6 paths .* lead out"):
        open_dataset(f"{given}/list.txt,root={given}")
    with pytest.raises(UserError, match=r"nosuch"):
        open_dataset(f"{given}/list.txt,root=/nosuch")
    with pytest.raises(UserError, match=r"folder of images and has no option root="):
        open_dataset(f"{given},root=/")
    (secret.parent / "link").symlink_to(given)  # a list may spell its own folder by any name
    (given / "list.txt").write_text(f"{secret.parent}/link/a.png\n")
    assert len(open_dataset(f"{given}/list.txt")) == 1 and len(open_dataset(f"{secret.parent}/link/list.txt")) == 1
    (given / "out").symlink_to("/etc")
    (given / "list.txt").write_text("out/../etc/passwd\n")
    with pytest.raises(UserError, match="lead out"):
        from_list_file(given / "list.txt")


def test_a_root_is_parsed_from_a_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x", "a+b"):
        (tmp_path / name).mkdir()
    for name in ("l.txt", "l.txt,root=x", "t.parquet"):
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    assert split_options("l.txt,root=x") == ("l.txt,root=x", {})  # a file of that name
    assert split_options("l.txt,root=a+b") == ("l.txt", {"root": ["a+b"]})
    assert split_options("hf:a/b,root=x") == ("hf:a/b,root=x", {})
    assert read_parts("l.txt,root=a+b*2+t.parquet,root=/") == [Part("l.txt,root=a+b", 2), Part("t.parquet,root=/")]
    whole = absolute("l.txt,root=a+b*2+t.parquet,root=x+hf:t.parquet:train,root=x+hf:u/s,root=a,b+hf:u/s")
    assert whole == (
        f"{tmp_path}/l.txt,root={tmp_path}/a+b*2+{tmp_path}/t.parquet,root={tmp_path}/x+"
        f"hf:{tmp_path}/t.parquet:train,root={tmp_path}/x+hf:u/s,root={tmp_path}/a,b+hf:u/s"
    )
    assert absolute(whole) == whole
    assert HubSpec.read("hf:t.parquet,root=/a,b,image=c") == HubSpec("t.parquet", image="c", root="/a,b")


@pytest.mark.parametrize("kind", ["fifo", "zero"])
def test_lists_and_annotations_must_be_regular_files(tmp_path: Path, kind: str) -> None:
    for name in ("l.txt", "l.json", "t.parquet", "t.arrow"):
        os.mkfifo(tmp_path / name) if kind == "fifo" else (tmp_path / name).symlink_to("/dev/zero")
    for spec in (
        f"{tmp_path}/l.txt",
        f"{tmp_path}/t.parquet",
        f"hf:{tmp_path}/t.arrow",
        f"hf:{tmp_path}",
        str(tmp_path),
    ):
        with pytest.raises(UserError):
            open_dataset(spec)
    with pytest.raises(UserError, match="not a regular file"):
        from_list_file(tmp_path / "l.txt")
    with pytest.raises(UserError, match="not a regular file"):
        open_detection(f"{tmp_path}/l.json", "", ImageSpec())


# Annotations in COCO's format


def coco(**changes: Any) -> dict[str, Any]:
    annotation = {
        "image_id": 1,
        "category_id": 1,
        "bbox": [1, 1, 4, 4],
        "area": 16,
        "segmentation": [[1, 1, 5, 1, 5, 5]],
    }
    image = {"id": 1, "file_name": "a.png", "height": 8, "width": 8}
    entry = {"id": 1, "name": "cat"}
    parts = {"images": image, "annotations": annotation, "categories": entry}
    return {kind: [part | changes.get(kind, {})] for kind, part in parts.items()}


def test_valid_annotations_are_read(secret: Path) -> None:
    (secret.parent / "given" / "x.json").write_text(json.dumps(coco()))
    data = open_detection(f"{secret.parent}/given/x.json", "", ImageSpec())
    assert not data.unmasked and data.images.image(0).shape == (3, 8, 8) and data.objects(0).areas.tolist() == [16]


@pytest.mark.parametrize("name", ["../secret.png", "{}/secret.png", "/etc/passwd", "x\0.png", "\ud800.png", ""])
def test_images_of_annotations_must_not_lead_out(secret: Path, name: str) -> None:
    given = secret.parent / "given"
    name = name.format(secret.parent)
    (given / "x.json").write_text(json.dumps(coco(images={"file_name": name})))
    if not name:
        with pytest.raises(UserError, match=r"1 of the 1 images .* are not in"):
            open_detection(f"{given}/x.json", "", ImageSpec())
        return
    with pytest.raises(UserError, match=r"1 of the 1 paths in .*x.json lead out"):
        open_detection(f"{given}/x.json", "", ImageSpec())
    if name == str(secret):
        assert len(open_detection(f"{given}/x.json", str(secret.parent), ImageSpec()).images) == 1


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("images", {"file_name": 3}),
        ("images", {"id": [1]}),
        ("images", {"id": None}),
        ("images", {"height": 0}),
        ("images", {"height": -8}),
        ("images", {"width": 10**9}),
        ("images", {"width": "8"}),
        ("images", {"width": 10**400}),
        ("images", {"width": float("nan")}),
        ("categories", {"id": {}}),
        ("categories", {"name": None}),
        ("annotations", {"bbox": [1, 2, 3]}),
        ("annotations", {"bbox": [1, 2, 3, 10**400]}),
        ("annotations", {"bbox": [1, 2, 3, float("inf")]}),
        ("annotations", {"bbox": "abcd"}),
        ("annotations", {"image_id": [1]}),
        ("annotations", {"image_id": 2}),
        ("annotations", {"category_id": 9}),
        ("annotations", {"area": "large"}),
        ("annotations", {"area": float("nan")}),
        ("annotations", {"segmentation": [[1, 1, 1e12, 1, 5, 5]]}),
        ("annotations", {"segmentation": [[1, 1, float("nan"), 1, 5, 5]]}),
        ("annotations", {"segmentation": [[1, 1, "x", 1, 5, 5]]}),
        ("annotations", {"segmentation": [[1, 1, 10**400, 1, 5, 5]]}),
        ("annotations", {"segmentation": {"size": [8, 8], "counts": [0, 10**12]}}),
        ("annotations", {"segmentation": {"size": [8, 8], "counts": [-64, 128]}}),
        ("annotations", {"segmentation": {"size": [8, 8], "counts": 5}}),
        ("annotations", {"segmentation": {"size": [10**6, 10**6], "counts": [10**12]}}),
        ("annotations", {"segmentation": {"size": 8, "counts": [64]}}),
    ],
)
def test_invalid_annotations_are_refused(secret: Path, kind: str, change: dict[str, Any]) -> None:
    file = secret.parent / "given" / "x.json"
    file.write_text(json.dumps(coco(**{kind: change})))
    with pytest.raises(UserError, match=r"x.json") as caught:
        open_detection(str(file), "", ImageSpec())
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[]", '{"images": 3}', '{"images": [3], "categories": [], "annotations": []}']
)
def test_files_that_are_not_annotations_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x.json"):
        open_detection(f"{tmp_path}/x.json", "", ImageSpec())


# Tables


def cells(folder: Path, rows: list[Any], name: str = "t.parquet") -> str:
    """Write a table with arbitrary paths."""
    folder.mkdir(exist_ok=True)
    column = arrow.array(rows, arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())]))
    parquet.write_table(arrow.table({"image": column}), folder / name)
    return f"{folder}/{name}"


def test_paths_in_a_table_stay_below_it(secret: Path, server: Any, tmp_path: Path) -> None:
    given = tmp_path / "given"
    (given / "link.png").symlink_to(secret)
    with zipfile.ZipFile(tmp_path / "out.zip", "w") as archive:
        archive.write(secret, "s.png")
    paths = {
        "a.png": "",
        f"{given}/a.png": "",
        "../secret.png": "leads out",
        str(secret): "leads out",
        "link.png": "leads out",
        "/dev/zero": "leads out",
        f"file://{secret}": "without a protocol",
        f"local://{secret}": "without a protocol",
        f"{server.url}/x.png": "without a protocol",
        "s3://bucket/x.png": "without a protocol",
        "hf://datasets/u/s/x.png": "without a protocol",
        f"simplecache::{server.url}/x.png": "without a protocol",
        f"zip://s.png::{tmp_path}/out.zip": "leads out",
        f"zip://s.png::{server.url}/x.zip": "without a protocol",
        "a\0.png": "null byte|null character",
        "x" * 5000: "too long",
        ".": "not a regular file",
    }
    spec = cells(given, [{"bytes": None, "path": path} for path in paths])
    data = open_dataset(spec)
    for index, reason in enumerate(paths.values()):
        if not reason:
            assert int(data.image(index)[0, 0, 0]) == 1
            continue
        with pytest.raises(BadImage, match=reason):
            data.image(index)
    assert not server.requests
    wider = open_dataset(f"{spec},root={tmp_path}")
    assert [int(wider.image(i)[0, 0, 0]) for i in (2, 3, 4, 12)] == [200] * 4
    assert int(open_dataset(f"hf:{spec},root=/").image(3)[0, 0, 0]) == 200
    with pytest.raises(BadImage, match="without a protocol"):
        wider.image(8)


def test_a_zip_bomb_and_a_fifo_in_a_table_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = tmp_path / "given"
    given.mkdir()
    monkeypatch.setattr("pixmim.data.huggingface.max_bytes", lambda: 10**5)
    with zipfile.ZipFile(given / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("s.png", bytes(10**7))
    os.mkfifo(given / "f.png")
    (given / "b.png").write_bytes(bytes(10**6))
    spec = cells(given, [{"bytes": None, "path": path} for path in ("zip://s.png::z.zip", "f.png", "b.png")])
    data: Any = open_dataset(spec)
    assert len(data._read_file("zip://s.png::z.zip")) == 10**5 + 1
    for index, reason in ((0, "not an image"), (1, "not a regular file"), (2, "limit")):
        with pytest.raises(BadImage, match=reason):
            data.image(index)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Return an untrusted folder with a table of two gray images."""
    rows = []
    for value in (10, 20):
        Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / "p.png")
        rows.append({"bytes": (tmp_path / "p.png").read_bytes(), "path": None})
    cells(tmp_path / "set", rows, "train.parquet")
    return tmp_path / "set"


README = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: "{}"
dataset_info:
  features:
  - name: image
    dtype: string
---
"""


def test_a_readme_has_no_effect(table: Path, secret: Path, server: Any) -> None:
    cells(secret.parent, [{"bytes": None, "path": str(secret)}] * 5, "outside.parquet")
    for path in (
        f"{server.url}/x.parquet",
        "../outside.parquet",
        f"{secret.parent}/outside.parquet",
        "hf://datasets/u/s",
    ):
        for name in ("README.md", ".huggingface.yaml"):
            (table / name).write_text(README.format(path) if name == "README.md" else README.format(path).strip("-\n"))
        (table / "dataset_infos.json").write_text('{"default": {"features": {}}}')
        (table / f"{table.name}.py").write_text("import os; os.mkdir('PWNED')")
        for spec in (f"{table}", f"hf:{table}", f"hf:{table}:train"):
            data = open_dataset(spec)
            assert [int(data.image(i)[0, 0, 0]) for i in range(len(data))] == [10, 20]
    assert not server.requests and not Path("PWNED").exists()


def test_files_of_a_dataset_must_not_lead_out(table: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    cells(other, [{"bytes": b"x", "path": None}])
    (table / "train-more.parquet").symlink_to(other / "t.parquet")
    with pytest.raises(UserError, match=r"train-more.parquet leads out of .*root=FOLDER"):
        open_dataset(str(table))
    assert len(open_dataset(f"hf:{table},root={tmp_path}")) == 3
    (table / "train-more.parquet").unlink()
    os.mkfifo(table / "train-more.parquet")
    with pytest.raises(UserError, match="not a regular file"):
        open_dataset(str(table))
    (table / "train-more.parquet").unlink()
    (table / "train ::x.parquet").write_bytes(b"")
    with pytest.raises(UserError, match="take this name for a URL"):
        open_dataset(str(table))


def test_names_of_splits_are_restricted(table: Path, tmp_path: Path) -> None:
    content = (table / "train.parquet").read_bytes()
    for layout, splits in {
        ("a.parquet", "b.parquet"): "train",
        ("data/x-00000-of-00002.parquet", "data/x-00001-of-00002.parquet", "test.parquet"): "x",
        ("my-train-set.parquet", "val.parquet", "test_1.parquet", "notes.parquet"): "train, validation, test",
        ("dev/1.parquet", "eval-2/1.parquet", "train.parquet"): "validation, test",
        ("[a]*?.parquet",): "train",
    }.items():
        folder = tmp_path / f"set{len(list(tmp_path.iterdir()))} [x]"
        for name in layout:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=rf"Its splits: {splits}$"):
            open_dataset(f"hf:{folder}:nosuch")
        assert len(open_dataset(f"hf:{folder}:{splits.split(',')[0]}")) in (2, 4)


def test_saved_datasets_read_only_their_own_files(table: Path, tmp_path: Path) -> None:
    """Their JSON files cannot name other files."""
    library = datasets.Dataset.from_dict({"image": [b"x"]})
    library.save_to_disk(tmp_path / "other")
    library.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=library).save_to_disk(tmp_path / "two")
    files: Any
    for files in ([{"filename": "../other/data-00000-of-00001.arrow"}], [{"filename": None}], None, [3], {}):
        (tmp_path / "one" / "state.json").write_text(json.dumps({"_data_files": files}))
        assert len(open_dataset(f"hf:{tmp_path}/one")) == 1
    (tmp_path / "one" / "state.json").write_text("[" * 10_000)
    for splits in (["../other"], ["/etc"], ["file://x"], "train", [3]):
        (tmp_path / "two" / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
        assert len(open_dataset(f"hf:{tmp_path}/two")) == 1
        with pytest.raises(UserError, match=r"no split 'x'.*: train$"):
            open_dataset(f"hf:{tmp_path}/two:x")
    (tmp_path / "two" / "more").symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match="leads out"):
        open_dataset(f"hf:{tmp_path}/two")
    data = tmp_path / "one" / "data-00000-of-00001.arrow"
    data.unlink()
    for make, reason in (
        (lambda: data.symlink_to(tmp_path / "other" / data.name), "leads out"),
        (lambda: os.mkfifo(data), "not a regular file"),
        (
            lambda: os.rename(tmp_path / "other" / data.name, data.with_name("data-00000-of-00002.arrow")),
            r"complete.* data-00000-of-00002\.arrow",
        ),
    ):
        make()
        with pytest.raises(UserError, match=reason):
            open_dataset(f"hf:{tmp_path}/one")
        data.unlink(missing_ok=True)


class Payload:
    def __reduce__(self) -> Any:
        return os.mkdir, ("PWNED",)


def test_no_pickle_of_an_extension_type_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    about = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickle.dumps(Payload())}
    schema = arrow.schema([arrow.field("image", arrow.binary(), metadata=about)])
    rows = arrow.table([arrow.array([b"x"])], schema=schema)
    (tmp_path / "set").mkdir()
    with arrow.OSFile("set/t.arrow", "wb") as sink, arrow.ipc.new_stream(sink, schema) as writer:
        writer.write_table(rows)
    parquet.write_table(rows, "t.parquet")
    datasets.Dataset.from_dict({"image": [b"x"]}).save_to_disk("saved")
    Path("saved/data-00000-of-00001.arrow").write_bytes(Path("set/t.arrow").read_bytes())
    for spec in ("set", "t.parquet", "saved", "set/t.arrow"):
        with pytest.raises((UserError, BadImage)):
            open_dataset(spec).image(0)
    assert not Path("PWNED").exists()


def test_features_cannot_name_files_or_run_decoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that the library creates from a schema neither read files nor decode."""
    for kind in (
        {"_type": "ClassLabel", "names_file": "/etc/passwd"},
        {"_type": "ClassLabel", "num_classes": 10**9},
        {"_type": "Pdf"},
        {"_type": "Audio"},
        {"_type": "os.system"},
        [[[[]]]],
    ):
        said = {b"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, "l": kind}}}).encode()}
        rows = arrow.table({"image": arrow.array([b"x"]), "l": arrow.array([0])}).replace_schema_metadata(said)
        parquet.write_table(rows, tmp_path / "t.parquet")
        with pytest.raises((UserError, BadImage)):
            open_dataset(f"{tmp_path}/t.parquet").image(0)


def test_classes_out_of_range_in_a_table_are_refused(tmp_path: Path) -> None:
    features = {"image": {"_type": "Image"}, "l": {"_type": "ClassLabel", "names": ["a", "b"]}}
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    for numbers, reason in (([0, 2], "has class 2, but there are 2"), ([0, 2**40], "has class")):
        columns = {"image": arrow.array([{"bytes": b"x", "path": None}] * 2, kind), "l": arrow.array(numbers)}
        said = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
        parquet.write_table(arrow.table(columns).replace_schema_metadata(said), tmp_path / "t.parquet")
        with pytest.raises(UserError, match=reason):
            open_dataset(f"{tmp_path}/t.parquet")


def test_arrow_data_must_not_point_out_of_its_buffers(tmp_path: Path) -> None:
    """Otherwise a row would be read from arbitrary memory of the process."""
    datasets.Dataset.from_dict({"image": [b"x" * 100, b"y" * 100]}).save_to_disk(tmp_path / "set")
    path = tmp_path / "set" / "data-00000-of-00001.arrow"
    content = path.read_bytes()
    offsets = np.asarray([0, 100, 200], "<i4").tobytes()
    assert content.count(offsets) == 1
    path.write_bytes(content.replace(offsets, np.asarray([0, 100, 2**30], "<i4").tobytes()))
    with pytest.raises(UserError, match="cannot be loaded"):
        open_dataset(f"{tmp_path}/set")


def test_the_decompressed_size_of_parquet_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pixmim.data.huggingface._MAX_EXPANDED", 10**6)
    rows = arrow.table({"image": arrow.array([bytes(10**6), bytes(10**6) + b"x"])})
    parquet.write_table(rows, tmp_path / "t.parquet", compression="zstd", use_dictionary=False)
    assert (tmp_path / "t.parquet").stat().st_size < 10_000
    with pytest.raises(UserError, match=r"t.parquet expands from"):
        open_dataset(f"{tmp_path}/t.parquet")


def test_a_socket_is_not_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    with socket.socket(socket.AF_UNIX) as end:
        end.bind("set/t.parquet")
        with pytest.raises(UserError, match="not a regular file"):
            open_dataset("set")
