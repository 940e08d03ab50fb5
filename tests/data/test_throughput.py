"""pixmim bench-data: every rate is measured, and the advice is a function of the numbers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers.cli import say
from pixmim.data import open_data
from pixmim.data.build_resized_cache import make_cache
from pixmim.data.synthetic import Shapes
from pixmim.data.throughput.measure import Cached, Disk, Rates, _sample, measure
from pixmim.data.throughput.recommend import advise, today
from pixmim.data.throughput.subset import Subset
from pixmim.data.throughput.timing import forget, rate, read
from pixmim.transforms.crops import RandomResizedCrop, SimpleResizedCrop
from pixmim.utils.errors import UserError

QUICK = 0.02

PHOTOS = Rates(
    images=1_300_000,
    sample=500,
    bad=0,
    example="",
    threads=8,
    cores=8,
    memory=64 * 10**9,
    disk=Disk(bytes=110_000, first=20_000, many=22_000, again=90_000),
    decode=800,
    decode_all=6_000,
    crop=1_500,
    loader_first=3_800,
    loader=4_000,
    caches={"jpeg": Cached(45_000, 3_500, 12_000), "raw": Cached(200_000, 5_000, 20_000)},
    kept=60_000,
    decoded=200_000,
    keeps=False,
)
"""ImageNet on a machine of 8 cores, with a fast disk."""

SLOW = replace(PHOTOS, disk=Disk(bytes=110_000, first=900, many=950, again=90_000), loader_first=880)
"""The same on a slow one."""


def advice(rates: Rates, eats: float | None = None) -> str:
    return "\n".join(advise(rates, "pixmim cache photos cached --size 224", eats))


def test_cores_that_limit() -> None:
    text = advice(PHOTOS)
    assert today(PHOTOS) == 3_800 and "The cores limit, at 3,800 images/s" in text and "1.2 ms to read" in text
    assert "`pixmim cache photos cached --size 224` would give 12,000 images/s, 3.2 times as many" in text
    assert "It takes 6 min to make, and 58.5 GB" in text and "decoded, where it stays" not in text
    assert (
        "cached --size 224 --raw` would give 11,000 images/s" not in text
    )  # 1,300,000 raw images are more than memory


def test_a_disk_that_limits() -> None:
    text = advice(SLOW)
    assert today(SLOW) == 880 and "The disk limits: 880 images/s come from it, where the cores would do 4,000" in text
    assert "143.0 GB do not stay in memory" in text and "More threads do not help: 8 get 900 images/s" in text
    larger = replace(SLOW, images=2 * SLOW.images)  # too many even for a cache to stay in memory
    text = advice(larger)
    assert "would give 2,322 images/s" in text and "The disk limits it: the cores would do 12,000" in text
    assert "--raw" not in text  # 200 kB an image would be slower from this disk
    more = replace(SLOW, disk=Disk(bytes=110_000, first=900, many=3_000, again=90_000))
    assert "try --threads 32" in advice(more) and "do not help" not in advice(more)


def test_files_that_stay_in_memory() -> None:
    few = replace(SLOW, images=20_000)
    text = advice(few)
    assert today(few) == 4_000 and "The cores limit, at 4,000" in text
    assert "The first epoch, from the disk, runs at 880" in text
    assert "It takes 6 s to make, and 0.9 GB. All of it fits into memory decoded" in text and "60,000 images/s" in text
    assert "--raw" not in text  # kept decoded is better


def test_a_raw_cache() -> None:
    roomy = replace(PHOTOS, images=120_000)  # raw files stay in memory as files; decoded, they are above the share
    assert "--size 224 --raw` would give 20,000 images/s, 1.7 times as many" in advice(roomy)


def test_threads() -> None:
    assert "4 threads leave cores idle: this machine has 8" in advice(replace(PHOTOS, threads=4))
    busy = replace(PHOTOS, decode_all=2_000)
    assert "8 threads decode 2.5 times what one does: is something else running?" in advice(busy)


def test_a_cache_that_is_kept() -> None:
    kept = replace(PHOTOS, images=50_000, keeps=True, caches={"raw": PHOTOS.caches["raw"]})
    text = advice(kept, eats=6_000)
    assert today(kept) == 60_000 and "Training keeps these images decoded in memory, 10.0 GB: 60,000 images/s" in text
    assert "Nothing that was tried here would be clearly faster" in text and "6,000 images/s is fed" in text


@pytest.mark.parametrize(
    ("eats", "words"),
    [
        (3_000, "eats 3,000 images/s is fed"),
        (6_000, "waits 37% of its time; a cache would feed it."),
        (50_000, "waits 92% of its time; nothing that was tried here feeds it"),
    ],
)
def test_what_a_model_eats(eats: float, words: str) -> None:
    assert words in advice(PHOTOS, eats)


def test_more_ways_to_feed_a_model() -> None:
    assert "a cache would feed it, kept decoded in memory" in advice(replace(PHOTOS, images=50_000), 50_000)
    assert "a raw cache would feed it" in advice(replace(PHOTOS, images=120_000), 15_000)


def test_what_cannot_be_read_is_told() -> None:
    assert "3 of 500 images tried cannot be read, such as x.jpg: empty" in advice(
        replace(PHOTOS, bad=3, example="x.jpg: empty")
    )


def test_every_rate_of_a_folder(pictures: Path) -> None:
    (pictures / "cats" / "0.jpg").write_bytes(b"broken")  # the first: even a turn of one image comes to it
    rates = measure(open_data(str(pictures)), SimpleResizedCrop(24), (24, 24), threads=2, seconds=QUICK)
    positive(rates)
    assert (rates.images, rates.sample, rates.bad, rates.threads) == (10, 10, 1, 2) and "0.jpg: " in rates.example
    assert rates.disk is not None and set(rates.caches) == {"jpeg", "raw"} and not rates.keeps
    sizes = [path.stat().st_size for path in pictures.glob("*/*.jpg")]
    assert rates.disk.bytes == np.mean(sizes) and 24 * 24 * 3 <= rates.decoded <= 24 * 36 * 3


def test_every_rate_of_a_cache_and_of_drawings(pictures: Path, tmp_path: Path) -> None:
    for kind, others in (("jpeg", {"raw"}), ("raw", set())):
        make_cache(open_data(str(pictures)), tmp_path / kind, (24, 24), kind=kind)  # type: ignore[arg-type]
        source = open_data(str(tmp_path / kind))
        rates = measure(source, SimpleResizedCrop(24), (24, 24), threads=1, seconds=QUICK)
        positive(rates)
        assert rates.disk is not None and set(rates.caches) == others and rates.keeps
    rates = measure(Shapes(count=30, size=32), RandomResizedCrop(32), (64, 64), threads=1, seconds=QUICK)
    positive(rates)
    assert rates.disk is None and rates.loader_first is None and rates.decoded >= 64 * 64 * 3


def positive(rates: Rates) -> None:
    disk = [] if rates.disk is None else [*vars(rates.disk).values()]
    caches = [value for cached in rates.caches.values() for value in vars(cached).values()]
    first = [] if rates.loader_first is None else [rates.loader_first]
    others = [rates.decode, rates.decode_all, rates.crop, rates.loader, rates.kept, rates.decoded]
    assert all(value > 0 for value in [*disk, *caches, *first, *others])


def test_mostly_broken_images_end_it(pictures: Path) -> None:
    for path in sorted(pictures.glob("*/*.jpg"))[:6]:
        path.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"\d of \d+ images cannot be read, such as .*jpg: not a picture"):
        measure(open_data(str(pictures)), SimpleResizedCrop(24), (24, 24), seconds=QUICK)


def test_a_sample_is_the_same_each_time_and_near_where_that_counts() -> None:
    source = Shapes(count=5000, size=8)
    few, many = _sample(source, 1e-6), _sample(source, 1e6)
    assert len(few) == 16 and len(set(many)) == 1024 == len(many) and many[:16] == few and max(many) < 5000

    far = Subset(source, range(5000))
    far.pieces = np.full(50, 100)
    taken = _sample(far, 1e6)
    assert len(set(taken)) == 1024 and len({index // 100 for index in taken}) == 11


def test_a_part_is_a_data_set(pictures: Path) -> None:
    whole = open_data(str(pictures))
    part = Subset(whole, [7, 2])
    assert len(part) == 2 and part.labels is not None and part.labels.tolist() == [1, 0]
    assert part.locate(0) == whole.locate(7) and part.image(1).equal(whole.image(2)) and part.classes == whole.classes
    assert Subset(Shapes(count=9), [3]).sizes is None and part.fingerprint() != whole.fingerprint()


def test_reading_and_forgetting(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(range(100)))
    assert read((str(tmp_path / "x"), 0, 0)) == 100 and read((str(tmp_path / "x"), 90, 20)) == 10
    forget((str(tmp_path / "x"), 0, 0))
    assert read((str(tmp_path / "none"), 0, 0)) == 0
    forget((str(tmp_path / "none"), 0, 0))


def test_a_turn_ends_with_its_things() -> None:
    done: list[int] = []
    assert rate(done.append, lambda: range(7), 3, 60.0) > 0
    assert sorted(done) == sorted([*range(7)] * 3)


def test_the_command(pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, text = say(capsys, "bench-data", pictures, "--size", "24", "--seconds", QUICK, "--eats", "1e9")
    assert status == 0 and "10 images; 10 of them tried" in text and "eats 1,000,000,000 images/s waits" in text
    for words in ("reading from the disk", "decoding", "crop", "loader, from the disk", "4:4:4 cache", "kept decoded"):
        assert words in text
    status, text = say(capsys, "bench-data", pictures, "--seconds", "0")
    assert status == 1 and "--seconds must be a number above 0" in text
    status, text = say(capsys, "bench-data", "/no/such")
    assert status == 1 and "no folder /no/such" in text
