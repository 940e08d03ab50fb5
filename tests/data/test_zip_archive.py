"""A zip archive gives the images, labels and errors of the folder it was made from."""

import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixmim.data import open_dataset
from pixmim.data.dataset import BadImage
from pixmim.data.uri import absolute
from pixmim.utils.errors import UserError


def make_folder(root: Path, count: int = 12) -> Path:
    rng = np.random.default_rng(0)
    for i in range(count):
        file = root / ("cat", "dog", "Emu")[i % 3] / f"{i}.{('png', 'jpg')[i % 2]}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20 + i, 30, 3), np.uint8)).save(file)
    (root / ".hidden").mkdir()
    (root / ".hidden" / "x.png").write_bytes(b"")
    (root / "notes.md").write_text("not an image")
    return root


def pack(folder: Path, archive: Path, method: int = zipfile.ZIP_DEFLATED, prefix: str = "") -> str:
    with zipfile.ZipFile(archive, "w", method) as out:
        for path in sorted(folder.rglob("*"), reverse=True):
            out.write(path, prefix + str(path.relative_to(folder)))
    return str(archive)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("prefix", ["", "photos/", "a/b/"])
def test_an_archive_is_read_like_its_folder(tmp_path: Path, method: int, prefix: str) -> None:
    folder = make_folder(tmp_path / "photos")
    expected, found = open_dataset(str(folder)), open_dataset(pack(folder, tmp_path / "x.zip", method, prefix))
    assert found.classes == expected.classes == ["Emu", "cat", "dog"]
    assert expected.labels is not None and np.array_equal(found.labels, expected.labels)  # type: ignore[arg-type]
    assert len(found) == len(expected) == 12
    for i in range(len(found)):
        assert np.array_equal(found.read_array(i), expected.read_array(i))
        relative = Path(expected.path_of(i)).relative_to(folder)
        assert found.path_of(i) == f"{tmp_path}/x.zip/{prefix}{relative}"


def test_an_archive_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(make_folder(tmp_path / "photos"), tmp_path / "x.zip")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(open_dataset("~/x.zip,include=*.jpg")) == 6


def test_many_threads_read_one_archive(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "photos")
    expected, found = open_dataset(str(folder)), open_dataset(pack(folder, tmp_path / "x.zip"))
    order = np.random.default_rng(1).integers(0, len(found), 400).tolist()
    with ThreadPoolExecutor(8) as pool:
        for i, pixels in zip(order, pool.map(found.read_array, order), strict=True):
            assert np.array_equal(pixels, expected.read_array(i))


def test_patterns_choose_images_and_are_counted(tmp_path: Path) -> None:
    archive = pack(make_folder(tmp_path / "photos"), tmp_path / "x.zip", prefix="top/")
    found = open_dataset(f"{archive},include=*.jpg,exclude=dog/*")
    assert found.left_out == "8 images left out by include=*.jpg,exclude=dog/*"
    assert [Path(found.path_of(i)).name for i in range(len(found))] == ["11.jpg", "5.jpg", "3.jpg", "9.jpg"]
    with pytest.raises(UserError, match="no images left"):
        open_dataset(f"{archive},include=*.tif")
    assert absolute(f"{archive},include=*.jpg") == f"{archive},include=*.jpg"


def test_images_in_formats_that_are_not_read_are_counted(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "photos")
    for name in ("cat/a.HEIC", "b.heic", "scan.nii.gz", ".hidden/c.heic", "dog/._a.heic", "cat/notes.txt"):
        (folder / name).write_bytes(b"")
    for source in (str(folder), pack(folder, tmp_path / "x.zip", prefix="top/")):
        data = open_dataset(source)
        note = "3 images left out in formats that are not read: 2 .heic, 1 .nii.gz"
        assert data.left_out == data.description == note
        chosen = open_dataset(f"{source},include=*.png,include=*.gz").left_out
        assert chosen.endswith("; 1 images left out in formats that are not read: 1 .nii.gz")


def test_a_mixture_of_an_archive_and_a_folder(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "photos")
    mixed = open_dataset(f"{pack(folder, tmp_path / 'x.zip')}*2+{folder}")
    assert len(mixed) == 36 and mixed.classes == ["Emu", "cat", "dog"]


def test_windows_paths_and_macos_extras(tmp_path: Path) -> None:
    folder, archive = make_folder(tmp_path / "photos", 3), tmp_path / "x.zip"
    with zipfile.ZipFile(archive, "w") as out:
        for path in folder.rglob("*.*g"):
            if ".hidden" not in str(path):
                info = zipfile.ZipInfo("x")
                info.filename = f"top\\{path.parent.name}\\{path.name}"
                out.writestr(info, path.read_bytes())
                out.writestr(f"__MACOSX/top/{path.parent.name}/._{path.name}", b"resource fork")
    assert open_dataset(str(archive)).classes == ["Emu", "cat", "dog"]


@pytest.mark.parametrize("encoding", ["utf-8", "cp437"])
def test_names_without_the_flag_of_their_encoding(encoding: str, tmp_path: Path) -> None:
    """Write names in UTF-8 as programs on a Mac do, and in code page 437 as old ones on Windows do."""

    class Unflagged(zipfile.ZipInfo):
        def _encodeFilenameFlags(self) -> tuple[bytes, int]:  # noqa: N802 (of the standard library)
            return self.filename.encode(encoding), 0

    image = next(make_folder(tmp_path / "photos", 1).rglob("0.png")).read_bytes()
    names = ["Bär/é.png", "Käse/ü.png"]
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as out:
        for name in names:
            out.writestr(Unflagged(name), image)
    data = open_dataset(str(tmp_path / "x.zip"))
    assert data.classes == ["Bär", "Käse"] and data.read_array(0).shape == (20, 30, 3)
    assert [data.path_of(i) for i in range(2)] == [f"{tmp_path}/x.zip/{name}" for name in names]


def test_the_archive_in_a_folder_is_named(tmp_path: Path) -> None:
    pack(make_folder(tmp_path / "photos"), tmp_path / "x.zip")
    only = tmp_path / "only"
    only.mkdir()
    (tmp_path / "x.zip").rename(only / "x.zip")
    with pytest.raises(UserError, match=r"zip archive.*--data FILE\.zip"):
        open_dataset(str(only))


def test_other_compressions_cost_a_line(tmp_path: Path) -> None:
    archive = pack(make_folder(tmp_path / "photos"), tmp_path / "x.zip", zipfile.ZIP_BZIP2)
    with pytest.raises(BadImage, match="method 12"):
        open_dataset(archive).read_array(0)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_wrong_checksum_costs_a_line(tmp_path: Path, method: int) -> None:
    archive = pack(make_folder(tmp_path / "photos"), tmp_path / "x.zip", method)
    data = open_dataset(archive)
    (_, first, size), *_ = data.extents(0)  # type: ignore[attr-defined]
    content = bytearray(Path(archive).read_bytes())
    content[first + size // 2] ^= 1
    Path(archive).write_bytes(content)
    with pytest.raises(BadImage, match="damaged"):
        open_dataset(archive).read_array(0)
