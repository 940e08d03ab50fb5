"""Run folders from elsewhere: they open no other data, and each malformed file costs one line."""

import io
import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from safetensors.numpy import save

from helpers.cli import say
from helpers.images import write_pictures
from helpers.runs import train
from pixmim import cli
from pixmim.config import PretrainConfig
from pixmim.config_io import to_json
from pixmim.data.bad_images import BadImageLog, merge_logs, read_bad_images
from pixmim.evaluation.frozen_encoder import load_frozen_encoder
from pixmim.evaluation.robustness.count import CountsFile
from pixmim.report import write_report
from pixmim.report.results import read_results
from pixmim.training.metric_logger import MetricLogger, read_metrics
from pixmim.utils.errors import UserError
from pixmim.weights.load import resolve_model

Make = Callable[..., PretrainConfig]
RESULT = {"evaluation": "knn", "encoder": "trained", "settings": {"test": "x"}, "values": {"k1/mean/top1": 12.5}}


@pytest.fixture(scope="module")
def trained(tiny_run: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images, a run on them, and the cache directory of the user who trained it."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        train(tiny_run(data=str(write_pictures(root / "pictures")), size="16", steps=2), root / "run")
    return root


@pytest.fixture
def pictures(trained: Path) -> Path:
    return trained / "pictures"


@pytest.fixture
def foreign(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a run on local images as another user would receive it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other user"))
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record every dataset and every file of weights that is opened."""
    seen: list[str] = []

    def record(module: str, name: str) -> None:
        import importlib

        original = getattr(importlib.import_module(module), name)

        def wrapper(spec: object, *args: object, **more: object) -> object:
            seen.append(str(spec))
            return original(spec, *args, **more)

        monkeypatch.setattr(f"{module}.{name}", wrapper)

    for module in ("pixmim.report.page", "pixmim.pretraining", "pixmim.evaluation.evaluate"):
        record(module, "open_dataset")
    record("pixmim.weights.load", "resolve_model")
    return seen


def rename(run: Path, **changes: object) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | changes))


def test_the_report_opens_no_data_of_an_untrusted_config(
    foreign: Path, pictures: Path, opened: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, text = say(capsys, "report", foreign)
    page = (foreign / "report.html").read_text()
    assert status == 0 and str(pictures) not in opened and "data:image/png" not in page
    assert "was not made by you" in text and str(pictures) in text and "--data DATA" in text
    assert "was not made by you" in page and not (foreign / "reconstructions").exists()
    status, text = say(capsys, "report", foreign, "--data", pictures)
    assert status == 0 and "not made" not in text and "data:image/png" in (foreign / "report.html").read_text()
    rename(foreign, data="https://example.org/cache")
    assert "not made by you" in say(capsys, "report", foreign)[1] and "https://example.org/cache" not in opened
    rename(foreign, data="shapes:count=9,size=16+shapes:count=3,size=16*2")  # synthetic data needs no trust
    assert "not made by you" not in say(capsys, "report", foreign)[1]


def test_the_users_own_run_needs_no_confirmation(trained: Path, foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(trained / "cache"))
    lines: list[str] = []
    page = write_report([foreign], foreign / "report.html", warn=lines.append)
    assert not lines and "data:image/png" in page.read_text()
    rename(foreign, data=f"{foreign.parent}/pictures/cats")  # a changed config is not trusted
    write_report([foreign], foreign / "report.html", warn=lines.append)
    assert len(lines) == 1


@pytest.mark.parametrize("where", ["--resume", "recipe"])
def test_data_of_an_untrusted_config_must_be_typed_before_it_is_opened(
    where: str, foreign: Path, pictures: Path, opened: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    start = ["--resume", foreign] if where == "--resume" else [foreign / "config.json", "--out", tmp_path / "new"]
    status, text = say(capsys, "pretrain", *start)
    assert status == 1 and f"--data {pictures}" in text and not opened
    knn = {"train": str(pictures), "test": str(pictures), "every": 1.0}
    rename(foreign, init="/their/weights.pth", knn=knn)
    status, text = say(capsys, "pretrain", *start, "--data", pictures, f"--knn.train={pictures}")
    assert status == 1 and "--init /their/weights.pth" in text and f"--knn.test {pictures}" in text and not opened
    assert f"--data {pictures}" not in text
    rename(foreign, init="", knn=knn)
    typed = ["--data", pictures, "--knn.train", pictures, f"--knn.test={pictures}"]
    assert say(capsys, "pretrain", *start, *typed, report=False)[0] == 0
    out = foreign if where == "--resume" else tmp_path / "new"
    status, _ = say(capsys, "pretrain", "--resume", out, report=False)
    assert status == 0  # after the user has typed the data once, the config is trusted


def test_an_untrained_encoder_opens_no_weights_of_an_untrusted_config(foreign: Path, opened: list[str]) -> None:
    load_frozen_encoder(str(foreign), device="cpu", untrained=True)
    for init in ("/their/weights.pth", "timm:vit_tiny_patch16_224"):
        rename(foreign, init=init)
        with pytest.raises(UserError, match=f"--init {init}"):
            load_frozen_encoder(str(foreign), device="cpu", untrained=True)
    assert not opened


@pytest.mark.parametrize(
    "name", ["config.json", "encoder", "encoder/model.safetensors", "checkpoints", "metrics.jsonl", "skipped.csv"]
)
def test_a_link_that_leads_out_of_a_run_is_not_followed(name: str, foreign: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside" / name
    outside.parent.mkdir(parents=True)
    (foreign / "skipped.csv").touch()
    (foreign / name).rename(outside)
    (foreign / name).symlink_to(outside)
    before = outside.read_bytes() if outside.is_file() else b""
    lines: list[str] = []
    if name == "config.json":
        with pytest.raises(UserError, match="leads out of"):
            write_report([foreign], foreign / "report.html", warn=lines.append)
    else:
        write_report([foreign], foreign / "report.html", "shapes:count=3,size=16", lines.append)
        assert "encoder" in name or any("leads out of" in line and name in line for line in lines)
    if name in ("config.json", "encoder", "encoder/model.safetensors", "checkpoints"):
        with pytest.raises(UserError, match="leads out of"):
            resolve_model(str(foreign), with_decoder=name == "checkpoints")
    run = PretrainConfig(data="shapes:count=3,size=16")
    with pytest.raises(UserError, match="leads out of"):
        train(run, foreign)
    assert not outside.is_file() or outside.read_bytes() == before


def test_images_of_a_result_come_from_its_folder(foreign: Path, tmp_path: Path) -> None:
    folder = foreign / "evaluations"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (24, 24, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "secret.png")
    Image.fromarray(noise).save(folder / "good.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    Image.fromarray(noise).save(folder / "a.jpg")
    (folder / "a.jpg").rename(folder / "jpeg.png")
    header = struct.pack(">4sIIBBBBB", b"IHDR", 20_000, 20_000, 8, 0, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (folder / "bomb.png").write_bytes(bomb + struct.pack(">I", 100) + b"IDAT" + bytes(100))
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:200])
    os.mkfifo(folder / "fifo.png")
    names = [
        str(tmp_path / "secret.png"),
        "../../secret.png",
        "link.png",
        "jpeg.png",
        "bomb.png",
        "cut.png",
        "fifo.png",
    ]
    names += ["../config.json", "a/../good.png", "x\0.png", "missing.png", "good.png"]
    (folder / "r.json").write_text(json.dumps(RESULT | {"pictures": {f"picture {n}": n for n in names}}))
    lines: list[str] = []
    html = write_report([foreign], foreign / "report.html", warn=lines.append).read_text()
    assert re.findall(r'<img src="data:[^"]*" alt="([^"]*)"', html) == ["run, trained: picture good.png"]
    assert len([line for line in lines if "an image of run is left out" in line]) == len(names) - 2


def test_malformed_results_cost_a_line_each(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "evaluations"
    folder.mkdir(parents=True)
    bad = {
        "list": [], "number": 3, "empty": {}, "unknown": RESULT | {"evaluation": "evil"},
        "nested": RESULT | {"evaluation": {"a": 1}}, "encoder": RESULT | {"encoder": ["trained"]},
        "settings": RESULT | {"settings": "x"}, "values": RESULT | {"values": [1]},
        "pictures": RESULT | {"pictures": "../x.png"},
    }  # fmt: skip
    for name, content in bad.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "broken.json").write_bytes(b"\xff{")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "large.json").write_text(json.dumps(RESULT | {"x": "y" * 20_000_000}))
    os.mkfifo(folder / "fifo.json")
    (folder / "link.json").symlink_to("/etc/passwd")
    (folder / "good.json").write_text(json.dumps(RESULT))
    values = {"k1/mean/top1": "12", "k20/cls/top1": 3, "a": None, "b": {"c": 1}, "d": True}
    text = json.dumps(RESULT | {"values": values, "settings": {"test": ["x"], "data": None}})
    (folder / "part.json").write_text(text[:-2] + ', "e": 1e999, "f": 1' + "0" * 400 + "}}")
    lines: list[str] = []
    page = write_report([tmp_path / "run"], tmp_path / "page.html", warn=lines.append).read_text()
    assert "12.5 %" in page and "3.0 %" in page
    assert len(lines) == len(bad) + 6
    for name in [*bad, "broken", "deep", "large", "fifo", "link", "part"]:
        assert len([line for line in lines if f"{name}.json" in line]) == 1
    assert len(read_results(tmp_path / "run")) == 2


BAD_LINES = [
    "no json", "[1]", '"x"', "null", "{}", '{"step": 1}', '{"step": "1", "epoch": 1}', '{"step": 1, "epoch": "x"}',
    '{"step": 1, "epoch": NaN}', '{"step": 1.5, "epoch": 1}', '{"step": true, "epoch": 1}', '{"step": -1, "epoch": 1}',
    '{"step": 1, "epoch": 1, "loss": "x"}', '{"step": 1, "epoch": 1, "loss": [1]}', "\0\0", "\udcff", "[" * 5000,
    '{"step": 1' + "0" * 400 + ', "epoch": 1}', '{"step": 1, "epoch": 1, "loss": 1' + "0" * 400 + "}",
]  # fmt: skip


def test_malformed_metrics_cost_one_line_and_a_resumed_run_keeps_the_good_ones(
    tiny_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    train(tiny_run(log_every=1), out)
    good = (out / "metrics.jsonl").read_text().splitlines()
    mixed = [*good[:3], *BAD_LINES, '{"step": 3, "epoch": 0.6, "loss": NaN, "lr": Infinity}', *good[3:]]
    (out / "metrics.jsonl").write_bytes("\n".join(mixed).encode("utf-8", "surrogateescape") + b'\n{"step": 6, "ep')
    warned: list[str] = []
    assert len(read_metrics(out / "metrics.jsonl", warned.append)) == len(good) + 1
    assert len(warned) == 1 and "line 4 " in warned[0] and f"{len(BAD_LINES) - 1} more" in warned[0]
    status, text = say(capsys, "report", out)
    assert status == 0 and text.count("metrics.jsonl: line 4") == 1
    assert (out / "report.html").read_text().count("<svg") >= 3
    status, text = say(capsys, "pretrain", "--resume", out)
    assert status == 0 and "is complete" in text
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
        3,
        4,
        5,
        6,
    ]


def test_a_metrics_file_is_regular_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match="a FIFO"):
        read_metrics(tmp_path / "metrics.jsonl")
    monkeypatch.setattr("pixmim.training.metric_logger._MAX_BYTES", 10)
    (tmp_path / "large.jsonl").write_text("x" * 11)
    with pytest.raises(OSError, match="limit of 10"):
        read_metrics(tmp_path / "large.jsonl")


def test_metrics_are_not_appended_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    console = Console(file=io.StringIO(), width=500)
    log = MetricLogger(tmp_path / "m.jsonl", steps=2, start=0, every=1, epoch=1, images=1, console=console)
    (tmp_path / "m.jsonl").unlink()
    (tmp_path / "m.jsonl").symlink_to(tmp_path / "mine")
    log.write({"step": 1, "epoch": 1})
    assert (tmp_path / "mine").read_text() == "kept" and "cannot write" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_malformed_bad_image_log_costs_one_line_and_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "skipped.csv"
    path.write_bytes(b"image,reason\na,b\n\0\xff,x\n" + b"x" * 200_000 + b",y\nb,c\n")
    rows, problem = read_bad_images(path)
    assert [row[0] for row in rows] == ["a", "\0\udcff", "b"] and "field larger" in problem
    account = BadImageLog(path, 9, 1.0)
    for index, name in enumerate(("a", "b", "=1", "=1", os.fsdecode(b"\xfc"))):
        account.record(index, name, "-no\ngood")
    assert path.read_bytes().endswith(b",y\nb,c\n'=1,'-no good\r\n\xfc,'-no good\r\n")


def test_bad_image_logs_of_several_ranks_are_merged(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("root,x\n")
    (tmp_path / "skipped.csv").write_text("image,reason\na,b\n")
    (tmp_path / "skipped-1.csv").write_text("image,reason\na,b\n'=c,d\n")
    os.mkfifo(tmp_path / "skipped-2.csv")
    assert merge_logs(tmp_path) == 2
    assert (tmp_path / "skipped.csv").read_text() == "image,reason\na,b\n'=c,d\n"
    assert not (tmp_path / "skipped-1.csv").exists() and (tmp_path / "skipped-2.csv").exists()
    (tmp_path / "skipped-2.csv").unlink()
    (tmp_path / "skipped.csv").unlink()
    (tmp_path / "skipped.csv").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic links"):
        BadImageLog(tmp_path / "skipped.csv", 9, 1.0).record(0, "a", "b")
    assert (tmp_path / "mine").read_text() == "root,x\n"


@pytest.mark.parametrize("text", ["", "x", "[]", '{"key": 3}', '{"key": [1]}', '{"key": [1, "2"]}', '{"key": [1, 99]}'])
def test_malformed_counts_are_recomputed(text: str, tmp_path: Path) -> None:
    (tmp_path / "counts.json").write_text(text)
    console = Console(file=io.StringIO(), width=500)
    file = CountsFile(tmp_path, console)
    assert file.load("key", 2, 10) == [0, 0]
    assert console.file.getvalue().count("counts.json") == 1  # type: ignore[attr-defined]
    file.save("key", [1, 10])
    assert CountsFile(tmp_path, console).load("key", 2, 10) == [1, 10]


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "[]", "3", "\0", "[" * 100_000),
        '{"type": "pixmim.PretrainConfig"}',
        '{"type": "pixmim.PretrainConfig", "version": 1, "x": 1}',
    ],
)
def test_a_broken_config_gives_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(text)
    labeled = ["--train", "shapes:", "--test", "shapes:"]
    for args in (
        ["report", run], ["pretrain", "--resume", run], ["pretrain", run / "config.json", "--data", "shapes:"],
        ["evaluate", "knn", run, *labeled], ["evaluate", "knn", run, *labeled, "--untrained"],
        ["reconstruct", run, tmp_path], ["import", run],
    ):  # fmt: skip
        status, text = say(capsys, *args)
        assert status == 1 and text.startswith("error: ") and "Traceback" not in text
    (run / "evaluations").mkdir()
    (run / "evaluations" / "good.json").write_text(json.dumps(RESULT))
    status, text = say(capsys, "report", run)
    assert status == 0 and "12.5 %" in text


def test_a_result_is_saved_inside_its_folder(foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "outside").mkdir()
    (foreign / "evaluations").symlink_to(tmp_path / "outside")
    shapes = ["--train", "shapes:count=9,size=16", "--test", "shapes:count=9,size=16,seed=1", "--device", "cpu"]
    status, text = say(capsys, "evaluate", "knn", foreign, *shapes)
    assert status == 1 and "leads out of" in text and not list((tmp_path / "outside").iterdir())


def test_output_images_are_checked_before_the_work(
    foreign: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], opened: list[str]
) -> None:
    (tmp_path / "file").touch()
    for name in ("reconstruct", "attention"):
        for out in (tmp_path / "file" / "x.png", tmp_path, tmp_path / "x.exe", tmp_path / "x"):
            status, text = say(capsys, name, foreign, pictures, "--out", out)
            assert status == 1 and "Traceback" not in text and str(out) in text
        assert not opened
        assert say(capsys, name, foreign, pictures, "--out", tmp_path / name / "new" / "x.png")[0] == 0
        assert os.listdir(tmp_path / name / "new") == ["x.png"]
        opened.clear()
    status, text = say(capsys, "report", foreign, "--out", tmp_path / "file" / "x.html")
    assert status == 1 and not opened


def test_two_embed_into_one_file_do_not_mix(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, shapes = tmp_path / "f.npy", "shapes:count=9,size=16"
    args = ["embed", foreign, "--data", shapes, "--out", out, "--device", "cpu"]
    seen: list[tuple[int, str]] = []

    def meanwhile(arrays: dict[str, np.ndarray]) -> bytes:
        if not seen:
            seen.append((1, ""))
            seen.append(say(capsys, *args))
        return save(arrays)

    monkeypatch.setattr("pixmim.evaluation.embed.save", meanwhile)
    assert say(capsys, *args)[0] == 0
    assert seen[1][0] == 1 and "is in use by process" in seen[1][1]
    assert np.load(out).shape[0] == 9 and not out.with_name("f.npy.partial").exists()


@pytest.mark.parametrize("state", ["", "[]", "{}", '{"done": "x"}', '{"done": -1}', '{"done": 1e3}'])
def test_damaged_unfinished_work_is_named(
    state: str, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = tmp_path / "f.npy.partial"
    partial.mkdir()
    (partial / "state.json").write_text(state)
    status, text = say(capsys, "embed", foreign, "--data", "shapes:count=9,size=16", "--out", tmp_path / "f.npy")
    assert status == 1 and "f.npy.partial" in text
    shutil.rmtree(partial)
    partial.symlink_to(tmp_path)
    status, text = say(capsys, "embed", foreign, "--data", "shapes:count=9,size=16", "--out", tmp_path / "f.npy")
    assert status == 1 and "symbolic link" in text


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", ".hidden", "a/b", "a b", "x" * 101, "\x1b[2J"])
def test_a_recipe_is_a_name_instead_of_a_path(name: str, tiny_run: Make) -> None:
    with pytest.raises(UserError, match="--recipe must be a word"):
        tiny_run(recipe=name)


@pytest.mark.parametrize("device", ["meta", "hpu:3", "cuda:x", "vulkan", "cpu:0\n"])
def test_an_unknown_device_is_refused(device: str, tiny_run: Make) -> None:
    with pytest.raises(UserError, match="--device must be auto, cpu, cuda"):
        tiny_run(device=device)


def test_a_run_folder_named_like_a_timm_model_is_a_folder(
    foreign: Path, opened: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign.rename(tmp_path / "timm:vit_tiny_patch16_224")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pixmim.weights.load.download_timm", lambda *_: pytest.fail("timm was asked"))
    write_report([Path("timm:vit_tiny_patch16_224")], tmp_path / "page.html", warn=lambda line: None)
    assert (tmp_path / "page.html").is_file()


def test_a_recipe_file_with_control_characters_is_refused(
    tiny_run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(to_json(tiny_run(data="\x1b]0;pwned\x07")))
    assert cli.main(["pretrain", str(tmp_path / "run.json"), "--help"]) == 1
    assert "\x1b" not in "".join(capsys.readouterr())
