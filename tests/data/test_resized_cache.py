"""Test resized caches: plain tars with an index, complete or unused, with the pixels of the original images."""

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.cli import say
from helpers.runs import train
from pixmim.config import PretrainConfig
from pixmim.data import open_dataset
from pixmim.data.build_resized_cache import make_cache, shard_assignment
from pixmim.data.dataset import BadImage, ImageSpec
from pixmim.data.resized_cache import open_cache, shard_name
from pixmim.transforms.crops import resize_to_cover
from pixmim.utils.errors import UserError

Make = Callable[..., PretrainConfig]
SIZE = (24, 24)


def test_tarfile_and_the_index_read_the_same_images(pictures: Path, tmp_path: Path) -> None:
    (pictures / "cats" / "2.jpg").write_bytes(b"broken")
    source = open_dataset(str(pictures))
    made = make_cache(source, tmp_path / "cache", SIZE, per_shard=4)
    assert (made.images, made.skipped, made.complete) == (9, 1, True)
    assert "2.jpg" in (tmp_path / "cache" / "skipped.csv").read_text()
    data = open_cache(tmp_path / "cache")
    found: dict[str, bytes] = {}
    for shard in range(3):
        with tarfile.open(tmp_path / "cache" / shard_name(shard, "tar")) as archive:
            for member in archive:
                content = archive.extractfile(member)
                assert content is not None
                found[member.name] = content.read()
    assert len(data) == 9 and len(found) == 27 and data.classes == ["cats", "dogs"]
    assert data.labels is not None and data.labels.tolist() == [0] * 4 + [1] * 5
    for i in range(9):
        key = data.path_of(i).rsplit(":", 1)[1]
        pixels = np.asarray(Image.open(io.BytesIO(found[f"{key}.jpg"])))
        assert np.array_equal(data.image(i).permute(1, 2, 0).numpy(), pixels)
        assert int(found[f"{key}.cls"]) == data.labels[i]
        metadata = json.loads(found[f"{key}.json"])
        original = source.image(int(key))
        assert metadata == {"path": source.path_of(int(key)), "height": original.shape[1], "width": original.shape[2]}
        assert min(data.image(i).shape[1:]) == 24
        resized = resize_to_cover(original, SIZE).float()
        assert (data.image(i).float() - resized).abs().mean() < 12  # JPEG compresses noise badly


def test_a_cache_keeps_the_groups_of_a_table(pictures: Path, tmp_path: Path) -> None:
    """Compare the groups of a cache with those of its source, without a broken image, and in another order of names."""
    paths = sorted(path.relative_to(tmp_path).as_posix() for path in pictures.rglob("*.jpg"))
    groups = ["p2", "p2", "", "p10", 'ü, "x"', "p2", "p10", "", "p1", "p1"]
    with open(tmp_path / "table.csv", "w", newline="", encoding="utf-8") as file:
        rows = [(path, path.split("/")[-2], group) for path, group in zip(paths, groups, strict=True)]
        csv.writer(file).writerows([("path", "label", "patient"), *rows])
    (tmp_path / paths[3]).write_bytes(b"broken")
    make_cache(open_dataset(tmp_path / "table.csv"), tmp_path / "cache", SIZE, per_shard=4)
    data = open_cache(tmp_path / "cache")
    assert data.groups is not None
    assert [data.group_names[group] for group in data.groups] == groups[:3] + groups[4:]
    assert data.groups[2] != data.groups[6]  # images without a group
    test = open_dataset(f"split:test,share=0.5:{tmp_path}/cache")
    train = open_dataset(f"split:train,share=0.5:{tmp_path}/cache")
    assert test.groups is not None and train.groups is not None and not set(test.groups) & set(train.groups)
    with pytest.raises(UserError, match="cache with another groups"):
        make_cache(open_dataset(f"{tmp_path}/table.csv,group=path"), tmp_path / "cache", SIZE, per_shard=4)
    for content in (None, "[]", json.dumps(groups[::-1]), "{", "3"):
        (tmp_path / "cache" / "groups.json").unlink()
        if content is not None:
            (tmp_path / "cache" / "groups.json").write_text(content)
        with pytest.raises(UserError, match=r"groups\.json"):
            open_cache(tmp_path / "cache")
        (tmp_path / "cache" / "groups.json").touch()


