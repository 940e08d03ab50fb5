"""`pixmim advise` and `pixmim.advise`: the commands printed are valid, and lists contain images only."""

import html
import json
import os
import shlex
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

import pixmim
from helpers.cli import say
from pixmim import cli, recipes
from pixmim.advice.speed import measure_speed
from pixmim.cli.pretrain import read_flags
from pixmim.data import open_dataset
from pixmim.data.build_resized_cache import make_cache
from pixmim.data.dataset import ImageSpec
from pixmim.data.split import split_labeled

NOISE = np.random.default_rng(0)


@pytest.fixture
def tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of five elongated images with masks beside them, in the working directory."""
    monkeypatch.chdir(tmp_path)
    folder = Path("my tiles")
    folder.mkdir()
    for i in range(5):
        Image.fromarray(NOISE.integers(0, 256, (120, 48, 3), np.uint8)).save(folder / f"{i}.jpg")
        Image.fromarray(NOISE.integers(0, 2, (120, 48)).astype(np.uint8)).save(folder / f"{i}.png")
    return folder


def test_the_commands_run_in_order_and_train_on_the_images_without_masks(
    tiles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    advice = pixmim.advise(tiles, trial=False, device="cpu")
    first, last = (shlex.split(command) for command in advice.commands)
    assert say(capsys, *first[1:], "--no-trial", "--device", "cpu")[0] == 0
    config = read_flags(last[2:]).config
    assert config == advice.config and config.size == "104x40"
    dataset = pixmim.open_dataset(config.data)
    assert [Path(dataset.path_of(i)).name for i in range(len(dataset))] == [f"{i}.jpg" for i in range(5)]
    status, output = say(capsys, *first[1:])
    assert status == 1 and "my-tiles-images.txt" in output  # exists


def test_a_list_elsewhere_names_the_folder_that_it_may_read(tiles: Path, tmp_path: Path) -> None:
    advice = pixmim.advise(tiles, write_list=tmp_path / "lists" / "a.txt", trial=False, device="cpu")
    assert len(advice.commands) == 1
    assert len(pixmim.open_dataset(advice.config.data)) == 5
    with pytest.raises(pixmim.UserError, match=r"--list .*\.txt or \.csv"):
        pixmim.advise(tiles, write_list="a.json", trial=False, device="cpu")
    with pytest.raises(pixmim.UserError, match=r"--list a\.txt needs a folder"):
        pixmim.advise("shapes:count=20,size=32", write_list="a.txt", trial=False, device="cpu")


def test_images_in_an_archive_or_a_mixture_are_not_listed(tiles: Path, tmp_path: Path) -> None:
    """Such a list would name no files: say how to leave out masks instead."""
    with zipfile.ZipFile("tiles.zip", "w") as archive:
        for path in sorted(tiles.iterdir()):
            archive.write(path)
    for data in ("tiles.zip", f"{tiles}+{tiles}"):
        advice = pixmim.advise(data, trial=False, device="cpu")
        assert advice.config.data == data and len(advice.commands) == 1
        (masks,) = (suggestion for suggestion in advice.suggestions if suggestion.topic == "masks")
        assert f"{advice.survey.masks} files are masks" in masks.reason and "--exclude" in masks.reason
        with pytest.raises(pixmim.UserError, match=r"--list a\.txt needs a folder"):
            pixmim.advise(data, write_list="a.txt", trial=False, device="cpu")


def test_a_table_keeps_near_duplicates_in_one_part_of_a_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(24):
        image = Image.fromarray(NOISE.integers(0, 256, (20, 20, 3), np.uint8)).resize((64, 64))
        for copy in range(1 + number % 3):  # the copies of one image are in one class
            file = Path("set", "ab"[number % 2], f"{number:02}-{copy}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            image.point(lambda value, copy=copy: max(0, value - copy)).save(file)
    with pytest.raises(pixmim.UserError, match=r"all 48 images must be examined: add --images 48"):
        pixmim.advise("set", images=47, write_list="set.csv", trial=False, device="cpu")
    advice = pixmim.advise("set", write_list="set.csv", trial=False, device="cpu")
    assert advice.config.data == "set.csv"
    dataset = pixmim.open_dataset("set.csv")
    assert dataset.classes == ["a", "b"] and dataset.groups is not None and dataset.labels is not None
    is_train = split_labeled(dataset.labels, 0.5, 0, dataset.groups)
    parts: dict[str, set[bool]] = {}
    for index, part in enumerate(is_train):
        parts.setdefault(Path(dataset.path_of(index)).name[:2], set()).add(bool(part))
    assert len(parts) == 24 and all(len(sides) == 1 for sides in parts.values())
    Path("flat").mkdir()
    for file in Path("set/a").iterdir():
        file.rename(Path("flat", file.name))
    pixmim.advise("flat", write_list="flat.csv", trial=False, device="cpu")
    assert Path("flat.csv").read_text().startswith("path,group\nflat/00-0.png,\nflat/02-0.png,near-duplicates 1\n")


def test_the_printed_command_is_the_last_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # On a busy machine, reading may be slower than training, and a cache suggested.
    monkeypatch.setattr("pixmim.advice.measure_speed", lambda *args: min(1.0, measure_speed(*args)))
    assert cli.main(["advise", "shapes:count=40,size=32", "--images", "20", "--device", "cpu"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    words = shlex.split(last)
    assert words[:2] == ["pixmim", "pretrain"] and read_flags(words[2:]).config.data == "shapes:count=40,size=32"
    assert any("images/s" in line for line in lines)


def test_slow_reading_and_16_bits_add_their_preparation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scans").mkdir()
    for i in range(8):
        Image.fromarray(NOISE.integers(0, 9_000, (64, 64), np.uint16)).save(f"scans/{i}.png")
    monkeypatch.setattr("pixmim.advice.measure_speed", lambda *_: 1e9)
    advice = pixmim.advise("scans", device="cpu")
    cache, stats, last = (shlex.split(command) for command in advice.commands)
    for command in (cache, stats):
        assert say(capsys, *command[1:])[0] == 0
    config = read_flags(last[2:]).config
    assert (config.data, config.channels, config.dtype) == ("scans-64", 1, "uint16") and config == advice.config
    again = pixmim.advise("scans-64", device="cpu")  # a cache is not cached again
    assert again.survey.images == 8 and again.survey.image_spec.dtype == "uint16"
    assert [shlex.split(command)[1] for command in again.commands] == ["stats", "pretrain"]


def test_json_contains_the_survey_the_suggestions_and_the_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "advice.json"
    args = ["advise", "shapes:count=30,size=32", "--device", "cpu", "--no-trial"]
    assert cli.main([*args, "--json", "-"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert set(values) == {"survey", "suggestions", "questions", "commands", "config"}
    assert values["config"]["data"] == "shapes:count=30,size=32"
    assert values["survey"]["images"] == 30 and len(values["survey"]["spectrum"]["power"]) == 16
    assert {"topic", "flags", "reason", "basis"} == set(values["suggestions"][0])
    assert cli.main([*args, "--json", str(file)]) == 0
    assert json.loads(file.read_text())["commands"] == values["commands"]
    status, output = say(capsys, *args, "--json", file)
    assert status == 1 and "--overwrite" in output


def test_the_page_shows_findings_pictures_and_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names come from files: they are escaped, and the page needs no other file."""
    folder, out = tmp_path / "<b>photos", tmp_path / "advice"
    folder.mkdir()
    pixels = NOISE.integers(0, 256, (64, 80, 3), np.uint8)
    for name in ("<script>one", "two"):
        Image.fromarray(pixels).save(folder / f"{name}.png")
    for i in range(5):
        Image.fromarray(NOISE.integers(0, 256, (64, 80, 3), np.uint8)).save(folder / f"{i}.png")
    Image.new("RGB", (64, 64)).save(folder / "black&white.png")
    (folder / "<i>broken.jpg").write_bytes(b"nothing")
    args = ("advise", folder, "--out", out, "--no-trial", "--device", "cpu")
    status, output = say(capsys, *args)
    page = (out / "index.html").read_text()
    assert (
        status == 0 and f"page: {out}/index.html" in output and [path.name for path in out.iterdir()] == ["index.html"]
    )
    for name in ("<script>one", "<b>photos", "<i>broken", "black&white"):
        assert name not in page and html.escape(name) in page
    assert page.count("data:image/png") == 1 + 2 + 1  # spectrum, near-duplicates, without contrast
    assert 'src="http' not in page and "<link" not in page
    command = pixmim.advise(folder, trial=False, device="cpu").commands[-1]
    assert html.escape(command, quote=True).replace("&#x27;", "&#39;") in page
    assert say(capsys, *args)[0] == 0  # a page of pixmim is replaced, another file is not
    (out / "index.html").write_text("mine")
    status, output = say(capsys, *args)
    assert status == 1 and "index.html" in output and (out / "index.html").read_text() == "mine"


