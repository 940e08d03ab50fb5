"""Test `pixmim bench-data`: all ways to read images are measured, and the advice follows from the rates."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.cli import say
from pixmim.data import open_dataset
from pixmim.data import throughput as module
from pixmim.data.build_resized_cache import make_cache
from pixmim.data.dataset import ImageDataset
from pixmim.data.synthetic import SyntheticShapes
from pixmim.data.throughput import DECODED, DISK, MEMORY, Report, Throughput, drop_from_page_cache, measure, recommend
from pixmim.transforms.crops import SimpleResizedCrop
from pixmim.utils.errors import UserError

ROWS = [
    Throughput(DISK, 880, 110_000),
    Throughput(MEMORY, 4_000, 110_000),
    Throughput("jpeg cache", 12_000, 45_000, "make a cache"),
    Throughput(DECODED, 60_000, 200_000, "keep it decoded"),
]
PHOTOS = Report(ROWS, ROWS[1], "limited by decoding", 500)


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REPEATS", 1)


def advice(report: Report, target_rate: float | None = None) -> str:
    return "\n".join(recommend(report, target_rate))


def test_faster_ways_are_recommended() -> None:
    assert advice(PHOTOS).splitlines() == [
        "4,000 images/s after the first epoch, limited by decoding.",
        "12,000 images/s, 3.0 times as many: make a cache.",
        "60,000 images/s, 15.0 times as many: keep it decoded.",
    ]
    assert "Nothing measured" in advice(replace(PHOTOS, current=ROWS[3]))
    assert "3 of 500" in advice(replace(PHOTOS, bad="3 of 500 images cannot be read"))


@pytest.mark.parametrize(
    ("target_rate", "words"),
    [(3_000, "keeps up with 3,000"), (6_000, "33% of its time; jpeg cache"), (50_000, DECODED), (9e4, "96%.*nothing")],
)
def test_a_target_rate(target_rate: float, words: str) -> None:
    assert re.search(words, advice(PHOTOS, target_rate))


def run(source: ImageDataset, size: int = 24) -> dict[str, Throughput]:
    report = measure(source, SimpleResizedCrop(size), (size, size), threads=2, seconds=0.01)
    rows = {row.name: row for row in report.rows}
    assert all(row.rate > 0 for row in report.rows) and rows[report.current.name] is report.current
    return rows


def test_a_folder(pictures: Path) -> None:
    rows = run(open_dataset(str(pictures)))
    assert list(rows) == [DISK, MEMORY, "jpeg cache", "raw cache", DECODED]
    sizes = [path.stat().st_size for path in pictures.glob("*/*.jpg")]
    assert rows[DISK].bytes == sum(sizes) / 10
    assert rows[DECODED].bytes is not None and 24 * 24 * 3 <= rows[DECODED].bytes <= 24 * 36 * 3


def test_a_cache_and_synthetic_images(pictures: Path, tmp_path: Path) -> None:
    for kind, others in (("jpeg", ["raw cache"]), ("raw", [])):
        make_cache(open_dataset(str(pictures)), tmp_path / kind, (24, 24), kind=kind)  # type: ignore[arg-type]
        assert list(run(open_dataset(str(tmp_path / kind)))) == [DISK, MEMORY, *others, DECODED]
    assert list(run(SyntheticShapes(count=30, size=32))) == [MEMORY, "jpeg cache", "raw cache", DECODED]


@pytest.mark.parametrize(("memory", "current"), [(10**12, DECODED), (6 * 10**4, MEMORY), (10, DISK)])
def test_the_current_way_depends_on_memory(
    memory: int, current: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_cache(open_dataset(str(pictures)), tmp_path / "cache", (24, 24))
    monkeypatch.setattr(module, "total_memory", lambda: memory)
    monkeypatch.setattr(module, "_measure_rate", lambda *args: 1.0 if args[-1] else 100.0)
    report = measure(open_dataset(str(tmp_path / "cache")), SimpleResizedCrop(24), (24, 24))
    assert report.current.name == current
    raw = next(row for row in report.rows if row.name == "raw cache")
    assert (raw.rate < 1.0) == (current == DISK)  # larger than the JPEGs: slower from the same disk


def test_a_few_broken_images_are_reported_and_many_refused(pictures: Path) -> None:
    paths = sorted(pictures.glob("*/*.jpg"))
    paths[0].write_bytes(b"broken")
    report = measure(open_dataset(str(pictures)), SimpleResizedCrop(24), (24, 24), seconds=0.01)
    assert report.bad.startswith("1 of 10 images cannot be read")
    for path in paths[:6]:
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match="6 of the first 10 images cannot be read"):
        measure(open_dataset(str(pictures)), SimpleResizedCrop(24), (24, 24), seconds=0.5)


def test_a_missing_file_of_a_list_is_an_unreadable_image(pictures: Path) -> None:
    paths = sorted(map(str, pictures.glob("*/*.jpg")))
    (pictures / "list.TXT").write_text("\n".join([*paths, f"{pictures}/cats/none.jpg"]))
    size = sum(Path(path).stat().st_size for path in paths) / len(paths)
    for spec in (f"{pictures}/list.TXT", f"{pictures}/list.TXT*2"):
        report = measure(open_dataset(spec), SimpleResizedCrop(24), (24, 24), seconds=0.01)
        assert report.rows[0].name == DISK and report.rows[0].bytes == pytest.approx(size)


def test_dropping_from_the_page_cache(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(100))
    for name in ("x", "none"):
        drop_from_page_cache((str(tmp_path / name), 0, 0))


def test_the_command(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = say(capsys, "bench-data", pictures, "--size", 24, "--seconds", 0.01, "--target-rate", "1e9")
    assert status == 0 and "measured with 10" in text and "1,000,000,000 images/s waits" in text
    assert all(row in text for row in (DISK, MEMORY, "jpeg cache", DECODED))
    status, text = say(capsys, "bench-data", pictures, "--seconds", "0")
    assert status == 1 and "--seconds must be a number above 0" in text
