"""Test that samples, crops and flips do not depend on ranks, accumulation steps or resuming."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pixmim.data import open_dataset
from pixmim.data.bad_images import BadImageLog
from pixmim.data.loader import Loader
from pixmim.data.sampler import BatchShard
from pixmim.transforms.crops import SimpleResizedCrop

BATCH, STEPS, SIZE = 12, 4, 16


def _batches(data: str, rank: int, world_size: int, accumulation_steps: int = 1, start: int = 0) -> list[torch.Tensor]:
    """Return the images and flips of this rank, one uint8 tensor (b n) per batch."""
    dataset, found = open_dataset(data), []
    shard = BatchShard(BATCH, start * BATCH, rank, world_size, accumulation_steps)
    skipped = BadImageLog(None, len(dataset), 0.5)
    with Loader(dataset, SimpleResizedCrop(SIZE), shard, skipped=skipped, seed=5, threads=2) as loader:
        for _ in range((STEPS - start) * accumulation_steps):
            batch = next(loader)
            found.append(torch.cat([batch.images.flatten(1), batch.flip[:, None].to(torch.uint8)], dim=1))
    return found


def _gather(rank: int, world_size: int, data: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}.rendezvous", rank=rank, world_size=world_size)
    gathered = []
    for batch in _batches(data, rank, world_size):
        parts = [torch.empty_like(batch) for _ in range(world_size)]
        dist.all_gather(parts, batch)
        gathered.append(torch.cat(parts))
    if rank == 0:
        torch.save(torch.cat(gathered), out)
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_several_ranks_yield_the_samples_of_one(world_size: int, pictures: Path, tmp_path: Path) -> None:
    (pictures / "cats" / "1.jpg").write_bytes(b"not a picture")  # each rank detects it itself
    mp.spawn(_gather, (world_size, str(pictures), str(tmp_path / "all.pt")), nprocs=world_size)
    single = torch.cat(_batches(str(pictures), 0, 1))
    assert torch.equal(torch.load(tmp_path / "all.pt"), single)


def test_accumulation_and_resuming_yield_the_same_samples(pictures: Path) -> None:
    single = torch.cat(_batches(str(pictures), 0, 1))
    for parts in (4, 5):
        assert torch.equal(torch.cat(_batches(str(pictures), 0, 1, accumulation_steps=parts)), single)
    assert torch.equal(torch.cat(_batches(str(pictures), 0, 1, start=3)), single[3 * BATCH :])


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="does not divide among 3 ranks"):
        BatchShard(8, world_size=3)
