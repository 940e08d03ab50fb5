"""Image folders and lists: the files found, their order and classes, and errors."""

import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from pixmim.data import open_dataset
from pixmim.data.dataset import BadImage, ImageSpec
from pixmim.data.image_folder import EXTENSIONS, ImageFolder, PathList, from_folder, from_list_file
from pixmim.utils import console as console_module
from pixmim.utils.errors import UserError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Create a folder of empty files, two levels deep."""
    root = tmp_path / "tree"
    for name in ("b/2.jpg", "b/10.JPG", "b/1/x.png", "b/1.jpg", "b-c/0.jpg", "b/notes.txt", "z.tif", ".hidden/0.jpg"):
        put(root / name)
    put(root / "b" / ".0.jpg")
    return root


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def paths(data: ImageFolder, root: Path) -> list[str]:
    return [os.path.relpath(data.path_of(i), root) for i in range(len(data))]


def slow_walk(root: Path) -> list[str]:
    """Reference: return the images below a folder, each folder once, sorted as str."""
    images, visited = [], set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in visited:
            subfolders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files = [name for name in names if os.path.splitext(name)[1].lower() in EXTENSIONS]
        images += [os.path.relpath(os.path.join(folder, name), root) for name in files if not name.startswith(".")]
    return sorted(images)


def test_order_of_complete_paths(tree: Path) -> None:
    expected = ["b-c/0.jpg", "b/1.jpg", "b/1/x.png", "b/10.JPG", "b/2.jpg", "z.tif"]
    assert paths(from_folder(tree), tree) == expected == slow_walk(tree)


def test_labels_are_the_first_level(tree: Path) -> None:
    (tree / "z.tif").unlink()
    data = from_folder(tree)
    assert data.classes == ["b", "b-c"] and data.labels is not None
    assert [data.classes[label] for label in data.labels] == [path.split("/")[0] for path in slow_walk(tree)]


def test_random_trees(tree: Path) -> None:
    """Sorting by folder and sorting by path differ for names with a common prefix."""
    generator = np.random.default_rng(0)
    words = ["a", "a-", "a.jpg", "a0", "b.png", "ü", "图.jpg", "\U0001f600.gif", "new\nline.jpg", "a b", "x.txt"]
    for _ in range(60):
        path = tree.joinpath(*generator.choice(words, generator.integers(1, 4)))
        if path.is_dir() or any(above.is_file() for above in path.parents):
            continue
        if path.is_file():
            path.unlink()
        else:
            put(path)
        assert paths(from_folder(tree), tree) == slow_walk(tree)


def test_links_are_followed_and_each_folder_is_read_once(tree: Path) -> None:
    os.symlink(tree, tree / "b" / "1" / "loop")
    os.symlink("self", tree / "b" / "self")
    os.symlink(tree / "nowhere.jpg", tree / "b" / "broken.jpg")
    os.symlink(tree / "nowhere", tree / "b" / "broken")
    os.symlink(tree / "b", tree / "a")  # comes first, so it gives the paths
    os.symlink(tree / "b-c", tree / "c")
    outside = tree.parent / "outside"
    put(outside / "0.jpg")
    os.symlink(outside, tree / "b" / "link")
    found = paths(from_folder(tree), tree)
    assert {"a/link/0.jpg", "a/broken.jpg", "b-c/0.jpg"} <= set(found) and not any(p.startswith("c/") for p in found)
    assert sorted({*found, "a/broken.jpg"}) == found and set(found) - {"a/broken.jpg"} == set(slow_walk(tree)) - {
        "a/broken.jpg"
    }


def test_a_folder_named_like_an_image_is_a_folder(tree: Path) -> None:
    (tree / "z.tif").unlink()
    put(tree / "z.tif" / "0.jpg")
    assert paths(from_folder(tree), tree) == slow_walk(tree) and "z.tif/0.jpg" in slow_walk(tree)


def test_names_that_are_not_utf8_sort_by_bytes(tree: Path) -> None:
    names = [b"caf\xe9.jpg", "caf\U0001f600.jpg".encode(), b"cafz.jpg"]
    for name in names:
        (tree / os.fsdecode(name)).touch()
    found = [os.fsencode(path) for path in paths(from_folder(tree), tree)]
    assert found == sorted(found) and set(names) <= set(found)


def test_a_tree_deeper_than_the_recursion_limit(tree: Path, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(partial(sys.setrecursionlimit, sys.getrecursionlimit()))
    sys.setrecursionlimit(350)
    deep = [str(tree) + "/d" * depth for depth in range(1, 401)]
    for folder in deep:
        os.mkdir(folder)
    put(Path(deep[-1], "0.jpg"))
    assert paths(from_folder(tree), tree)[-2] == "d/" * 400 + "0.jpg"
    os.unlink(deep[-1] + "/0.jpg")
    for folder in reversed(deep):  # pytest's own removal is recursive
        os.rmdir(folder)


def test_an_unreadable_folder_is_ignored_and_named(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def closed(path: bytes) -> object:
        if path.endswith(b"tree/b/"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", closed)
        data = from_folder(tree)
    assert (
        len(data) == 2 and "because they cannot be read: 1" in data.description and str(tree / "b") in data.description
    )
    assert len(from_folder(tree)) == 6 and not from_folder(tree).description


def test_an_unreadable_root_is_an_error(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: bytes) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        from_folder(tree)


def test_a_long_walk_shows_progress(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_module, "_COUNTER_INTERVAL", 0.0)
    shown: list[str] = []
    console = Console(force_terminal=True, file=open(os.devnull, "w"))  # noqa: SIM115
    monkeypatch.setattr(console_module, "Console", lambda stderr: console)
    monkeypatch.setattr("rich.status.Status.update", lambda self, text: shown.append(str(text)))
    from_folder(tree)
    assert str(tree) in shown[0] and "1 images" in shown[0]


def test_paths_are_a_sequence() -> None:
    words = ["a/b.jpg", "ü.png", "new\nline", os.fsdecode(b"\xff.jpg"), "", "/abs/x.jpg"]
    found = PathList(map(os.fsencode, words))
    assert list(found) == words and found[-1] == words[-1]
    assert len(found) == 6 and not PathList([])
    for wrong in (6, -7):
        with pytest.raises(IndexError):
            found[wrong]


def test_a_list_of_lines(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes("a.jpg\r\n\n  \nb c.jpg\nd\x85\u2028.jpg".encode() + b"\n\xff.jpg\n/abs.jpg")
    data = from_list_file(f"{tmp_path}/list.txt,root=/")
    names = ["a.jpg", "b c.jpg", "d\x85\u2028.jpg", os.fsdecode(b"\xff.jpg")]
    assert [data.path_of(i) for i in range(5)] == [*(str(tmp_path / name) for name in names), "/abs.jpg"]
    (tmp_path / "list.txt").write_text("\n \n")
    with pytest.raises(UserError, match=r"list.txt"):
        from_list_file(tmp_path / "list.txt")


def test_nested_folders_of_two_classes(pictures: Path) -> None:
    (pictures / "cats" / "more").mkdir()
    Image.new("RGB", (9, 9)).save(pictures / "cats" / "more" / "deep.PNG")
    (pictures / "cats" / "notes.txt").write_text("not an image")
    (pictures / "dogs" / "._0.jpg").write_bytes(b"resource fork")
    data = open_dataset(str(pictures))
    assert len(data) == 11 and data.classes == ["cats", "dogs"]
    assert data.labels is not None and data.labels.tolist() == [0] * 6 + [1] * 5
    assert [data.path_of(i) for i in range(11)] == sorted(data.path_of(i) for i in range(11))
    assert data.image(0).shape == (3, 40, 56)


def test_an_image_outside_of_class_folders_removes_the_classes(pictures: Path) -> None:
    Image.new("RGB", (9, 9)).save(pictures / "loose.png")
    for i in range(7):
        Image.new("RGB", (9, 9)).save(pictures / "cats" / f"a{i}.png")
    data = open_dataset(str(pictures))
    assert data.labels is None and f"{pictures}/loose.png is outside" in data.no_labels_message
    assert "loose.png" not in open_dataset(str(pictures / "cats")).no_labels_message


@pytest.mark.parametrize(
    ("coding", "end"),
    [
        ("utf-8", "\n"),
        ("utf-8", "\r\n"),
        ("utf-8-sig", "\n"),
        ("utf-16-le", "\n"),
        ("utf-16-be", "\r\n"),
        ("utf-8", "\r"),
    ],
)
def test_list_encodings(coding: str, end: str, pictures: Path) -> None:
    Image.new("RGB", (9, 9)).save(pictures / "ö ö.png")
    text = end.join(["cats/0.jpg", "dogs/1.jpg \t", "", "  cats/2.jpg", "ö ö.png ", "   "])
    mark = {"utf-16-le": "\ufeff", "utf-16-be": "\ufeff"}.get(coding, "")
    (pictures / "list.txt").write_bytes((mark + text).encode(coding))
    data = open_dataset(str(pictures / "list.txt"))
    names = [os.path.relpath(data.path_of(i), pictures) for i in range(len(data))]
    assert names == ["cats/0.jpg", "dogs/1.jpg", "cats/2.jpg", "ö ö.png"]
    (pictures / "list.txt").write_bytes(text.encode("utf-16-le"))
    with pytest.raises(UserError, match="Save it as UTF-8"):
        open_dataset(str(pictures / "list.txt"))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer: .*git lfs pull"),
        (b"\x08\0\x05\0CS" + bytes(99), "DICOM: .*pydicom"),
        (b"PK\3\4" + bytes(40), "a zip archive .*unpack"),
        (b"\0\0\0\x18ftypmp42" + bytes(20), "a video: .*ffmpeg"),
        (b"RIFF\0\0\0\0AVI LIST" + bytes(20), "a video: .*ffmpeg"),
        (b"\0\0\0\x18ftypheic" + bytes(20), "HEIC: convert"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL: convert"),
        (b"file,class\na.jpg,3\n", r"a table \(CSV\): .*\.txt"),
        (b"%PDF-1.7\n\xe2", "a PDF: .*pdftoppm"),
        (bytes(344) + b"n+1\0", "a NIfTI volume: .*slices"),
        (b"<!DOCTYPE html><html>404", "a web page: .*download"),
        (bytes(range(200)), ""),
    ],
)
def test_other_files_are_identified(content: bytes, kind: str, tmp_path: Path) -> None:
    (tmp_path / "all" / "sub").mkdir(parents=True)
    file = tmp_path / "all" / "sub" / "file.dat"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"{file} is {kind or 'of an unknown kind'}"):
        open_dataset(str(file))
    with pytest.raises(UserError, match=f"no images in .*1 other files.*{file} is {kind or 'of an unknown kind'}"):
        open_dataset(str(tmp_path / "all"))
    file.rename(file.with_suffix(".jpg"))
    with pytest.raises(BadImage, match=f"not an image in a known format{', but ' * bool(kind)}{kind}"):
        open_dataset(str(tmp_path / "all")).image(0)


def test_strange_names_and_links(pictures: Path) -> None:
    for name in ("ünïcode 图片.png", "new\nline.png", 'comma, quote".png'):
        Image.new("RGB", (9, 9)).save(pictures / "cats" / name)
    os.symlink(pictures, pictures / "dogs" / "loop")
    outside = pictures.parent / "outside"
    outside.mkdir()
    Image.new("RGB", (9, 9)).save(outside / "linked.png")
    os.symlink(outside, pictures / "cats" / "link")
    data = open_dataset(str(pictures))
    assert len(data) == 14
    assert all(data.image(i).shape[0] == 3 for i in range(14))


def test_the_format_is_decided_by_content(pictures: Path) -> None:
    Image.new("RGB", (9, 9), "blue").save(pictures / "cats" / "png.jpg", "PNG")
    data = open_dataset(str(pictures))
    index = next(i for i in range(len(data)) if data.path_of(i).endswith("png.jpg"))
    assert data.image(index)[:, 0, 0].tolist() == [0, 0, 255]


def test_grey_channel(pictures: Path) -> None:
    assert open_dataset(str(pictures), ImageSpec(1)).image(0).shape == (1, 40, 56)


def test_a_path_is_a_spec(pictures: Path) -> None:
    assert len(open_dataset(pictures)) == len(open_dataset(str(pictures))) == 10


def test_a_deleted_file_is_a_bad_image(pictures: Path) -> None:
    data = open_dataset(str(pictures))
    Path(data.path_of(3)).unlink()
    with pytest.raises(BadImage, match="No such file"):
        data.image(3)


def test_errors_of_folders(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'pictures'"):
        open_dataset(str(tmp_path / "picturs"))
    with pytest.raises(UserError, match=r"name tars only: for images, pass .*cats,include=\*\.jpg"):
        open_dataset(f"{pictures}/cats/*.jpg")
    assert len(open_dataset(f"{pictures}/cats,include=*.jpg")) == 5
    for pattern in ("x-{0..3}.zip", "*.csv"):
        with pytest.raises(UserError, match=r"name tars only: join several by \+"):
            open_dataset(f"{tmp_path}/{pattern}")
    with pytest.raises(UserError, match="is a single image"):
        open_dataset(str(pictures / "cats" / "0.jpg"))
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "empty" / "x.npz", np.zeros(3))
    with pytest.raises(UserError, match=r"no images in .* 1 other file"):
        open_dataset(str(tmp_path / "empty"))