def test_a_raw_cache_trains_bitwise_like_the_folder(pictures: Path, tmp_path: Path, tiny_run: Make) -> None:
    make_cache(open_dataset(str(pictures)), tmp_path / "cache", (32, 32), kind="raw")
    runs = [tiny_run(data=str(path), steps=3, cache_images="none") for path in (pictures, tmp_path / "cache")]
    for name, run in zip("ab", runs, strict=True):
        train(run, tmp_path / name)
    a, b = ((tmp_path / name / "encoder/model.safetensors").read_bytes() for name in "ab")
    assert a[-100_000:] == b[-100_000:]
    train(tiny_run(data=str(tmp_path / "cache"), steps=3, cache_images="ram"), tmp_path / "c")
    assert (tmp_path / "c" / "encoder/model.safetensors").read_bytes()[-100_000:] == a[-100_000:]


def test_an_interrupted_cache_resumes(pictures: Path, tmp_path: Path) -> None:
    source, folder = open_dataset(str(pictures)), tmp_path / "cache"

    def stop(done: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_cache(source, folder, SIZE, per_shard=3, progress=stop)
    assert (folder / shard_name(1, "index")).exists() and not (folder / shard_name(2, "index")).exists()
    with pytest.raises(UserError, match="not finished: run the same"):
        open_cache(folder)
    before = (folder / shard_name(0, "tar")).stat().st_mtime_ns
    tar = folder / shard_name(1, "tar")
    tar.write_bytes(tar.read_bytes()[:-512])  # as on a full disk
    made = make_cache(source, folder, SIZE, per_shard=3)
    assert made.images == 3 + 3 + 1 and made.complete
    assert (folder / shard_name(0, "tar")).stat().st_mtime_ns == before
    assert len(open_cache(folder)) == 10 and not list(folder.glob("*.tmp"))


def test_several_processes_write_the_files_of_one(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_dataset(str(pictures))
    make_cache(source, tmp_path / "one", SIZE, per_shard=2, threads=1)
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        made = make_cache(source, tmp_path / "three", SIZE, per_shard=2)
        assert made.complete == (rank == 1)
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "three" / path.name).read_bytes() == path.read_bytes(), path.name
    monkeypatch.delenv("RANK")
    for name, value in (("TASK_ID", "7"), ("TASK_MIN", "5"), ("TASK_COUNT", "4")):
        monkeypatch.setenv(f"SLURM_ARRAY_{name}", value)
    assert shard_assignment() == (2, 4)
    for task, first, last, count, expected in ((4, 0, 6, 4, (2, 4)), (7, 3, 7, 2, (1, 2)), (5, 5, 5, 1, (0, 1))):
        for name, number in (("ID", task), ("MIN", first), ("MAX", last), ("COUNT", count)):
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(number))
        assert shard_assignment() == expected
    for task, first, last, count in ((3, 1, 8, 3), (2, 1, 5, 3)):
        for name, number in (("ID", task), ("MIN", first), ("MAX", last), ("COUNT", count)):
            monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(number))
        with pytest.raises(UserError, match=r"not evenly spaced: .*--array=0-2"):
            shard_assignment()
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "")
    with pytest.raises(UserError, match="SLURM_ARRAY_TASK_MIN='' is not a number"):
        shard_assignment()


def test_images_that_become_too_long_are_left_out(pictures: Path, tmp_path: Path) -> None:
    Image.new("RGB", (1900, 20)).save(pictures / "cats" / "strip.png")
    made = make_cache(open_dataset(str(pictures)), tmp_path / "cache", (768, 768))
    assert made.complete and made.skipped == 1 and "65,500" in (tmp_path / "cache/skipped.csv").read_text()
    assert len(open_dataset(str(tmp_path / "cache"))) == 10


def test_a_cache_without_an_image_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.jpg").write_bytes(b"broken")
    for _ in range(2):
        status, text = say(capsys, "cache", tmp_path / "bad", tmp_path / "cache", "--size", 16)
        assert status == 1 and "none of the 1 images" in text and "skipped*.csv" in text and "complete" not in text


