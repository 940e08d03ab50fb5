"""Test that crops are a function of (seed, position), and the handling of unreadable images and interruptions."""

import csv
import os
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.batches import same
from pixmim.data import open_dataset
from pixmim.data.bad_images import BadImageLog
from pixmim.data.dataset import BadImage, ImageDataset, ImageSpec
from pixmim.data.loader import Batch, Loader, iterate_in_order
from pixmim.data.sampler import BatchShard
from pixmim.data.synthetic import SyntheticShapes
from pixmim.transforms.crops import Array, CenterCrop, RandomResizedCrop, SimpleResizedCrop
from pixmim.utils import rng
from pixmim.utils.errors import UserError


class Numbers(ImageDataset):
    """Dataset whose image i has the value i in every pixel; some images are unreadable."""

    def __init__(self, count: int, bad: tuple[int, ...] = ()) -> None:
        super().__init__("numbers", ImageSpec(), labels=np.zeros(10, np.int64), classes=["a"])
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def path_of(self, index: int) -> str:
        return f"numbers/{index}"

    def fingerprint(self) -> str:
        return f"{self.count} numbers"

    def read_array(self, index: int) -> Array:
        if index in self.bad:
            raise BadImage("broken, on purpose")
        return np.full((8, 8, 3), index % 256, np.uint8)


def loader(source: object, skipped: BadImageLog | None = None, **options: object) -> Loader:
    size, shard = options.pop("size", 8), {"batch_size": options.pop("batch", 4)}
    shard |= {name: options.pop(name) for name in ("start", "rank", "world_size", "parts") if name in options}
    values = {"crop": CenterCrop(size), "seed": 1, "threads": 2} | options
    crop = values.pop("crop")
    skipped = BadImageLog(None, len(source), 0.5) if skipped is None else skipped
    return Loader(source, crop, BatchShard(**shard), skipped=skipped, **values)


def take(count: int, **options: object) -> list[Batch]:
    source = options.pop("source", SyntheticShapes(count=50, size=24))
    with loader(source, **options) as batches:
        return [Batch(b.images.clone(), b.flip.clone(), b.indices.clone()) for b in islice(batches, count)]


@pytest.mark.parametrize("crop", [SimpleResizedCrop(16), RandomResizedCrop(16)])
def test_batches_do_not_depend_on_threads(crop: object) -> None:
    assert same(take(14, size=16, crop=crop, threads=1), take(14, size=16, crop=crop, threads=8))


def test_a_loader_resumes_at_any_step() -> None:
    full = take(15, size=16, crop=SimpleResizedCrop(16))
    for step in (1, 12, 13):  # 12.5 batches make an epoch
        assert same(full[step:], take(15 - step, size=16, crop=SimpleResizedCrop(16), start=4 * step))


