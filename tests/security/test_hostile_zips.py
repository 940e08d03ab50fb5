"""Zip archives that are bombs, or whose names lead elsewhere, are refused at opening or cost one line each."""

import stat
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from helpers.images import PNG
from pixmim.data import open_dataset, zip_archive
from pixmim.data.dataset import BadImage
from pixmim.data.decode import limits
from pixmim.data.shards import local
from pixmim.utils.errors import UserError


def pack(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as out:
        for name, data in members:
            out.writestr(name, data, compress_type=method)
    return path


def named(name: str, mode: int = 0) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("x")
    info.filename, info.external_attr = name, mode << 16
    return info


@pytest.mark.parametrize(
    "name", ["/etc/a.png", "../a.png", "a/../../b.png", "C:/a.png", "..\\a.png", "\\\\host\\a.png"]
)
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    archive = pack(tmp_path / "x.zip", ("good.png", PNG), (named(name), PNG))
    with pytest.raises(UserError, match="lead out of it"):
        open_dataset(str(archive))


def test_links_are_ignored_and_counted(tmp_path: Path) -> None:
    archive = pack(tmp_path / "x.zip", ("a.png", PNG), (named("b.png", stat.S_IFLNK | 0o777), b"/etc/passwd"))
    data = open_dataset(str(archive))
    assert len(data) == 1 and data.left_out == "1 links ignored"


def test_two_files_of_one_path_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as out:
        for name in ("a.png", "./a.png"):
            out.writestr(named(name), PNG)
    with pytest.raises(UserError, match=r"several files of one path, such as 'a\.png'"):
        open_dataset(str(tmp_path / "x.zip"))


def patched(tmp_path: Path, change: Callable[[bytearray, int], None], method: int = zipfile.ZIP_DEFLATED) -> Path:
    """Return an archive of one image whose entry in the table of contents is changed."""
    path = pack(tmp_path / "x.zip", ("a.png", PNG), method=method)
    data = bytearray(path.read_bytes())
    change(data, data.index(b"PK\1\2"))
    path.write_bytes(data)
    return path


def test_encrypted_archives_are_refused(tmp_path: Path) -> None:
    def encrypt(data: bytearray, entry: int) -> None:
        data[entry + 8] |= 1

    with pytest.raises(UserError, match="1 of its 1 images are encrypted"):
        open_dataset(str(patched(tmp_path, encrypt)))


def test_overlapping_members_are_a_bomb(tmp_path: Path) -> None:
    path = pack(tmp_path / "x.zip", ("a.png", PNG))
    data = path.read_bytes()
    start, end = data.index(b"PK\1\2"), data.index(b"PK\5\6")
    entry, count = data[start:end], 200
    table = b"".join(entry[:46] + b"%05d" % i for i in range(count))
    trailer = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, len(table), start, 0)
    path.write_bytes(data[:start] + table.replace(b"a.png", b"") + trailer)
    with pytest.raises(UserError, match="overlap"):
        open_dataset(str(path))


def test_a_member_never_unpacks_to_more_than_it_declares(tmp_path: Path) -> None:
    zeros = 200 * 2**20
    path = pack(tmp_path / "x.zip", ("a.png", bytes(zeros)), method=zipfile.ZIP_DEFLATED)
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.index(b"PK\1\2") + 24, 1000)  # declared size
    path.write_bytes(data)
    images = open_dataset(str(path))
    tracemalloc.start()
    with pytest.raises(BadImage, match="differs from the archive"):
        images.read_array(0)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_declared_sizes_are_checked_before_anything_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pack(tmp_path / "x.zip", ("a.png", bytes(2**21)), method=zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(limits, "max_bytes", lambda: 2**20)
    with pytest.raises(BadImage, match="allowed on this machine"):
        open_dataset(str(path)).read_array(0)


def test_a_large_table_of_contents_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(tmp_path / "x.zip", *((f"{i}.png", b"") for i in range(100)))
    monkeypatch.setattr(zip_archive, "_MAX_TABLE_BYTES", 2000)
    with pytest.raises(UserError, match="table of contents"):
        open_dataset(str(path))


@pytest.mark.parametrize("seed", range(20))
def test_damage_gives_images_or_one_line(tmp_path: Path, seed: int) -> None:
    path = pack(tmp_path / "x.zip", ("a/1.png", PNG), ("b/2.png", PNG), method=zipfile.ZIP_DEFLATED)
    rng, data = np.random.default_rng(seed), bytearray(path.read_bytes())
    first = data.index(b"PK\1\2") if seed % 3 else 0
    for position in rng.integers(first, len(data), 1 + seed % 7):
        data[position] = rng.integers(256)
    path.write_bytes(data[: rng.integers(len(data))] if seed % 5 == 0 else data)
    try:
        images = open_dataset(str(path))
    except UserError as error:
        assert "\n" not in str(error)
        return
    for i in range(len(images)):
        try:
            images.read_array(i)
        except BadImage as error:
            assert "\n" not in str(error)


def test_an_archive_that_changes_while_in_use_ends_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "RECHECK_SECONDS", 0)
    path = pack(tmp_path / "x.zip", ("a.png", PNG))
    images = open_dataset(str(path))
    pack(path, ("a.png", PNG), ("b.png", PNG))
    with pytest.raises(UserError, match="changed while in use"):
        images.read_array(0)
