"""WebDataset tars: samples, labels, the cached index, and errors."""

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.cli import say
from helpers.runs import train
from helpers.shards import colors, keys, picture, shard, write
from pixmim.config import PretrainConfig
from pixmim.data import open_dataset
from pixmim.data.build_resized_cache import make_cache
from pixmim.data.dataset import BadImage, ImageSpec
from pixmim.data.resized_cache import open_cache
from pixmim.data.shards import webdataset
from pixmim.data.shards.dataset import ShardDataset
from pixmim.data.statistics import count_formats
from pixmim.utils.errors import UserError

Make = Callable[..., PretrainConfig]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Create a folder of three tars with four labeled images each, of colors 0 to 11."""
    for i in range(3):
        shard(tmp_path / "shards" / f"train-{i:03d}.tar", range(4 * i, 4 * i + 4))
    return tmp_path / "shards"


@pytest.mark.parametrize(
    "spec", ["", "/*.tar", "/train-{000..002}.tar", "/train-00[0-2].tar", "/{train,train}-00?.tar"]
)
def test_patterns(shards: Path, spec: str) -> None:
    data = open_dataset(f"{shards}{spec}")
    assert colors(data) == list(range(12)) and data.shard_sizes is None and data.sizes is None
    assert data.labels is not None and data.labels.tolist() == [v % 3 for v in range(12)]
    assert data.classes == ["0", "1", "2"] and data.description == "read from shards on disk"
    assert data.path_of(5) == f"{shards}/train-001.tar:0005"


def test_one_tar_and_names_of_classes(shards: Path) -> None:
    (shards / "classes.txt").write_text("cat\ndog\nbird\n")
    assert (
        open_dataset(str(shards / "train-001.tar")).classes
        == open_dataset(str(shards)).classes
        == ["cat", "dog", "bird"]
    )
    (shards / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match=r"names 2 classes, but a sample has class number 2"):
        open_dataset(str(shards))


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples(tmp_path: Path, form: int) -> None:
    long = "n" * 150
    path = write(
        tmp_path / "odd.tar",
        [
            ("./", b""),
            ("v1.0/one.png", picture(1)),  # dots of a folder do not start an extension
            ("v1.0/two.png", picture(2)),
            ("other/", b""),
            ("other/one.png", picture(3)),  # the same name in another folder is another sample
            ("v1.0/one.cls", b"7"),  # not adjacent to its image
            ("v1.0/one.png", picture(4)),  # repeated: another sample
            ("both.png", picture(5)),
            ("both.JPG", picture(6)),  # jpg comes first, whatever its case and content
            ("both.mask.jpg", picture(7)),
            ("depth.depth.png", picture(8)),
            ("words.txt", b"not an image"),
            (".hidden.png", picture(9)),
            ("./.hidden/one.png", picture(9)),
            ("v1.0/._two.png", b"of a Mac"),
            ("README", b"no extension"),
            (f"{long}.webp", picture(10, "WEBP")),
            ("./ünï.json", b"{}"),
            ("./ünï.png", picture(11)),
        ],
        form,
    )
    data = open_dataset(str(path))
    assert colors(data)[:6] == [1, 2, 3, 4, 6, 8] and colors(data)[7:] == [11]
    assert keys(data) == ["v1.0/one", "v1.0/two", "other/one", "v1.0/one", "both", "depth", long, "./ünï"]
    assert data.labels is None and data.classes == []
    assert data.left_out == "2 images are ignored; 1 samples without an image are ignored"
    assert data.left_out in data.description and "7 of 8 samples have no class" in data.description
    assert ".cls" in data.no_labels_message and "7 of 8 samples have no class" in data.no_labels_message
    assert data.no_labels_message in open_dataset(f"shapes:count=4+{path}").no_labels_message


def test_contents_of_cls_that_are_not_classes(tmp_path: Path) -> None:
    for text in (b"", b"-1", b"123456789012", b"a long caption, " * 9):
        write(tmp_path / "x.tar", [("a.png", picture(1)), ("a.cls", text)])
        assert open_dataset(str(tmp_path / "x.tar")).labels is None


@pytest.mark.parametrize("again", [False, True])
def test_ignored_images_are_reported(again: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [
        (f"scan.2024.{v:03d}.{end}", picture(v) if end == "png" else b"x") for v in range(9) for end in ("png", "txt")
    ]
    path = write(tmp_path / "dots.tar", files)
    with tarfile.open(path, "a") as archive:
        for name, kind in (("hard.png", tarfile.LNKTYPE), ("soft.png", tarfile.SYMTYPE), ("soft.txt", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, files[0][0]
            archive.addfile(link)
    for _ in range(1 + again):  # scanned, then from the cached index
        webdataset._warned.clear()
        assert "10 images are ignored" in open_dataset(str(path)).description
        text = capsys.readouterr().err
        assert "8 of 9 images are ignored" in text and f"'{path},key=last-dot'" in text and "2 images are links" in text
    data = open_dataset(f"{path},key=last-dot")
    assert colors(data) == list(range(9)) and keys(data)[8] == "scan.2024.008"
    assert len(open_dataset(f"{path},key=last-dot*2+{path}")) == 2 * 9 + 1
    assert colors(open_dataset(f"{tmp_path}/*.tar,key=last-dot")) == list(range(9))
    with pytest.raises(UserError, match="use key=last-dot"):
        open_dataset(f"{path},key=first")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="has no option key="):
        open_dataset(f"{tmp_path / 'folder'},key=last-dot")


def test_classes_in_words(tmp_path: Path) -> None:
    for _ in range(2):  # scanned, then from the cached index
        for name, words in (("a", ["dog", "cat"]), ("b", ["7", "owl"]), ("c", ["3", "3"])):
            files = [(f"{i}.{end}", picture(i) if end == "png" else word.encode()) for i, word in enumerate(words)
                     for end in ("png", "cls")]  # fmt: skip
            write(tmp_path / f"{name}.tar", files)
        data = open_dataset(f"{tmp_path}/*.tar")
        assert data.classes == ["3", "7", "cat", "dog", "owl"] and data.labels is not None
        assert data.labels.tolist() == [3, 2, 1, 4, 0, 0]


def test_a_long_list_and_a_cache_folder_named_like_a_tar(shards: Path, tmp_path: Path) -> None:
    names = ",".join(f"train-{i:03d}" for i in [0, 1, 2] * 30)
    assert len(open_dataset(f"{shards}/{{{names}}}.tar")) == 12
    make_cache(open_dataset(str(shards)), tmp_path / "cached.tar", (16, 16))
    assert len(open_dataset(str(tmp_path / "cached.tar"))) == 12


def test_errors(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train-003.tar does not exist \(7 of 10"):
        open_dataset(f"{shards}/train-{{000..009}}.tar")
    with pytest.raises(UserError, match=r"nothing matches .*test-\*.tar"):
        open_dataset(f"{shards}/test-*.tar")
    write(tmp_path / "sound.tar", [("a.flac", b"x"), ("a.txt", b"y"), ("b.flac", b"z")])
    with pytest.raises(UserError, match=r"no images in .*sound.tar \(found .flac .txt\)"):
        open_dataset(str(tmp_path / "sound.tar"))
    (shards / "notes.md").write_text("not only tars")
    with pytest.raises(UserError, match=r"no images in .* 4 other files"):
        open_dataset(str(shards))
    (tmp_path / "zipped").mkdir()
    (tmp_path / "zipped" / "x.tar.gz").write_bytes(b"\x1f\x8b" + bytes(1000))
    with pytest.raises(UserError, match=r"compressed \(gzip\)"):
        open_dataset(str(tmp_path / "zipped"))


def test_a_truncated_tar_is_an_error(shards: Path) -> None:
    path = shards / "train-001.tar"
    content = path.read_bytes()
    for end in (len(content) // 2, 1024):  # in a file, and between two
        path.write_bytes(content[:end])
        with pytest.raises(UserError, match=rf"train-001.tar is truncated.*{end:,}"):
            open_dataset(str(shards))
    assert len(open_dataset(f"{shards}/train-{{000,002}}.tar")) == 8


def test_a_tar_is_scanned_once(shards: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_dataset(str(shards))
    scanned: list[str] = []
    scan = webdataset.scan
    monkeypatch.setattr(webdataset, "scan", lambda tar, name, *more: scanned.append(Path(name).name) or scan(tar, name))
    again = open_dataset(str(shards))
    assert not scanned and colors(again) == colors(before) and keys(again) == keys(before)
    assert again.fingerprint() == before.fingerprint() and np.array_equal(again.labels, before.labels)
    shard(shards / "train-001.tar", range(20, 25))
    assert colors(open_dataset(str(shards)))[4:9] == list(range(20, 25)) and scanned == ["train-001.tar"]
    generator = np.random.default_rng(0)
    for path in (memory / "tars").iterdir():  # a damaged cached index is ignored
        content = bytearray(path.read_bytes())
        content[generator.integers(len(content))] ^= 1
        path.write_bytes(content if path.name < "8" else content[: len(content) // 2])
    assert len(open_dataset(str(shards))) == 13 and len(scanned) == 4
    os.chmod(memory / "tars", 0o500)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    assert len(open_dataset(str(shards))) == 13


def test_a_tar_changed_or_deleted_while_in_use(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pixmim.data.shards.local.RECHECK_SECONDS", 0)
    open_dataset(str(shards))
    data = open_dataset(str(shards))  # from the cached index, so that no tar is open
    assert int(data.image(4)[0, 0, 0]) == 4
    shard(shards / "train-001.tar", range(20, 25))
    (shards / "train-002.tar").unlink()
    assert int(data.image(0)[0, 0, 0]) == 0
    with pytest.raises(UserError, match=r"train-001.tar changed"):
        data.image(4)
    with pytest.raises(UserError, match=r"train-002.tar cannot be opened: No such file"):
        data.image(8)


def test_damage_never_gives_a_wrong_image(tmp_path: Path) -> None:
    """Images whose bytes are intact stay the same, or there is an error."""
    intact = shard(tmp_path / "x.tar", range(6)).read_bytes()
    data = open_dataset(str(tmp_path / "x.tar"))
    assert isinstance(data, ShardDataset)
    spans = [(int(e["offset"]), int(e["offset"] + e["length"])) for e in data._entries]
    path, generator, read = tmp_path / "bad.tar", np.random.default_rng(0), 0
    for trial in range(50):
        content = bytearray(intact)
        place = int(generator.integers(spans[-1][1]))
        if trial % 3:
            content[place] ^= int(generator.integers(1, 256))
        else:
            del content[place:]
        path.write_bytes(content)
        try:
            damaged = open_dataset(str(path))
        except UserError:
            continue
        assert trial % 3 and len(damaged) == 6
        for i, (start, end) in enumerate(spans):
            try:
                image = damaged.image(i)
            except BadImage:
                assert start <= place < end
                continue
            read += 1
            assert start <= place < end or (image.shape[2] == 20 + i and image[0].unique().tolist() == [i])
    assert read > 80


def test_dtypes_of_the_files(tmp_path: Path) -> None:
    deep = io.BytesIO()
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)).save(deep, "PNG")
    array = io.BytesIO()
    np.save(array, np.arange(20 * 30, dtype=np.float32).reshape(20, 30, 1))
    write(tmp_path / "x.tar", [("a.png", deep.getvalue()), ("b.png", deep.getvalue()), ("c.npy", array.getvalue())])
    data = open_dataset(str(tmp_path / "x.tar"))
    assert count_formats(data, [0, 1, 2]) == {(1, "uint16"): 2, (1, "float32"): 1}
    form = ImageSpec(1, "uint16")
    assert open_dataset(str(tmp_path / "x.tar"), form).image(1).flatten().tolist() == list(range(600))
    make_cache(open_dataset(str(tmp_path / "x.tar"), form), tmp_path / "cached", (20, 20), kind="raw")
    cached = open_cache(tmp_path / "cached", form)
    pixels = np.load(io.BytesIO(cached.read(0)))  # raw pixels are returned as an .npy file
    assert np.array_equal(pixels.transpose(2, 0, 1), cached.image(0).numpy()) and pixels.dtype == np.uint16


def test_training_from_a_pattern(
    shards: Path, tmp_path: Path, tiny_run: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tiny_run(data=f"{shards}/*.tar", steps=3), tmp_path / "run")
    assert (tmp_path / "run" / "encoder/model.safetensors").exists()
    status, text = say(capsys, "cache", f"{shards}/*.tar", tmp_path / "cached", "--size", 16)
    assert status == 0 and "12 images written" in text
    assert open_dataset(str(tmp_path / "cached")).classes == ["0", "1", "2"]
