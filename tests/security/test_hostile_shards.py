"""Untrusted caches and tars: claims are checked at opening, and only regular files are read."""

import json
import os
import tarfile
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.shards import picture, shard, write
from pixmim.data import open_dataset
from pixmim.data.build_resized_cache import make_cache
from pixmim.data.dataset import BadImage, ImageSpec
from pixmim.data.resized_cache import open_cache
from pixmim.data.shards import tar_reader, webdataset
from pixmim.data.shards.dataset import INDEX_DTYPE, ShardDataset
from pixmim.data.shards.local import OpenFile
from pixmim.data.shards.tar_reader import iter_members
from pixmim.data.statistics import load_statistics
from pixmim.data.synthetic import SyntheticShapes
from pixmim.utils.errors import UserError

Edit = Callable[[Any], Any]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Two shards of two raw images."""
    make_cache(SyntheticShapes(count=4, size=16), tmp_path / "cached", (16, 16), per_shard=2, kind="raw")
    return tmp_path / "cached"


def edit_json(path: Path, **changes: object) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def edit_index(path: Path, edit: Callable[[Any], None]) -> None:
    """Change a shard's index and correct its checksum, as an attacker does."""
    entries = np.frombuffer(path.read_bytes(), INDEX_DTYPE).copy()
    edit(entries)
    entries[-1]["length"] = zlib.crc32(entries[:-1].tobytes()) & 0x7FFFFFFF
    path.write_bytes(entries.tobytes())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("images", 10**12),
        ("images", 10**10),  # in more shards than index.json lists
        ("images", 0),
        ("images", True),
        ("images", "4"),
        ("images", 4.0),
        ("per_shard", 0),
        ("per_shard", -2),
        ("per_shard", 10**12),
        ("size", [0, 16]),
        ("size", [16]),
        ("size", [16, True]),
        ("size", 16),
        ("classes", ["a", 1]),
        ("classes", "abc"),
        ("classes", None),
        ("channels", 0),
        ("channels", -3),
        ("quality", -1),
        ("kind", "pickle"),
        ("kind", []),
        ("dtype", "object"),
        ("tiff_pages", "all"),
        ("chroma", "411"),
        ("interpolation", "nearest"),
        ("fingerprint", 7),
        ("data", {}),
        ("data", ...),
        ("more", 1),
    ],
)
def test_invalid_settings(cache: Path, name: str, value: object) -> None:
    edit_json(cache / "settings.json", **{name: value})
    began = time.process_time()
    with pytest.raises(UserError, match=rf"settings.json.*{name}"):
        open_dataset(str(cache))
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "[" * 100_000, "{" * 10, '{"images": NaN}', '"\\ud800"', "\xff\x00"]
)
def test_malformed_settings_and_lists(cache: Path, text: str) -> None:
    for name in ("index.json", "settings.json"):
        (cache / name).write_text(text, "latin-1")
        with pytest.raises(UserError, match=name):
            open_dataset(str(cache))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("label", 10),
        ("label", -2),
        ("label", 2**31 - 1),
        ("offset", -512),
        ("offset", 2**63 - 1),
        ("offset", 10**9),
        ("length", -1),
        ("length", 2**31 - 1),
        ("h", 0),
        ("h", -16),
        ("h", 2**31 - 1),
        ("w", 1),
        ("image", 0),
        ("image", 2),
        ("image", -(2**63)),
    ],
)
def test_an_index_that_does_not_fit(cache: Path, field: str, value: int) -> None:
    before = open_cache(cache)
    assert before.labels is not None and len(before.classes) == 10

    def edit(entries: Any) -> None:
        entries[1][field] = value

    edit_index(cache / "shard-000000.index", edit)
    with pytest.raises(UserError, match=r"shard-000000.index is damaged"):
        open_dataset(str(cache))


def test_labels_without_classes(cache: Path) -> None:
    edit_json(cache / "settings.json", classes=[])
    with pytest.raises(UserError, match=r"of 0 classes"):
        open_dataset(str(cache))


def test_an_index_of_too_many_images_or_shards(cache: Path) -> None:
    content = (cache / "shard-000000.index").read_bytes()
    edit_index(cache / "shard-000000.index", lambda entries: None)
    entries = np.frombuffer(content, INDEX_DTYPE)
    more = np.concatenate([entries[:1], entries])
    (cache / "shard-000000.index").write_bytes(more.tobytes())
    edit_index(cache / "shard-000000.index", lambda entries: None)
    with pytest.raises(UserError, match="images other than 0 to 1"):
        open_dataset(str(cache))
    (cache / "shard-000000.index").write_bytes(content)
    listed = json.loads((cache / "index.json").read_text())["shards"]
    for shards in (listed[:1], listed * 1000, "ab", None):
        edit_json(cache / "index.json", shards=shards)
        with pytest.raises(UserError, match=r"index.json lists .* requires 2 for 4 images"):
            open_dataset(str(cache))


