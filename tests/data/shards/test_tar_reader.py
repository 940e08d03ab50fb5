"""The tar reader finds what tarfile finds in intact tars, and reports the position of any damage."""

import gzip
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pixmim.data.shards.local import OpenFile
from pixmim.data.shards.tar_reader import iter_members
from pixmim.utils.errors import UserError

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def write(path: Path, names: dict[str, int], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, size in names.items():
            member = tarfile.TarInfo(name)
            member.size = size
            archive.addfile(member, io.BytesIO(bytes(size)))
    return path


def found(path: Path) -> list[tuple[str, int, int]]:
    return [tuple(member)[:3] for member in iter_members(OpenFile(path), str(path)) if not member.is_link]


def by_tarfile(path: Path, **options: object) -> list[tuple[str, int, int]]:
    with tarfile.open(path, "r:", errors="surrogateescape", **options) as archive:
        return [(member.name, member.offset_data, member.size) for member in archive if member.isreg()]


@pytest.mark.parametrize("form", FORMATS)
def test_intact_tars_equal_tarfile(tmp_path: Path, form: int) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=form) as archive:
        for name, size in {
            "a.jpg": 0,
            "a.cls": 1,
            "exact.jpg": 512,
            "more.jpg": 513,
            "folder/" * 25 + "deep.jpg": 700,
            "ünïcode 图片.jpg": 5,
            "a.dotted.folder/b.c.d": 3,
        }.items():
            member = tarfile.TarInfo(name)
            member.size = size
            member.mtime = 1.5 if form == tarfile.PAX_FORMAT else 1
            archive.addfile(member, io.BytesIO(b"x" * size))
        if form != tarfile.USTAR_FORMAT:
            long = tarfile.TarInfo("l" * 300 + ".jpg")
            long.size = 5
            archive.addfile(long, io.BytesIO(b"12345"))
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            special = tarfile.TarInfo("special.jpg")
            special.type, special.linkname = kind, "a.jpg"
            if form != tarfile.USTAR_FORMAT:
                special.linkname = "t" * 200
            archive.addfile(special)
        last = tarfile.TarInfo("last.jpg")
        archive.addfile(last)
    assert found(path) == by_tarfile(path) and len(found(path)) == (8 if form == tarfile.USTAR_FORMAT else 9)


def test_old_tars(tmp_path: Path) -> None:
    """V7: no magic, a zero byte for the type, folders by their last slash."""
    content = bytearray(
        write(tmp_path / "x.tar", {"a.jpg": 10, "b/": 0, "c.jpg": 3}, tarfile.USTAR_FORMAT).read_bytes()
    )
    for block in (0, 1024, 1536):
        content[block + 156] = 0
        content[block + 257 : block + 512] = bytes(255)
        content[block + 148 : block + 156] = b"        "
        content[block + 148 : block + 156] = b"%06o\0 " % sum(content[block : block + 512])
    (tmp_path / "old.tar").write_bytes(content)
    assert found(tmp_path / "old.tar") == by_tarfile(tmp_path / "old.tar") == [("a.jpg", 512, 10), ("c.jpg", 2048, 3)]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_lengths_that_octal_digits_cannot_hold(tmp_path: Path, form: int) -> None:
    large, path = 9 * 2**30 + 5, tmp_path / "x.tar"
    member = tarfile.TarInfo("large.bin")
    member.size = large
    with path.open("wb") as file:
        header = member.tobuf(form)
        file.write(header)
        file.seek(len(header) + -(-large // 512) * 512)  # the file has holes, and takes no space
        file.write(bytes(1024))
    assert found(path) == by_tarfile(path) == [("large.bin", len(header), large)]


def test_joined_tars_are_read_as_one(tmp_path: Path) -> None:
    one = write(tmp_path / "1.tar", {"a.jpg": 10}).read_bytes()
    two = write(tmp_path / "2.tar", {"b.jpg": 20}).read_bytes()
    both = tmp_path / "both.tar"
    both.write_bytes(one + two)
    assert found(both) == by_tarfile(both, ignore_zeros=True)
    assert [name for name, *_ in found(both)] == ["a.jpg", "b.jpg"]


def test_other_files_are_refused_with_the_reason(tmp_path: Path) -> None:
    intact = write(tmp_path / "x.tar", {"a.jpg": 2000}).read_bytes()
    path = tmp_path / "bad.tar"
    for content, reason in {
        gzip.compress(intact): r"compressed \(gzip\)",
        b"<html>404</html>" * 100: "bad.tar is not a tar, but a web page",
        b"": "bad.tar is empty",
        intact[:1000]: r"truncated: a.jpg at byte 0 needs 2,000 bytes, but the file ends at byte 1,000",
        intact[:2560]: "truncated at byte 2,560: the blocks that end a tar are missing",
        intact[:2560] + intact[:300]: "truncated at byte 2,860",
        intact[:2560] + b"x" * 512 + bytes(1024): "damaged at byte 2,560, where a file's header must be",
    }.items():
        path.write_bytes(content)
        with pytest.raises(UserError, match=reason):
            found(path)
    sparse = tarfile.TarInfo("holes.jpg")
    sparse.type = tarfile.GNUTYPE_SPARSE
    path.write_bytes(sparse.tobuf() + bytes(1024))
    with pytest.raises(UserError, match=r"holes\.jpg is stored as a sparse file"):
        found(path)


@pytest.mark.parametrize("form", FORMATS)
def test_damage_is_an_error_or_harmless(tmp_path: Path, form: int) -> None:
    """Checksums detect every changed byte of plain headers; names in extended headers have none."""
    long = "n" * 120 + "/" + "m" * 80 + ".jpg"
    intact = write(tmp_path / "x.tar", {"a.jpg": 600, long: 10, "c.jpg": 0}, form).read_bytes()
    before, path, generator = found(tmp_path / "x.tar"), tmp_path / "bad.tar", np.random.default_rng(form)
    ends = before[-1][1]
    for trial in range(150):
        content = bytearray(intact)
        place = int(generator.integers(ends))
        if trial % 2:
            content[place] ^= int(generator.integers(1, 256))
        else:
            del content[place:]
        path.write_bytes(content)
        try:
            after = found(path)
        except UserError as error:
            assert str(path) in str(error)
        else:
            assert trial % 2
            assert form != tarfile.USTAR_FORMAT or after == before
