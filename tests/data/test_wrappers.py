"""Test datasets made of other datasets: mixtures and subsets."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.runs import train
from pixmim.config import PretrainConfig
from pixmim.data import open_dataset
from pixmim.data.bad_images import BadImageLog
from pixmim.data.build_resized_cache import make_cache
from pixmim.data.dataset import ConcatDataset, ImageDataset, ImageSpec, InMemoryDataset, Subset
from pixmim.data.loader import Loader
from pixmim.data.sampler import BatchShard
from pixmim.data.synthetic import SHAPES, SyntheticShapes
from pixmim.transforms.crops import CenterCrop, Crop, RandomResizedCrop
from pixmim.utils.errors import UserError

Make = Callable[..., PretrainConfig]


def test_each_image_occurs_as_often_as_its_weight(pictures: Path) -> None:
    data = open_dataset(f"{pictures}*3+shapes:count=4,size=32*2")
    assert isinstance(data, ConcatDataset) and len(data) == 10 * 3 + 4 * 2
    photos, drawn = open_dataset(str(pictures)), SyntheticShapes(count=4, size=32)
    expected = {photos.path_of(i): 3 for i in range(10)} | {drawn.path_of(i): 2 for i in range(4)}
    assert Counter(data.path_of(i) for i in range(len(data))) == expected
    for index in (0, 9, 10, 29):
        assert torch.equal(data.image(index), photos.image(index % 10))
    for index in (30, 33, 34, 37):
        assert torch.equal(data.image(index), drawn.image((index - 30) % 4))


def crops(data: ImageDataset, crop: Crop, count: int) -> list[bytes]:
    """Return the crops of the first `count` samples."""
    skipped = BadImageLog(None, len(data), 0.0)
    with Loader(data, crop, BatchShard(4), skipped=skipped, seed=3, threads=2) as batches:
        images = torch.cat([next(batches).images.clone() for _ in range(count // 4)])
    return [image.numpy().tobytes() for image in images]


def test_an_epoch_contains_all_copies_cropped_differently(pictures: Path) -> None:
    spec = f"{pictures}*3+shapes:count=6,size=32"
    data, alone = open_dataset(spec), open_dataset(f"{pictures}+shapes:count=6,size=32")
    center = CenterCrop((24, 24))
    expected = {center.crop(alone.image(i), ()).numpy().tobytes(): 3 if i < 10 else 1 for i in range(16)}
    found = crops(data, center, 72)
    assert Counter(found[:36]) == Counter(found[36:]) == expected
    assert len(set(crops(data, RandomResizedCrop((24, 24)), 36))) == 36


def test_classes_are_merged_by_name(pictures: Path, tmp_path: Path) -> None:
    (pictures / "dogs").rename(pictures / "star")
    data = open_dataset(f"shapes:count=6*2+{pictures}")
    assert data.labels is not None and data.classes == [*SHAPES, "cats"]
    names = [data.classes[label] for label in data.labels.tolist()]
    drawn = [SHAPES[label] for label in SyntheticShapes(count=6).labels.tolist()]
    assert names == drawn * 2 + ["cats"] * 5 + ["star"] * 5
    (pictures / "loose.jpg").write_bytes((pictures / "cats" / "0.jpg").read_bytes())
    unlabeled = open_dataset(f"shapes:count=6+{pictures}")
    assert unlabeled.labels is None and unlabeled.classes == []


def test_description_and_fingerprint(pictures: Path, tmp_path: Path) -> None:
    make_cache(open_dataset(str(pictures)), tmp_path / "cache", (24, 24))
    data = open_dataset(f"{tmp_path}/cache*3+shapes:count=10")
    assert (
        "75.0% " in data.description
        and "(10 images, each 3 times an epoch; read from a cache on disk)" in data.description
    )
    assert "25.0% shapes:count=10" in data.description and "(10 images)" in data.description
    others = [f"{tmp_path}/cache*2+shapes:count=10", f"{tmp_path}/cache*3+shapes:count=11"]
    prints = {open_dataset(spec).fingerprint() for spec in (data.spec, *others)}
    assert len(prints) == 3 and open_dataset(data.spec).fingerprint() == data.fingerprint()


def test_sizes_are_known_if_those_of_all_parts_are(pictures: Path, tmp_path: Path) -> None:
    make_cache(open_dataset(str(pictures)), tmp_path / "cache", (24, 32))
    data = open_dataset(f"{tmp_path}/cache*2+{tmp_path}/cache")
    assert data.sizes is not None
    assert data.sizes.tolist() == [list(data.image(i).shape[1:]) for i in range(30)]
    assert open_dataset(f"{tmp_path}/cache+{pictures}").sizes is None


class Sharded(InMemoryDataset):
    """Dataset with shards of three, two and one images, which records what is prefetched."""

    prefetched: Sequence[int] = ()

    def __init__(self, source: ImageDataset) -> None:
        super().__init__(source)
        self.shard_sizes = np.asarray([3, 2, 1])

    def prefetch(self, shards: Sequence[int]) -> None:
        self.prefetched = list(shards)


def test_parts_keep_their_shards() -> None:
    sharded, plain = Sharded(SyntheticShapes(count=6, size=8)), SyntheticShapes(count=2500, size=8)
    assert ConcatDataset("plain", [(plain, 2)]).shard_sizes is None
    data = ConcatDataset("both", [(plain, 1), (sharded, 2)])
    assert data.shard_sizes is not None
    assert data.shard_sizes.tolist() == [1000, 1000, 500] + [3, 2, 1] * 2 and data.shard_sizes.sum() == len(data)
    data.prefetch([4, 0, 8, 3, 7, 6])  # of the shards 1, 2, 0, 1 and 0 of the sharded part
    assert sharded.prefetched == [1, 2, 0]


def test_a_subset_is_a_dataset(pictures: Path) -> None:
    dataset = open_dataset(str(pictures))
    part = Subset(dataset, [7, 2])
    assert len(part) == 2 and part.labels is not None and part.labels.tolist() == [1, 0]
    assert (
        part.path_of(0) == dataset.path_of(7)
        and part.image(1).equal(dataset.image(2))
        and part.classes == dataset.classes
    )
    assert Subset(SyntheticShapes(count=9), [3]).sizes is None and part.fingerprint() != dataset.fingerprint()


def test_one_part_with_a_weight_and_a_missing_part(pictures: Path) -> None:
    assert len(open_dataset(f"{pictures}*2")) == 20
    assert open_dataset(f"{pictures}+shapes:count=2", ImageSpec(1)).image(0).shape[0] == 1
    with pytest.raises(UserError, match=r"nosuch"):
        open_dataset(f"{pictures}+{pictures.parent}/nosuch")


def test_a_run_from_a_mixture_and_a_cache_of_it(pictures: Path, tmp_path: Path, tiny_run: Make) -> None:
    spec = f"{pictures}*2+shapes:count=6,size=32"
    assert "images: a mixture of 76.9%" in train(tiny_run(data=spec, steps=4), tmp_path / "run")
    made = make_cache(open_dataset(spec), tmp_path / "cache", (32, 32))
    cached = open_dataset(str(tmp_path / "cache")).labels
    assert made.images == 26 and cached is not None and np.array_equal(cached, open_dataset(spec).labels)