def test_other_images_and_settings_are_refused(pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    make_cache(open_dataset(str(pictures)), folder, SIZE)
    with pytest.raises(UserError, match=r"another quality \(95, not 90\)"):
        make_cache(open_dataset(str(pictures)), folder, SIZE, quality=90)
    Image.new("RGB", (30, 30)).save(pictures / "cats" / "new.png")
    with pytest.raises(UserError, match="another fingerprint"):
        make_cache(open_dataset(str(pictures)), folder, SIZE)
    with pytest.raises(UserError, match="is not a cache"):
        make_cache(open_dataset(str(pictures)), pictures, SIZE)
    with pytest.raises(UserError, match="images of 3 channels in uint8, not 1 channel in uint8: pass --channels 3"):
        open_dataset(str(folder), ImageSpec(1))
    (folder / "settings.json").write_text("{}")
    with pytest.raises(UserError, match="damaged"):
        open_dataset(str(folder))


@pytest.mark.parametrize("text", ['{"editor.fontSize": 12}', "{} // a comment", "[1]", "\0"])
def test_settings_of_another_program_do_not_make_a_cache(pictures: Path, tmp_path: Path, text: str) -> None:
    (pictures / "settings.json").write_text(text)
    assert len(open_dataset(str(pictures))) == 10
    (tmp_path / "mine").mkdir()
    (pictures / "settings.json").rename(tmp_path / "mine" / "settings.json")
    with pytest.raises(UserError, match="other files and is not a cache"):
        make_cache(open_dataset(str(pictures)), tmp_path / "mine", SIZE)
    assert (tmp_path / "mine" / "settings.json").read_text() == text


def test_grey_and_420(pictures: Path, tmp_path: Path) -> None:
    make_cache(open_dataset(str(pictures), ImageSpec(1)), tmp_path / "grey", SIZE)
    assert open_dataset(str(tmp_path / "grey"), ImageSpec(1)).image(0).shape[0] == 1
    sizes = []
    for chroma in ("420", "444"):
        make_cache(open_dataset(str(pictures)), tmp_path / chroma, SIZE, chroma=chroma)  # type: ignore[arg-type]
        with tarfile.open(tmp_path / chroma / shard_name(0, "tar")) as archive:
            sizes.append(sum(member.size for member in archive if member.name.endswith("jpg")))
    assert sizes[0] < sizes[1]


def test_damage_is_an_error_or_a_bad_image(pictures: Path, tmp_path: Path) -> None:
    """Flip, remove or insert bytes at random offsets."""
    folder = tmp_path / "cache"
    make_cache(open_dataset(str(pictures)), folder, SIZE, per_shard=5)
    original = {path: path.read_bytes() for path in folder.iterdir()}
    generator = np.random.default_rng(0)
    for _ in range(50):
        path = list(original)[generator.integers(len(original))]
        content = bytearray(original[path])
        offset = int(generator.integers(len(content)))
        kind = generator.integers(3)
        if kind == 0:
            content[offset] ^= int(generator.integers(1, 256))
        elif kind == 1:
            del content[offset:]
        else:
            content[offset:offset] = generator.bytes(7)
        path.write_bytes(bytes(content))
        try:
            data = open_dataset(str(folder))
            for i in range(len(data)):
                try:
                    data.image(i)
                except BadImage:
                    continue
        except UserError:
            pass
        path.write_bytes(original[path])


def test_the_command(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cache"
    status, text = say(capsys, "cache", pictures, out, "--size", "32x48", "--per-shard", 3)
    assert status == 0 and "10 images written" in text and f"train with --data {out}" in text
    assert open_cache(out).image(0).shape[1:] in {(40, 56), (34, 48), (35, 48)}
    assert "no images left to write" in say(capsys, "cache", pictures, out, "--size", "32x48", "--per-shard", 3)[1]
    names = tmp_path / "some.txt"
    names.write_text("pictures/cats/0.jpg\npictures/dogs/1.jpg\n")
    assert "2 images written" in say(capsys, "cache", names, tmp_path / "two")[1]