def test_parts_of_a_batch_add_up_to_it() -> None:
    full, parts = take(3, batch=8), take(6, batch=4)
    joined = [torch.cat([parts[2 * i].images, parts[2 * i + 1].images]) for i in range(3)]
    assert all(torch.equal(a.images, b) for a, b in zip(full, joined, strict=True))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_batches_of_one_process(world_size: int, pictures: Path) -> None:
    (pictures / "cats" / "1.jpg").write_bytes(b"broken")  # each rank detects it itself
    data = open_dataset(str(pictures))
    options = {"source": data, "size": 16, "crop": SimpleResizedCrop(16)}
    full = take(4, batch=12, **options)
    ranks = [take(4, batch=12, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    for batch, parts in zip(full, zip(*ranks, strict=True), strict=True):
        assert torch.equal(batch.images, torch.cat([part.images for part in parts]))
        assert torch.equal(batch.flip, torch.cat([part.flip for part in parts]))


@pytest.mark.parametrize("parts", [4, 5])
def test_accumulation_steps_share_the_batches(parts: int) -> None:
    full, split = take(3, batch=12), take(3 * parts, batch=12, parts=parts)
    assert torch.equal(torch.cat([b.images for b in full]), torch.cat([b.images for b in split]))
    assert torch.equal(torch.cat([b.indices for b in full]), torch.cat([b.indices for b in split]))


def test_each_image_occurs_once_per_epoch_in_the_documented_order() -> None:
    batches = take(15, source=Numbers(10))  # six epochs of ten, in batches of four
    seen = torch.cat([b.images[:, 0, 0, 0] for b in batches]).reshape(6, 10)
    for epoch in range(6):
        assert seen[epoch].tolist() == rng.permutation(1, epoch, 10).tolist()


def test_crops_and_flips_are_the_documented_functions() -> None:
    source, crop = SyntheticShapes(count=50, size=24), SimpleResizedCrop(16)
    for position, (image, flip) in enumerate(
        (image, flip) for b in take(15, size=16, crop=crop) for image, flip in zip(b.images, b.flip, strict=True)
    ):
        epoch, epoch_position = divmod(position, 50)
        index = int(rng.permutation(1, epoch, 50)[epoch_position])
        u = rng.uniform(1, "crop", epoch, [index], 3)[0].tolist()
        assert bool(flip) == (u[0] < 0.5)
        assert torch.equal(image, crop.crop(source.image(index), u[1:]))


def test_a_dataset_smaller_than_a_batch_is_repeated() -> None:
    (batch,) = take(1, source=Numbers(3), batch=9)
    assert sorted(batch.images[:, 0, 0, 0].tolist()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_bad_images_are_replaced_and_listed_once(tmp_path: Path) -> None:
    path = tmp_path / "skipped.csv"
    source = Numbers(10, bad=(2, 5))
    with loader(source, BadImageLog(path, 10, 0.5)) as batches:
        seen = torch.cat([b.images[:, 0, 0, 0].clone() for b in islice(batches, 10)])
    assert not {2, 5} & set(seen.tolist())
    for epoch in range(4):  # the next readable image of the epoch replaces each
        order = rng.permutation(1, epoch, 10).tolist()
        expected = []
        for position in range(10):
            good = (order[(position + offset) % 10] for offset in range(10))
            expected.append(next(i for i in good if i not in (2, 5)))
        assert seen[10 * epoch : 10 * epoch + 10].tolist() == expected
    with loader(source, BadImageLog(path, 10, 0.5), start=12) as batches:  # a resumed run continues the log
        list(islice(batches, 10))
    rows = list(csv.reader(path.open()))
    assert rows[0] == ["image", "reason"]
    assert sorted(rows[1:]) == [["numbers/2", "broken, on purpose"], ["numbers/5", "broken, on purpose"]]


@pytest.mark.parametrize("bad", [range(3), range(2, 5)])
def test_too_many_bad_images_are_an_error_in_any_order(bad: range) -> None:
    skipped = BadImageLog(None, 5, 0.25)
    with pytest.raises(UserError, match="3 of the first 5 images cannot be read"):
        for index in range(5):
            skipped.record(index, str(index), "broken") if index in bad else skipped.mark_ok(index)


def test_too_many_bad_images_stop_the_run() -> None:
    source = Numbers(100, bad=tuple(range(0, 100, 2)))
    with (
        pytest.raises(UserError, match=r"(?s)more than the 25%.*broken, on purpose"),
        loader(source, BadImageLog(None, 100, 0.25)) as batches,
    ):
        list(islice(batches, 100))


def test_a_dataset_without_a_readable_image_is_an_error() -> None:
    with pytest.raises(UserError, match="cannot be read"), loader(Numbers(5, bad=tuple(range(5)))) as batches:
        next(batches)


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("pixmim")}


def test_an_error_in_the_loop_stops_all_threads() -> None:
    with pytest.raises(KeyboardInterrupt), loader(SyntheticShapes(count=1000), size=64, batch=256) as batches:
        next(batches)
        assert threads()
        raise KeyboardInterrupt
    assert not threads()


def test_an_error_in_a_thread_is_raised_in_the_loop() -> None:
    class Broken(Numbers):
        def read_array(self, index: int) -> Array:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), loader(Broken(5)) as batches:
        next(batches)
    assert not threads()


def test_memory_is_bounded_by_the_batches_ahead() -> None:
    source = Numbers(1000)
    read: list[int] = []
    original = source.read_array
    source.read_array = lambda index: (read.append(index), original(index))[1]  # type: ignore[method-assign]
    with loader(source, batch=10) as batches:
        next(batches)
        threading.Event().wait(0.2)
        assert len(read) <= 40  # one in use and three ahead


def test_iterate_in_order_yields_each_readable_image_once(pictures: Path) -> None:
    (pictures / "dogs" / "3.jpg").write_bytes(b"")
    data = open_dataset(str(pictures))
    parts = list(iterate_in_order(data, CenterCrop(16), skipped=BadImageLog(None, 10, 0.5), batch=4))
    assert np.concatenate([indices for _, indices, _ in parts]).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9]
    assert [end for *_, end in parts] == [4, 8, 10]
    rest = list(iterate_in_order(data, CenterCrop(16), skipped=BadImageLog(None, 10, 0.5), batch=1, first=7))
    assert [indices.tolist() for _, indices, _ in rest] == [[7], [], [9]]  # an empty batch
    for images, indices, _ in parts:
        for image, index in zip(images, indices, strict=True):
            assert torch.equal(image, CenterCrop(16).crop(data.image(int(index))))


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_does_not_grow_over_epochs() -> None:
    with loader(Numbers(10), size=96, batch=10, crop=RandomResizedCrop(96)) as batches:
        sizes = []
        for _ in range(4):
            for _ in range(40):  # 40 epochs
                next(batches)
            sizes.append(resident_bytes())
    assert sizes[-1] - sizes[0] < 4 * 2**20  # if every batch were left behind, 32 MiB
