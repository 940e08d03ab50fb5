"""Where decoded images stay: by a stated rule, and without any difference to what a run sees."""

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
from pixmim.data import caching
from pixmim.data import create_loader, open_dataset
from pixmim.data.bad_images import BadImageLog
from pixmim.data.build_resized_cache import make_cache
from pixmim.data.dataset import InMemoryDataset
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
    place: caching.CacheLocation, source: ShardDataset, crop: Crop, count: int, shard: BatchShard
) -> list[Batch]:
    skipped = BadImageLog(None, len(source), 0.5)
    with create_loader(source, crop, shard, place, device=CPU, skipped=skipped, flip=0.5, seed=3, threads=3) as found:
        return [Batch(b.images.clone(), b.flip.clone(), b.indices.clone()) for b in islice(found, count)]


@pytest.mark.parametrize("crop", [SimpleResizedCrop(SIZE), SimpleResizedCrop(SIZE, padding=0), CenterCrop(SIZE)])
def test_the_place_changes_no_bit(shards: ShardDataset, crop: Crop) -> None:
    for shard in (BatchShard(8), BatchShard(6, start=31, rank=1, world_size=3)):
        disk, memory, device = (batches(place, shards, crop, 9, shard) for place in ("none", "ram", "gpu"))
        assert same(disk, memory) and same(disk, device)
    assert not any(thread.name.startswith("pixmim") for thread in threading.enumerate())


def test_nor_do_images_that_cannot_be_read(shards: ShardDataset, tmp_path: Path) -> None:
    tar = tmp_path / "cache" / shard_name(0, "tar")
    data = bytearray(tar.read_bytes())
    for index in (2, 7):  # two pictures lose their beginning
        data[(start := int(shards._entries[index]["offset"])) : start + 40] = bytes(40)
    tar.write_bytes(data)
    crop = SimpleResizedCrop(SIZE)
    disk, device = (batches(place, shards, crop, 12, BatchShard(5)) for place in ("none", "gpu"))
    assert same(disk, device)


def test_the_rule(shards: ShardDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, src = torch.device("cuda"), SimpleResizedCrop(SIZE)
    need = sum(shards.image(i).numel() for i in range(len(shards)))
    assert caching.decoded_bytes(shards) == need

    def place(crop: Crop = src, how: str = "auto", device: torch.device = gpu) -> str:
        return caching.choose_cache_location(shards, crop, how, device)[0]

    monkeypatch.setattr(caching, "total_ram", lambda: 4 * need)
    monkeypatch.setattr(caching, "_gpu_memory", lambda device: 4 * need)
    assert place() == "gpu" and place(device=CPU) == "ram" and place(RandomResizedCrop(SIZE)) == "ram"
    assert place(SimpleResizedCrop(16)) == "ram"  # of another size: resized, not only cut
    assert place(how="none") == "none" and place(how="ram") == "ram" and place(how="gpu", device=CPU) == "gpu"
    monkeypatch.setattr(caching, "_gpu_memory", lambda device: 4 * need - 4)
    assert place() == "ram"
    where, why = caching.choose_cache_location(
        shards, src, "auto", CPU, processes=2
    )  # which would keep all images twice
    assert where == "none" and "a quarter of the RAM, which 2 processes share (" in why
    monkeypatch.setattr(caching, "total_ram", lambda: 4 * need - 4)
    assert place() == "none" and place(how="ram") == "ram" and place(how="gpu") == "gpu"
    with pytest.raises(UserError, match="needs a cache at --size"):
        place(RandomResizedCrop(SIZE), how="gpu")


def test_pictures_are_kept_only_if_asked(pictures: Path) -> None:
    folder, crop = open_dataset(str(pictures)), SimpleResizedCrop(SIZE)
    assert caching.choose_cache_location(folder, crop, "auto", CPU) == ("none", "")
    assert caching.choose_cache_location(folder, crop, "ram", CPU)[0] == "ram"
    with pytest.raises(UserError, match="needs a cache"):
        caching.choose_cache_location(folder, crop, "gpu", CPU)


def test_what_is_kept_is_decoded_once(shards: ShardDataset) -> None:
    kept = InMemoryDataset(shards)
    assert torch.equal(kept.image(3), shards.image(3)) and kept.read_array(3) is kept.read_array(3)


def test_a_run_from_the_device_ends_with_the_same_weights(
    shards: ShardDataset, tiny_run: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    console = Console(quiet=True)
    for place in ("none", "gpu"):
        run = tiny_run(data=str(tmp_path / "cache"), size="32x48", steps=3, cache_images=place)
        pretrain(run, tmp_path / place, console=console, report=False)
    disk, device = (load_file(tmp_path / place / "encoder/model.safetensors") for place in ("none", "gpu"))
    assert all(torch.equal(disk[name], device[name]) for name in disk)
