"""Hostile names of files, folders, classes, runs and columns, in every output."""

import csv
import io
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from helpers.cli import skip_report
from helpers.models import TINY
from pixmim import cli
from pixmim.config import ArchitectureConfig, OptimConfig, PretrainConfig
from pixmim.config_io import to_json
from pixmim.evaluation.shape_bias import draw as draw_bias
from pixmim.evaluation.visualize import draw_detections, draw_segmentations
from pixmim.report.results import ModelResults, table
from pixmim.utils.console import print_plain, printable
from pixmim.utils.plotting import plot_curves

NAMES = [
    "[red]x[/]",
    "[/]",
    "a [mae]",
    ":skull:",
    "\x1b[2J\x1b]0;title\x07",
    "\x9b2J",
    "c$\\frac{$",
    "<img src=x onerror=alert(1)>",
    '"><script>alert(1)<!--',
    "=cmd|' C calc'!A0",
    "@SUM(A1)",
    "line\nbreak",
    "\ttab\r",
    "-rf",
    "_hidden",
    "gpj.\u202eexe",
    os.fsdecode(b"M\xfcller"),
    "n" * 200,
    "\U0001f600" * 20,
    "{{7*7}}{% raw %}",
    "%s%n",
    "'q' \"q\" `q`",
    "back\\slash\\",
    "dots. . ",
    "a+b*2",
    "\u4f60\u597d",
]
FILES = list(dict.fromkeys(name.replace("/", "|") for name in NAMES))  # for a path with [/] in it see `stage`
RUNS = [
    "c$\\frac{$ [red]x[|]",
    '_"><script>alert(1)<!--',
    "\x1b[2J line\nbreak",
    os.fsdecode(b"M\xfcller '=x"),
    "n" * 200,
]

_ACTIVE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\ud800-\udfff]")


@dataclass(frozen=True)
class Stage:
    """Data with hostile names, runs trained on them, and the cache directory of the user who trained them."""

    folder: Path
    data: Path
    runs: list[Path]
    home: Path


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    folder = tmp_path_factory.mktemp("hostile")
    data = folder / "a+b*2 [mae] =1 [" / "] $x$ \x1b[2J <b>"
    generator = np.random.default_rng(0)
    for name in FILES:
        (data / name).mkdir(parents=True)
        for i in range(2):
            pixels = generator.integers(0, 255, (20, 20, 3), np.uint8)
            Image.fromarray(pixels).save(data / name / f"{name[:190]}{i}.png")
    for name in FILES[:8]:
        (data / name / f"{name}bad.png").write_bytes(b"not a picture")
    model = ArchitectureConfig(
        backbone="vit_tiny_patch16_224", decoder_dim=16, decoder_depth=1, decoder_heads=2, options=dict(TINY)
    )
    run = PretrainConfig(
        recipe="tiny", steps=3, batch_size=8, size="16", precision="fp32", device="cpu", threads=1, log_every=1,
        model=model, optim=OptimConfig(base_lr=0.05),
    )  # fmt: skip
    (folder / "recipe.json").write_text(to_json(run))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "home"))
        out = folder / RUNS[0]
        assert cli.main(["pretrain", str(folder / "recipe.json"), "--data", str(data), "--out", str(out)]) == 0
    for name in RUNS[1:]:
        shutil.copytree(out, folder / name)
    return Stage(folder, data, [folder / name for name in RUNS], folder / "home")


@pytest.fixture(autouse=True)
def _trusted(stage: Stage, _own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(stage.home))
    monkeypatch.chdir(stage.folder)


