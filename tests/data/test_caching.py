"""Test where decoded images are cached, and that it does not change the batches of a run."""

import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from helpers.batches import same
from pixmim.config import PretrainConfig
from pixmim.data import caching, create_loader, open_dataset
from pixmim.data.bad_images import BadImageLog
from pixmim.data.build_resized_cache import make_cache
from pixmim.data.dataset import ImageDataset, InMemoryDataset
from pixmim.data.loader import Batch
from pixmim.data.resized_cache import open_cache, shard_name
from pixmim.data.sampler import BatchShard
from pixmim.data.shards.dataset import ShardDataset
from pixmim.pretraining import pretrain
from pixmim.transforms.crops import CenterCrop, Crop, RandomResizedCrop, SimpleResizedCrop
from pixmim.utils.errors import UserError

SIZE = (32, 48)
CPU = torch.device("cpu")


@pytest.fixture
def shards(pictures: Path, tmp_path: Path) -> ShardDataset:
    make_cache(open_dataset(str(pictures)), tmp_path / "cache", SIZE)
    return open_cache(tmp_path / "cache")


def batches(
    location: caching.CacheLocation, data: ImageDataset, crop: Crop, count: int, shard: BatchShard
) -> list[Batch]:
    skipped = BadImageLog(None, len(data), 0.5)
    with create_loader(data, crop, shard, location, device=CPU, skipped=skipped, flip=0.5, seed=3, threads=3) as loader:
        return [Batch(b.images.clone(), b.flip.clone(), b.indices.clone()) for b in islice(loader, count)]


@pytest.mark.parametrize("crop", [SimpleResizedCrop(SIZE), SimpleResizedCrop(SIZE, padding=0), CenterCrop(SIZE)])
def test_batches_do_not_depend_on_the_cache_location(shards: ShardDataset, crop: Crop) -> None:
    for shard in (BatchShard(8), BatchShard(6, start=31, rank=1, world_size=3)):
        none, ram, gpu = (batches(location, shards, crop, 4, shard) for location in ("none", "ram", "gpu"))
        assert same(none, ram) and same(none, gpu)
    assert not any(thread.name.startswith("pixmim") for thread in threading.enumerate())


def test_unreadable_images_are_replaced_equally(shards: ShardDataset, tmp_path: Path) -> None:
    tar = tmp_path / "cache" / shard_name(0, "tar")
    data = bytearray(tar.read_bytes())
    for index in (2, 7):  # overwrite the headers of two images
        data[(start := int(shards._entries[index]["offset"])) : start + 40] = bytes(40)
    tar.write_bytes(data)
    crop = SimpleResizedCrop(SIZE)
    none, gpu = (batches(location, shards, crop, 4, BatchShard(5)) for location in ("none", "gpu"))
    assert same(none, gpu)


def test_choose_cache_location(shards: ShardDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, simple = torch.device("cuda"), SimpleResizedCrop(SIZE)
    size = sum(shards.image(i).numel() for i in range(len(shards)))
    assert caching.decoded_bytes(shards) == size

    def choose(crop: Crop = simple, cache_images: str = "auto", device: torch.device = gpu) -> str:
        return caching.choose_cache_location(shards, crop, cache_images, device)[0]  # type: ignore[arg-type]

    monkeypatch.setattr(caching, "total_memory", lambda: 4 * size)
    monkeypatch.setattr(caching, "_gpu_memory", lambda device: 4 * size)
    assert choose() == "gpu" and choose(device=CPU) == "ram" and choose(RandomResizedCrop(SIZE)) == "ram"
    assert choose(SimpleResizedCrop(16)) == "ram"  # another size, so it resizes
    assert (
        choose(cache_images="none") == "none"
        and choose(cache_images="ram") == "ram"
        and choose(cache_images="gpu", device=CPU) == "gpu"
    )
    monkeypatch.setattr(caching, "_gpu_memory", lambda device: 4 * size - 4)
    assert choose() == "ram"
    location, why = caching.choose_cache_location(shards, simple, "auto", CPU, processes=2)  # each has a copy
    assert location == "none" and "a quarter of the RAM, which 2 processes share (" in why
    monkeypatch.setattr(caching, "total_memory", lambda: 4 * size - 4)
    assert choose() == "none" and choose(cache_images="ram") == "ram" and choose(cache_images="gpu") == "gpu"
    with pytest.raises(UserError, match="needs a cache at --size"):
        choose(RandomResizedCrop(SIZE), cache_images="gpu")


def test_images_of_a_folder_are_cached_only_on_request(pictures: Path) -> None:
    folder, crop = open_dataset(str(pictures)), SimpleResizedCrop(SIZE)
    assert caching.choose_cache_location(folder, crop, "auto", CPU) == ("none", "")
    assert caching.choose_cache_location(folder, crop, "ram", CPU)[0] == "ram"
    with pytest.raises(UserError, match="needs a cache"):
        caching.choose_cache_location(folder, crop, "gpu", CPU)
    with pytest.raises(UserError, match="needs a cache"):
        batches("gpu", folder, crop, 1, BatchShard(2))


def test_cached_images_are_decoded_once(shards: ShardDataset) -> None:
    cached = InMemoryDataset(shards)
    assert torch.equal(cached.image(3), shards.image(3)) and cached.read_array(3) is cached.read_array(3)


def test_a_run_with_images_on_the_device_ends_with_the_same_weights(
    shards: ShardDataset, tiny_run: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    console = Console(quiet=True)
    for location in ("none", "gpu"):
        config = tiny_run(data=str(tmp_path / "cache"), size="32x48", steps=3, cache_images=location)
        pretrain(config, tmp_path / location, console=console, report=False)
    none, gpu = (load_file(tmp_path / name / "encoder/model.safetensors") for name in ("none", "gpu"))
    assert all(torch.equal(none[name], gpu[name]) for name in none)


def test_a_loader_needs_a_dataset_a_crop_and_a_batch_size(pictures: Path, tmp_path: Path) -> None:
    data, crop = open_dataset(pictures), SimpleResizedCrop(SIZE)
    with create_loader(data, crop, 4, seed=3) as loader:
        simple = [Batch(b.images.clone(), b.flip.clone(), b.indices.clone()) for b in islice(loader, 4)]
    assert same(simple, batches("none", data, crop, 4, BatchShard(4)))
    for path in sorted(pictures.rglob("*.jpg"))[:4]:
        path.write_bytes(b"")
    with (
        pytest.raises(UserError, match="more than the 25% that a loader allows"),
        create_loader(data, crop, 4) as loader,
    ):
        list(islice(loader, 4))