def test_a_page_without_findings_has_no_pictures_of_them(tmp_path: Path) -> None:
    page = pixmim.advise("shapes:count=20,size=32", trial=False, device="cpu").write_page(tmp_path / "new" / "page")
    assert "Near-duplicates" not in page.read_text() and "without contrast</h2>" not in page.read_text()


def test_the_command_for_published_weights_trains_from_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a file in place of timm:NAME, since tests have no network."""
    monkeypatch.setitem(recipes.RECIPES, "adapt", recipes.RECIPES.get("adapt", recipes.RECIPES["pixmim-vit-tiny"]))
    images = tmp_path / "images"
    images.mkdir()
    for i in range(4):
        Image.fromarray(NOISE.integers(0, 256, (96, 96, 3), np.uint8)).save(images / f"{i}.png")
    (start,) = (s for s in pixmim.advise(images, trial=False, device="cpu").suggestions if s.topic == "start")
    words = shlex.split(start.reason.split("`")[1])
    name, file = words[words.index("--init") + 1], tmp_path / "start.safetensors"
    save_file(timm.create_model(name.removeprefix("timm:"), num_classes=0).state_dict(), file)
    words[words.index(name)] = str(file)
    more = ["--out", tmp_path / "run", "--steps", 1, "--batch-size", 2, "--threads", 1, "--device", "cpu"]
    status, output = say(capsys, *words[1:], *more, report=False)
    assert status == 0, output
    assert "encoder: 150 tensors" in output and "positions interpolated" in output


def test_what_a_cache_was_made_with_is_part_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ({"stretch": "1,99"}, {"max_no_data": 0.5}):
        folder = str(tmp_path / "-".join(flags))
        make_cache(open_dataset("shapes:count=12,size=32", ImageSpec(**flags)), Path(folder), (32, 32))
        config = pixmim.advise(folder, device="cpu", trial=False).config
        assert all(getattr(config, name) == value for name, value in flags.items())


def test_a_list_is_replaced_on_request(tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["advise", str(tiles), "--list", str(tmp_path / "l.txt"), "--no-trial", "--device", "cpu"]
    assert cli.main(words) == 0
    assert cli.main(words) == 1 and "--overwrite" in capsys.readouterr().err
    assert cli.main([*words, "--overwrite"]) == 0
    again = ["advise", str(tmp_path / "l.txt"), *words[2:], "--overwrite"]
    assert cli.main(again) == 1 and "would replace the list that is examined" in capsys.readouterr().err


def test_wrong_requests_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "flat.png")
    for args, part in (
        (["/no/such/folder"], "/no/such/folder"),
        ([os.fspath(tmp_path), "--images", "0"], "--images"),
    ):
        status, output = say(capsys, "advise", *args)
        assert status == 1 and part in output
    with pytest.raises(pixmim.UserError, match="--images"):
        pixmim.advise(tmp_path, images=10**6)


def test_list_begins_with_recipes_for_ones_own_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    first = capsys.readouterr().out.splitlines()[:4]
    assert all("own images" in line for line in first) and first[0].startswith("pixmim-vit-tiny-64")
