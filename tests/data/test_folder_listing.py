"""Listings: the pictures that a plain walk finds, in order, and the same ones from what was kept, whatever changed."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pixmim.data.folders import filesystem, listing
from pixmim.data.folders.listing import list_pictures
from pixmim.data.folders.paths import Paths
from pixmim.data.image_folder import EXTENSIONS, below, listed
from pixmim.utils import progress as patience
from pixmim.utils.errors import UserError
from pixmim.utils.files import cache_path

LONG_AGO = 10**18  # a time in nanoseconds since 1970, years back


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders, two deep, of empty files; every listing of them is kept, as soon as a folder is `still`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "WORTH_KEEPING", 1)
    monkeypatch.setattr(listing, "folder_times_are_true", lambda folder: True)
    root = tmp_path / "tree"
    for name in ("b/2.jpg", "b/10.JPG", "b/1/x.png", "b/1.jpg", "b-c/0.jpg", "b/notes.txt", "z.tif", ".hidden/0.jpg"):
        put(root / name)
    put(root / "b" / ".0.jpg")
    still(monkeypatch)
    return root


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def still(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.0) -> None:
    """Trust a folder that has not changed for so long; 0: even one that just did, where time stamps are fine enough."""
    monkeypatch.setattr(listing, "SETTLED", seconds)
    time.sleep(0.02)  # more than a tick of the file system's clock


def plain(root: Path) -> list[str]:
    """A slow reference: every picture below a folder, each folder once, sorted as str."""
    found, seen = [], set()
    for folder, inside, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            inside.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        pictures = [name for name in names if os.path.splitext(name)[1].lower() in EXTENSIONS]
        found += [os.path.relpath(os.path.join(folder, name), root) for name in pictures if not name.startswith(".")]
    return sorted(found)


def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the folders that are listed anew from now on."""
    seen: list[str] = []
    look = listing._look

    def spy(path: bytes, *rest: object) -> listing.Folder:
        seen.append(os.path.basename(os.fsdecode(path).rstrip("/")))
        return look(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(listing, "_look", spy)
    return seen


def test_the_order_is_that_of_whole_paths(tree: Path) -> None:
    found = list_pictures(tree, EXTENSIONS)
    assert list(found.paths) == ["b-c/0.jpg", "b/1.jpg", "b/1/x.png", "b/10.JPG", "b/2.jpg", "z.tif"] == plain(tree)
    assert found.others == 1 and not found.closed
    assert list(found.paths.runs()) == [("b-c/", 1), ("b/", 1), ("b/1/", 1), ("b/", 2), ("", 1)]


def test_next_time_no_folder_is_listed(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = list_pictures(tree, EXTENSIONS)
    seen = looks(monkeypatch)
    again = list_pictures(tree, EXTENSIONS)
    assert not seen and list(again.paths) == list(first.paths) and again.others == first.others


def change_nothing(root: Path) -> None:
    os.utime(root / "b" / "1.jpg")


def add(root: Path) -> None:
    put(root / "b" / "1" / "new.jpg")


def add_and_put_the_time_back(root: Path) -> None:
    before = os.stat(root / "b" / "1")
    put(root / "b" / "1" / "new.jpg")
    os.utime(root / "b" / "1", ns=(before.st_atime_ns, before.st_mtime_ns))


def remove(root: Path) -> None:
    (root / "b" / "2.jpg").unlink()


def remove_a_folder(root: Path) -> None:
    (root / "b-c" / "0.jpg").unlink()
    (root / "b-c").rmdir()


def rename_a_folder(root: Path) -> None:
    (root / "b").rename(root / "a")


def exchange_two_folders(root: Path) -> None:
    (root / "b").rename(root / "x")
    (root / "b-c").rename(root / "b")
    (root / "x").rename(root / "b-c")


def replace_a_folder_by_an_older_one(root: Path) -> None:
    put(root.parent / "older" / "old.jpg")
    os.utime(root.parent / "older", ns=(LONG_AGO, LONG_AGO))
    (root / "b-c" / "0.jpg").unlink()
    (root / "b-c").rmdir()
    (root.parent / "older").rename(root / "b-c")


def a_file_becomes_a_folder(root: Path) -> None:
    (root / "z.tif").unlink()
    put(root / "z.tif" / "0.jpg")


def link_back_up(root: Path) -> None:
    os.symlink(root, root / "b" / "1" / "loop")
    os.symlink("self", root / "b" / "self")


def link_to_a_sibling_before_it(root: Path) -> None:
    os.symlink(root / "b", root / "a")


@pytest.mark.parametrize(
    "change",
    [
        change_nothing,
        add,
        add_and_put_the_time_back,
        remove,
        remove_a_folder,
        rename_a_folder,
        exchange_two_folders,
        replace_a_folder_by_an_older_one,
        a_file_becomes_a_folder,
        link_back_up,
        link_to_a_sibling_before_it,
    ],
)
def test_what_was_kept_gives_what_a_walk_gives(tree: Path, change: Callable[[Path], None]) -> None:
    list_pictures(tree, EXTENSIONS)
    change(tree)
    for _ in range(2):
        assert list(list_pictures(tree, EXTENSIONS).paths) == plain(tree)


def test_only_what_changed_is_listed(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list_pictures(tree, EXTENSIONS)
    add(tree)
    seen = looks(monkeypatch)
    list_pictures(tree, EXTENSIONS)
    assert seen == ["1"]


def test_a_link_is_followed_anew_each_time(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it leads to can come, go and change without a trace in the folder that holds it."""
    outside = tree.parent / "outside"
    os.symlink(outside, tree / "b" / "link")
    os.symlink(tree.parent / "nowhere.jpg", tree / "b" / "broken.jpg")
    still(monkeypatch)
    assert list(list_pictures(tree, EXTENSIONS).paths) == plain(tree)
    put(outside / "0.jpg")
    found = list_pictures(tree, EXTENSIONS)
    assert list(found.paths) == plain(tree) and "b/link/0.jpg" in found.paths and "b/broken.jpg" in found.paths
    (outside / "0.jpg").unlink()
    outside.rmdir()
    found = list_pictures(tree, EXTENSIONS)
    assert list(found.paths) == plain(tree) and found.others == 2


def test_a_folder_that_just_changed_is_listed_again(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file may yet come with the very same time stamp, where a file system counts in seconds."""
    monkeypatch.setattr(listing, "SETTLED", 60.0)
    list_pictures(tree, EXTENSIONS)
    monkeypatch.setattr(listing, "SETTLED", 0.0)
    seen = looks(monkeypatch)
    list_pictures(tree, EXTENSIONS)
    assert seen == ["tree", "b", "1", "b-c"]


def test_a_folder_from_the_future_is_never_trusted(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = time.time_ns() + 10**12
    os.utime(tree / "b", ns=(ahead, ahead))
    list_pictures(tree, EXTENSIONS)
    seen = looks(monkeypatch)
    list_pictures(tree, EXTENSIONS)
    assert seen == ["b"]


def test_a_folder_that_changes_while_it_is_listed_is_not_kept(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def slow(path: bytes) -> object:
        entries = scandir(path)
        if path.endswith(b"b/1/"):
            put(tree / "b" / "1" / "late.jpg")
        return entries

    monkeypatch.setattr(os, "scandir", slow)
    list_pictures(tree, EXTENSIONS)
    monkeypatch.setattr(os, "scandir", scandir)
    assert list(list_pictures(tree, EXTENSIONS).paths) == plain(tree)


def test_times_are_believed_of_some_file_systems_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "with blank" / "deep" / "0.jpg")
    mounts = tmp_path / "mountinfo"
    monkeypatch.setattr(filesystem, "_MOUNTS", mounts)
    believed = {}
    for kind in ("ext4", "xfs", "nfs4", "vfat", "exfat", "fuse.s3fs", "squashfs", "cifs"):
        place = str(tmp_path / "with blank").replace(" ", r"\040")
        mounts.write_text(
            f"22 1 0:20 / / rw shared:1 - ext4 /dev/vda rw\n23 22 0:21 / {place} rw - {kind} somewhere rw\n"
        )
        assert filesystem.folder_times_are_true(os.fsencode(tmp_path))
        believed[kind] = filesystem.folder_times_are_true(os.fsencode(tmp_path / "with blank" / "deep"))
    assert [kind for kind, yes in believed.items() if yes] == ["ext4", "xfs", "nfs4"]
    mounts.unlink()
    assert not filesystem.folder_times_are_true(os.fsencode(tmp_path))


def test_what_lies_elsewhere_is_listed_each_time(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "folder_times_are_true", lambda folder: False)
    list_pictures(tree, EXTENSIONS)
    assert not kept(tree).exists()


def kept(tree: Path) -> Path:
    return cache_path("listings", str(tree))


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "version", "folder"])
def test_a_damaged_listing_is_as_good_as_none(tree: Path, damage: str) -> None:
    list_pictures(tree, EXTENSIONS)
    file = kept(tree)
    data = file.read_bytes()
    if damage == "cut":
        file.write_bytes(data[:-3])
    elif damage == "flip":
        file.write_bytes(data[:-3] + b"?" + data[-2:])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "version":
        file.write_bytes(data.replace(b"listing 2", b"listing 1"))
    else:
        file.unlink()
        file.mkdir()
    assert list(list_pictures(tree, EXTENSIONS).paths) == plain(tree)
    if damage != "folder":
        assert file.read_bytes() == data  # and is mended


def test_a_listing_serves_its_own_extensions_only(tree: Path) -> None:
    list_pictures(tree, EXTENSIONS)
    assert list(list_pictures(tree, frozenset((".txt",))).paths) == ["b/notes.txt"]


def test_without_a_cache_directory_it_works_all_the_same(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree.parent / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tree.parent / "file"))
    assert list(list_pictures(tree, EXTENSIONS).paths) == plain(tree)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tree.parent / "full"))

    def full(*names: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert list(list_pictures(tree, EXTENSIONS).paths) == plain(tree)
    assert not list(kept(tree).parent.iterdir())


def test_small_folders_leave_nothing_behind(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "WORTH_KEEPING", 7)
    list_pictures(tree, EXTENSIONS)
    assert not kept(tree).parent.exists()


def test_two_at_once_leave_a_whole_listing(tree: Path) -> None:
    threads = [threading.Thread(target=list_pictures, args=(tree, EXTENSIONS)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in kept(tree).parent.iterdir()] == [kept(tree).name]
    assert listing._read(kept(tree), kept(tree).read_bytes().split(b"\n", 1)[0] + b"\n")


def test_random_trees_and_changes(tree: Path) -> None:
    """Names that begin alike are where an order by folders and one by paths differ."""
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
        assert list(list_pictures(tree, EXTENSIONS).paths) == plain(tree)


def test_names_that_are_no_utf8_sort_by_their_bytes(tree: Path) -> None:
    names = [b"caf\xe9.jpg", "caf\U0001f600.jpg".encode(), b"cafz.jpg"]
    for name in names:
        (tree / os.fsdecode(name)).touch()
    paths = [os.fsencode(path) for path in list_pictures(tree, EXTENSIONS).paths]
    assert paths == sorted(paths) and set(names) <= set(paths)


def test_a_tree_deeper_than_recursion_goes(tree: Path) -> None:
    deep = [str(tree) + "/d" * depth for depth in range(1, 1051)]
    for folder in deep:
        os.mkdir(folder)
    put(Path(deep[-1], "0.jpg"))
    assert list(list_pictures(tree, EXTENSIONS).paths)[-2] == "d/" * 1050 + "0.jpg"
    os.unlink(deep[-1] + "/0.jpg")
    for folder in reversed(deep):  # pytest's own removal is recursive
        os.rmdir(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_closed_folder_is_named(tree: Path) -> None:
    (tree / "b").chmod(0)
    try:
        data = below(tree)
        assert len(data) == 2 and "cannot be read, left out: 1" in data.about and str(tree / "b") in data.about
    finally:
        (tree / "b").chmod(0o755)
    assert len(below(tree)) == 6


def test_a_closed_folder_is_left_out_and_looked_at_next_time(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def closed(path: bytes) -> object:
        if path.endswith(b"tree/b/"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    data = below(tree)
    assert len(data) == 2 and "cannot be read, left out: 1" in data.about and str(tree / "b") in data.about
    monkeypatch.setattr(os, "scandir", scandir)
    data = below(tree)
    assert len(data) == 6 and not data.about


def test_a_root_that_is_closed_is_an_error(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: bytes) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        below(tree)


def test_labels_are_the_first_level(tree: Path) -> None:
    (tree / "z.tif").unlink()
    data = below(tree)
    assert data.classes == ["b", "b-c"] and data.labels is not None
    assert [data.classes[label] for label in data.labels] == [plain_path.split("/")[0] for plain_path in plain(tree)]


def test_paths_are_a_sequence() -> None:
    words = ["a/b.jpg", "ü.png", "new\nline", os.fsdecode(b"\xff.jpg"), "", "/abs/x.jpg"]
    paths = Paths.of(words)
    assert list(paths) == words == paths[:] and paths[-1] == words[-1] and paths[1:3] == words[1:3]
    assert len(paths) == 6 and not Paths([]) and list(Paths([(b"a/", b""), (b"b/", b"c\0d\0")])) == ["b/c", "b/d"]
    for wrong in (6, -7):
        with pytest.raises(IndexError):
            paths[wrong]


def test_a_list_of_lines(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes("a.jpg\r\n\n  \nb c.jpg\nd\x85\u2028.jpg".encode() + b"\n\xff.jpg\n/abs.jpg")
    data = listed(f"{tmp_path}/list.txt,root=/")
    names = ["a.jpg", "b c.jpg", "d\x85\u2028.jpg", os.fsdecode(b"\xff.jpg")]
    assert [data.locate(i) for i in range(5)] == [*(str(tmp_path / name) for name in names), "/abs.jpg"]
    (tmp_path / "list.txt").write_text("\n \n")
    with pytest.raises(UserError, match="names no pictures"):
        listed(tmp_path / "list.txt")


def test_a_long_listing_says_where_it_stands(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "_MOMENT", 0.0)
    said: list[str] = []
    console = Console(force_terminal=True, file=open(os.devnull, "w"))  # noqa: SIM115
    monkeypatch.setattr(patience, "Console", lambda stderr: console)
    monkeypatch.setattr("rich.status.Status.update", lambda self, text: said.append(str(text)))
    list_pictures(tree, EXTENSIONS)
    assert said and said[0].startswith(f"listing {tree}: ") and said[0].endswith("pictures")