def command(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    """Run a command, check that its output holds no control characters, and return its status and output."""
    capsys.readouterr()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Glyph|.*constrained_layout")
        status = cli.main([str(arg) for arg in args])
    output = capsys.readouterr()
    text = output.out + re.sub(r"\rGenerating [^\r\n]*", "", output.err)  # without the bar of the datasets library
    assert not _ACTIVE.search(text), repr(text)
    return status, text


class Page(HTMLParser):
    """A parser that fails on anything that a name could inject into a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self._quiet = "", False
        self.feed(path.read_bytes().decode())  # valid UTF-8

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "b", "iframe", "object", "link")
        for name, value in attrs:
            assert not name.startswith("on")
            assert name not in ("src", "href", "xlink:href") or str(value).startswith(("data:image/png;base64,", "#"))

    def handle_comment(self, data: str) -> None:
        assert data.startswith(" $\\mathdefault{10^")  # a tick of a logarithmic axis

    def handle_data(self, data: str) -> None:
        self.text += data


def check_tables(folder: Path) -> int:
    """Check that no cell of a CSV file is a formula, and return the number of cells."""
    cells = 0
    for path in folder.rglob("*.csv"):
        for row in csv.reader(io.StringIO(path.read_bytes().decode("utf-8", "surrogateescape"), newline="")):
            assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) for cell in row), (path, row)
            cells += len(row)
    return cells


def test_data_commands(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = command(capsys, "stats", stage.data, "--threads", 1)
    assert status == 0 and "train with --data '" in text and "8 " in text
    out = stage.folder / "cache [red]x[| $1$"
    status, text = command(capsys, "cache", stage.data, out, "--size", 16, "--threads", 1)
    assert status == 0 and "8 could not be read" in text and "[red]x[" in text
    assert check_tables(out) == 2 * 9
    status, text = command(capsys, "bench-data", stage.data, "--size", 16, "--seconds", 0.05, "--threads", 1)
    assert status == 0 and "images/s" in text
    assert command(capsys, "list")[0] == 0


def test_training_lists_every_image_once_and_resumes(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    run = stage.runs[0]
    before = (run / "skipped.csv").read_bytes()
    (run / "encoder/model.safetensors").unlink()
    shutil.rmtree(run / "checkpoints")
    status, text = command(capsys, "pretrain", "--resume", run)
    assert status == 0 and "images could not be read" in text and run.name in text
    assert sorted((run / "skipped.csv").read_bytes().splitlines()) == sorted(before.splitlines())
    assert check_tables(run) > 2


def test_evaluations_and_pages(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    labeled = ["--train", stage.data, "--test", stage.data, "--device", "cpu", "--precision", "fp32"]
    with pytest.MonkeyPatch.context() as patch:
        skip_report(patch.setattr)
        for run in stage.runs[:3]:
            status, text = command(capsys, "evaluate", "knn", run, *labeled)
            assert status == 0 and "k-NN" in text, text
        few = ["--corruptions", "contrast", "--severities", 1, "--epochs", 1]
        assert command(capsys, "evaluate", "robustness", stage.runs[1], *labeled, *few)[0] == 0
    assert command(capsys, "evaluate", "linear", stage.runs[0], *labeled, "--epochs", 1)[0] == 0
    status, text = command(capsys, "report", *stage.runs, "--out", stage.folder / "pages {{1}}" / "p.html")
    assert status == 0 and "[red]x[" in text
    page = Page(stage.folder / "pages {{1}}" / "p.html")
    for name in RUNS:
        assert printable(name)[:20] in page.text
    assert "49" not in Page(stage.runs[0] / "report.html").text.split("Settings")[0].split("Use the encoder")[1]
    assert not list(stage.folder.rglob("*.tmp"))


def test_the_python_line_of_a_page_is_one_string_per_name(stage: Stage) -> None:
    import ast

    from pixmim.report.page import load_line, read_entry

    for run in stage.runs:
        entry = read_entry(run, run.name, None, lambda line: None)
        call = ast.parse(load_line(entry)).body[0].value  # type: ignore[attr-defined]
        assert ast.literal_eval(call.args[0]) == f"local-dir:{run / 'encoder'}"


def test_reconstructions_attention_and_features(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    run = stage.runs[1]
    for name in ("reconstruct", "attention"):
        out = stage.folder / "new [b]" / f"{NAMES[4]}{name}.png"
        status, text = command(capsys, name, run, stage.data, "--out", out, "--count", 20)
        assert status == 0 and "written to" in text
        Image.open(out).verify()
    for end in ("npy", "parquet"):
        if end == "parquet":
            pytest.importorskip("pyarrow")
        out = stage.folder / "features [b]" / f"={NAMES[6]}\U0001f600.{end}"
        status, text = command(capsys, "embed", run, "--data", stage.data, "--out", out, "--device", "cpu")
        assert status == 0 and f"{2 * len(FILES)} rows" in text
    assert check_tables(out.parent) > 3 * 2 * len(FILES)


def test_parquet_holds_the_names(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    out = stage.folder / "names.parquet"
    assert command(capsys, "embed", stage.runs[1], "--data", stage.data, "--out", out, "--device", "cpu")[0] == 0
    classes = set(parquet.read_table(out).column("class").to_pylist())
    assert classes == {name.replace("\udcfc", "\\xfc") for name in FILES}


def test_columns_of_a_table(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    names = [name for name in NAMES if "\udcfc" not in name]
    parquet.write_table(arrow.table({name: [1] for name in names}), stage.folder / "t [b].parquet")
    status, _ = command(capsys, "stats", stage.folder / "t [b].parquet")
    assert status == 1


def test_weights_are_imported_and_exported(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    run = stage.runs[2]
    status, text = command(capsys, "import", run, "--to", stage.folder / "imported [mae] \x1b[2J")
    assert status == 0 and "[mae]" in text
    for kind in ("timm", "hf"):
        status, text = command(capsys, "export", run, "--to", kind, "--out", stage.folder / f"{kind} [mae] \x1b[2J")
        assert status == 0 and "[mae]" in text


def test_coverage(stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    table = stage.folder / "boxes [b] $x$.csv"
    with table.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        rows = csv.writer(file)
        rows.writerow(["width", "height", "x", "y", "w", "h", "image"])
        rows.writerows([100, 80, 10, 10, 30, 30, name] for name in NAMES if "\udcfc" not in name)
    out = stage.folder / "coverage =1"
    status, text = command(capsys, "coverage", table, "--out", out)
    assert status == 0 and "SRC" in text
    assert check_tables(out) > len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_errors_print_names(name: str, stage: Stage, capsys: pytest.CaptureFixture[str]) -> None:
    for args in (
        ["stats", f"/no/such/{name}"],
        ["report", f"/no/such/{name}"],
        ["import", f"/no/such/{name}"],
        ["pretrain", "demo", "--data", f"/no/such/{name}"],
        ["pretrain", f"/no/such/{name}.json"],
        ["evaluate", name],
        [f"x{name}"],
    ):
        assert command(capsys, *args)[0] == 1


def test_figures_draw_every_name() -> None:
    xy = ([0.0, 1.0, 2.0], [1.0, 2.0, 3.0])
    svg = plot_curves({name: xy for name in NAMES}, x="epoch", y="loss")
    assert "<img" not in svg and "<script" not in svg and not _ACTIVE.search(svg.replace("\n", "").replace("\t", ""))
    for text in ("c$\\frac{$", "_hidden", "[/]", "{{7*7}}", "\\x1b[2J"):
        assert f">{text}" in svg
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw_bias({name: 0.5 for name in NAMES}, 0.5).width > 100
    picture = np.zeros((16, 16, 3), np.uint8)
    masks = np.arange(256, dtype=np.uint8).reshape(16, 16) % len(NAMES)
    assert draw_segmentations([(picture, masks, masks)], NAMES).width < 6000
    boxes = np.tile(np.asarray([[1, 1, 9, 9]], np.float32), (len(NAMES), 1))
    labels, scores = np.arange(len(NAMES)), np.full(len(NAMES), 0.9, np.float32)
    assert draw_detections(picture, boxes[:0], boxes, labels, scores, [], NAMES).width == 320
    assert draw_detections(np.zeros((2, 2000, 3), np.uint8), boxes[:0], boxes, labels, scores, [], NAMES).size == (
        320,
        1,
    )


def test_names_do_not_color_a_table_on_a_terminal() -> None:
    result = {"evaluation": "knn", "encoder": "trained", "values": {"k1/mean/top1": 50.0}, "pictures": {}}
    models = [ModelResults(name, [result | {"settings": {"test": name}}]) for name in NAMES]
    for width in (80, 20_000):
        console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system="truecolor")
        console.print(table(models, width))
        for name in NAMES:
            print_plain(console, name)
        shown = re.sub("\x1b\\[[0-9;]*m", "", console.file.getvalue())  # type: ignore[attr-defined]
        assert not _ACTIVE.search(shown.replace("\n", ""))
    for name in NAMES:
        assert shown.count(printable(name)) >= 2