def test_an_image_of_another_size_than_in_the_index(tmp_path: Path) -> None:
    """A GPU cache reserves the space that the index claims."""
    make_cache(SyntheticShapes(count=2, size=16), tmp_path / "cached", (16, 16))

    def edit(entries: Any) -> None:
        entries[0]["h"] += 5

    edit_index(tmp_path / "cached" / "shard-000000.index", edit)
    data = open_dataset(str(tmp_path / "cached"))
    with pytest.raises(BadImage, match="size differs from the index"):
        data.image(0)
    assert data.image(1).shape[0] == 3


def not_regular(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(f"/dev/{kind}")


@pytest.mark.parametrize("kind", ["fifo", "zero", "random", "folder"])
def test_only_regular_files_are_read(cache: Path, tmp_path: Path, memory: Path, kind: str) -> None:
    """Without the check, this test would not end."""
    shards = tmp_path / "shards"
    for path in (shards / "a.tar", shards / "b.tar"):
        shard(path, range(2))
    assert len(open_dataset(str(shards))) == 4
    (cached_index,) = [path for path in (memory / "tars").iterdir()][:1]
    not_regular(cached_index, kind)  # ignored
    assert len(open_dataset(str(shards))) == 4
    not_regular(shards / "classes.txt", kind)
    with pytest.raises(UserError, match=r"classes.txt cannot be read"):
        open_dataset(str(shards))
    (shards / "classes.txt").rmdir() if kind == "folder" else (shards / "classes.txt").unlink()
    not_regular(shards / "b.tar", kind)
    with pytest.raises(UserError, match=r"b.tar"):
        open_dataset(str(shards))
    data = open_cache(cache)
    not_regular(cache / "stats.json", kind)
    assert load_statistics(str(cache), ImageSpec()) is None
    not_regular(cache / "shard-000001.tar", kind)
    with pytest.raises(UserError, match=r"shard-000001.tar"):
        data.image(3)
    for name in ("shard-000001.tar", "shard-000000.index", "index.json", "settings.json"):
        not_regular(cache / name, kind) if name != "shard-000001.tar" else None
        with pytest.raises(UserError, match=name):
            open_dataset(str(cache))


def test_a_link_where_a_temporary_file_will_be(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    folder = tmp_path / "cached"
    folder.mkdir()
    for name in ("shard-000000.tar", "shard-000000.index", "settings.json", "index.json"):
        for part in (str(os.getpid()), "0"):
            (folder / f"{name}.{part}.tmp").symlink_to(victim)
    make_cache(SyntheticShapes(count=2, size=16), folder, (16, 16))
    assert len(open_dataset(str(folder))) == 2 and victim.read_text() == "untouched"


def member_names(path: Path) -> list[str]:
    return [member.name for member in iter_members(OpenFile(path), str(path)) if not member.is_link]


def test_endless_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_reader, "_MAX_ZEROS", 2**24)
    path = tmp_path / "x.tar"
    shard(path, range(1))
    os.truncate(path, 10 * 2**40)  # takes no space
    with pytest.raises(UserError, match=r"bytes of zeros up to byte"):
        open_dataset(str(path))
    monkeypatch.setattr(tar_reader, "_MAX_ZEROS", 30_000)  # in total, so that many short runs do not help
    one = shard(tmp_path / "one.tar", range(1)).read_bytes()
    (tmp_path / "two.tar").write_bytes(one * 2)
    assert len(member_names(tmp_path / "two.tar")) == 4
    (tmp_path / "many.tar").write_bytes(one * 9)
    with pytest.raises(UserError, match=r"bytes of zeros"):
        member_names(tmp_path / "many.tar")


def pax(content: bytes, kind: bytes = b"x", times: int = 1) -> bytes:
    header = tarfile.TarInfo("h")
    header.type, header.size = kind, len(content)
    return (header.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)) * times


