"""Fuzz tests of the dataset readers: every file gives a result or one clear error in bounded time."""

import json
import os
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pixmim.cli.flags import absolute
from pixmim.data import open_dataset
from pixmim.data.build_resized_cache import make_cache
from pixmim.data.dataset import BadImage, ImageSpec
from pixmim.data.image_folder import from_list_file
from pixmim.data.shards.dataset import INDEX_DTYPE
from pixmim.data.shards.local import OpenFile
from pixmim.data.shards.tar_reader import iter_members
from pixmim.data.synthetic import SyntheticShapes
from pixmim.data.uri import HubSpec, read_parts, split_options
from pixmim.evaluation.detection.dataset import open_detection
from pixmim.utils.errors import UserError

FUZZ = settings(max_examples=50)

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.sampled_from([0, -1, 10**12, 2**31, 2**63, 10**400])
    | st.floats()
    | st.text(max_size=20)
)
anything = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


def open_or_none(open_: Callable[[], Any]) -> Any:
    """Return `open_()`, or None after a UserError; any other exception fails the test."""
    try:
        return open_()
    except UserError as error:
        assert str(error) and len(str(error)) < 3000
        return None


def read_all(data: Any) -> None:
    for index in range(min(len(data), 20)):
        data.path_of(index)
        try:
            data.read_array(index)
        except (BadImage, UserError):
            continue


@st.composite
def tars(draw: st.DrawFn) -> bytes:
    """Draw a sequence of headers with valid checksums and odd fields."""
    parts = []
    for _ in range(draw(st.integers(0, 5))):
        member = tarfile.TarInfo(
            draw(st.sampled_from(["a.jpg", "a.cls", "b/c.png", "x" * 90, "../../e.jpg", "/f.jpg"]))
        )
        member.type = draw(st.sampled_from([b"0", b"\0", b"5", b"x", b"g", b"L", b"K", b"S", b"7", b"X", b"1"]))
        content = draw(
            st.binary(max_size=40)
            | st.sampled_from(
                [b"12 path=abc\n", b"11 size=99\n", b"99 path=x\n", b"10 size=-1", b"20 GNU.sparse.a=bcd\n", b"7\n"]
            )
        )
        block = bytearray(member.tobuf(tarfile.USTAR_FORMAT)[:512])
        block[124:136] = draw(
            st.just(b"%011o\0" % len(content))
            | st.binary(min_size=12, max_size=12)
            | st.just(b"\x80" + bytes(10) + b"\5")
        )
        block[148:156] = b"        "
        block[148:156] = b"%06o\0 " % sum(block)
        parts.append(bytes(block) + content + bytes(-len(content) % 512))
    return b"".join(parts) + bytes(draw(st.sampled_from([0, 512, 1024, 10240])))


@FUZZ
@given(content=tars() | st.binary(max_size=1500))
def test_tars(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    found = open_or_none(lambda: list(iter_members(OpenFile(path), "x.tar")))
    for member in found or []:
        assert member.offset > 0 and member.length >= 0 and member.offset + member.length <= len(content)
    data = open_or_none(lambda: open_dataset(str(path)))
    if data is not None:
        read_all(data)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "cached"
    make_cache(SyntheticShapes(count=3, size=8), folder, (8, 8), per_shard=2, kind="raw")
    return folder


@FUZZ
@given(data=st.data())
def test_settings_and_indexes_of_a_cache(cache: Path, data: st.DataObject) -> None:
    before = {path: path.read_bytes() for path in cache.iterdir()}
    try:
        name = data.draw(st.sampled_from(["settings.json", "index.json", "shard-000000.index", "shard-000001.tar"]))
        path = cache / name
        if name.endswith(".json"):
            content = json.loads(before[path])
            keys = [*content, "more"]
            edit = data.draw(st.dictionaries(st.sampled_from(keys), anything, min_size=1, max_size=3))
            path.write_text(json.dumps(data.draw(st.just(content | edit) | anything)))
        elif name.endswith(".index"):
            entries = np.frombuffer(before[path], INDEX_DTYPE).copy()
            field = data.draw(st.sampled_from(INDEX_DTYPE.names))
            low, high = np.iinfo(INDEX_DTYPE[field]).min, np.iinfo(INDEX_DTYPE[field]).max
            value = data.draw(st.integers(-3, 70) | st.integers(int(low), int(high)))
            entries[data.draw(st.integers(0, len(entries) - 1))][field] = value
            entries[-1]["length"] = zlib.crc32(entries[:-1].tobytes()) & 0x7FFFFFFF
            path.write_bytes(entries.tobytes())
        else:
            path.write_bytes(before[path][: data.draw(st.integers(0, len(before[path])))])
        found = open_or_none(lambda: open_dataset(str(cache)))
        if found is not None:
            assert found.labels is None or (found.labels.max() < len(found.classes) and found.labels.min() >= -1)
            read_all(found)
    finally:
        for path, content in before.items():
            path.write_bytes(content)


@FUZZ
@given(data=st.data())
def test_annotations(tmp_path: Path, data: st.DataObject) -> None:
    content: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "a.png", "height": 8, "width": 8}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4], "segmentation": [[1, 1, 5, 1, 5, 5]]}],
    }
    kind = data.draw(st.sampled_from(sorted(content)))
    key = data.draw(st.sampled_from([*sorted(content[kind][0]), "area", "iscrowd", ""]))
    if key:
        content[kind][0][key] = data.draw(anything)
    else:
        content[kind] = data.draw(anything)
    text = json.dumps(data.draw(st.just(content) | anything))
    (tmp_path / "x.json").write_text(text)
    found = open_or_none(lambda: open_detection(f"{tmp_path}/x.json", "", ImageSpec()))
    if found is not None:
        for index in range(len(found.images)):
            found.objects(index)
        read_all(found.images)


@FUZZ
@given(
    lines=st.lists(
        st.text(max_size=12)
        | st.sampled_from(["..", "x\0/etc/passwd", "../x", "/etc/passwd", "a/../..", "~", "a.png"]),
        max_size=6,
    )
)
def test_lists(tmp_path: Path, lines: list[str]) -> None:
    (tmp_path / "l.txt").write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    found = open_or_none(lambda: from_list_file(tmp_path / "l.txt"))
    if found is not None:
        read_all(found)
        top = os.path.realpath(tmp_path)
        assert all(os.path.realpath(found.path_of(i)).startswith(top) for i in range(len(found)))


words = [
    "a",
    "b.txt",
    "+",
    "*",
    "2",
    ",",
    "root=",
    "/",
    "..",
    "hf:",
    "u/s",
    ":",
    "image=",
    ",label=",
    "split:train:",
    ",exclude=*",
    "x",
    "shapes:",
    "s3://b",
    "{",
    "~",
    " ",
]


@FUZZ
@given(spec=st.lists(st.sampled_from(words) | st.text(max_size=3), max_size=9).map("".join))
def test_specs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.txt").touch()
    open_or_none(lambda: read_parts(spec))
    open_or_none(lambda: HubSpec.read(spec))
    open_or_none(lambda: split_options(spec))
    resolved = open_or_none(lambda: absolute(spec))
    if resolved:
        assert open_or_none(lambda: absolute(resolved)) == resolved