def one_file(name: str = "a.jpg", size: int = 0) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pax(b"11 size=-5\n") + one_file(), ""),  # not a number: ignored
        (pax(b"9 size=9" + b"9" * 50), "damaged|not a tar"),
        (pax(b"%d size=%s\n" % (5011, b"9" * 5000)) + one_file(), "damaged|not a tar"),
        (pax(b"30 size=99999999999999999999999\n") + one_file(), "damaged|not a tar"),
        (pax(b"%d path=%s\n" % (40_012, b"n" * 40_000)) + one_file(), "damaged|not a tar"),
        (pax(b"n" * 40_000, b"L") + one_file(), "damaged|not a tar"),
        (pax(b"n" * 100, b"L", 2000) + one_file(), ""),
        (pax(b"0 path=x\n") + one_file(), "damaged|not a tar"),
        (pax(b"99999999 path=x\n") + one_file(), "damaged|not a tar"),
        (pax(b"x", b"L", 3), "truncated"),
    ],
)
def test_absurd_headers(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(content)
    if not message:
        assert len(member_names(path)) == 1
        return
    with pytest.raises(UserError, match=message) as caught:
        member_names(path)
    assert len(str(caught.value)) < 1000


def test_a_long_extended_header_takes_linear_time(tmp_path: Path) -> None:
    records = b"6 a=b\n" * 170_000
    (tmp_path / "x.tar").write_bytes(pax(records) + one_file())
    began = time.process_time()
    assert member_names(tmp_path / "x.tar") == ["a.jpg"]
    assert time.process_time() - began < 5  # 40 s if each record were to copy the rest


def test_absurd_sizes_in_base_256(tmp_path: Path) -> None:
    for field in (b"\xff" * 12, b"\x80" + b"\xff" * 11, b"\xff" * 11 + b"\x00"):
        block = bytearray(one_file()[:512])
        block[124:136] = field
        block[148:156] = b"        "
        block[148:156] = b"%06o\0 " % sum(block)
        (tmp_path / "x.tar").write_bytes(bytes(block) + bytes(1024))
        with pytest.raises(UserError, match="not a tar"):
            member_names(tmp_path / "x.tar")


def edit_cached_index(memory: Path, edit: Edit, body: Callable[[bytes], bytes] = lambda body: body) -> None:
    """Change the cached index of the only tar, with its checksum."""
    (path,) = (memory / "tars").iterdir()
    head, _, rest = path.read_bytes()[:-4].partition(b"\n")
    data = json.dumps(edit(json.loads(head))).encode() + b"\n" + body(rest)
    path.write_bytes(data + zlib.crc32(data).to_bytes(4, "little"))


@pytest.mark.parametrize(
    "edit",
    [lambda header: header | {"samples": "2"}, lambda header: header | {"facts": {"more": 1}}, lambda header: []],
)
def test_an_invalid_cached_index_is_ignored(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch, edit: Edit
) -> None:
    shard(tmp_path / "x.tar", range(2))
    open_dataset(str(tmp_path / "x.tar"))
    edit_cached_index(memory, edit)
    scanned: list[str] = []
    scan = webdataset.scan
    monkeypatch.setattr(webdataset, "scan", lambda tar, name, *rest: scanned.append(name) or scan(tar, name, *rest))
    data = open_dataset(str(tmp_path / "x.tar"))
    assert len(data) == 2 and data.image(1).shape[2] == 21 and len(scanned) == 1


def test_a_bomb_of_compressed_names(tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard(tmp_path / "x.tar", range(2))
    before = open_dataset(str(tmp_path / "x.tar"))
    assert before.path_of(1).endswith(":0001")
    edit_cached_index(memory, lambda header: header, lambda body: body[:64] + zlib.compress(bytes(10**7)))
    monkeypatch.setattr("pixmim.data.shards.dataset._MAX_KEY_BYTES", 10**5)
    data = open_dataset(str(tmp_path / "x.tar"))
    assert isinstance(data, ShardDataset) and data.path_of(1).endswith("x.tar:000000001")


def test_a_high_class_number_is_an_identifier(tmp_path: Path) -> None:
    write(tmp_path / "x.tar", [("a.png", picture(1)), ("a.cls", b"999999999999")])
    assert open_dataset(str(tmp_path / "x.tar")).labels is None


def test_malformed_stats(cache: Path) -> None:
    for text in ("[]", "{}", '{"image_spec": {}, "mean": 1}', "[" * 10_000, "\xff"):
        (cache / "stats.json").write_text(text, "latin-1")
        assert load_statistics(str(cache), ImageSpec()) is None
    good = {"image_spec": asdict(ImageSpec()), "images": 4, "total": 4}
    for mean, std, right in (
        ([0.1] * 3, [0.2] * 3, True),
        ([0.1] * 3, [0.0] * 3, False),
        ([0.1] * 3, [-1.0] * 3, False),
        ([float("nan")] * 3, [0.2] * 3, False),
        ([0.1] * 3, [float("inf")] * 3, False),
        ([0.1] * 4, [0.2] * 4, False),
    ):
        (cache / "stats.json").write_text(json.dumps(good | {"mean": mean, "std": std}))
        assert (load_statistics(str(cache), ImageSpec()) is not None) == right
    os.truncate(cache / "stats.json", 10**12)
    assert load_statistics(str(cache), ImageSpec()) is None
