"""The stream of samples, crops and flips over several processes, which talk to each other as a cluster's would."""

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


def _batches(data: str, rank: int, ranks: int, accumulation_steps: int = 1, start: int = 0) -> list[torch.Tensor]:
    """This rank's images and flips of each step, as one uint8 tensor (b, numbers)."""
    source, found = open_dataset(data), []
    shard = BatchShard(BATCH, start * BATCH, rank, ranks, accumulation_steps)
    with Loader(source, SimpleResizedCrop(SIZE), shard, skipped=BadImageLog(None, len(source), 0.5), seed=5) as loader:
        for _ in range((STEPS - start) * accumulation_steps):
            batch = next(loader)
            found.append(torch.cat([batch.images.flatten(1), batch.flip[:, None].to(torch.uint8)], dim=1))
    return found


def _gather(rank: int, ranks: int, data: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{out}.rendezvous", rank=rank, world_size=ranks)
    whole = []
    for mine in _batches(data, rank, ranks):
        parts = [torch.empty_like(mine) for _ in range(ranks)]
        dist.all_gather(parts, mine)
        whole.append(torch.cat(parts))
    if rank == 0:
        torch.save(torch.cat(whole), out)
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 3])
def test_several_processes_see_what_one_sees(ranks: int, pictures: Path, tmp_path: Path) -> None:
    (pictures / "cats" / "1.jpg").write_bytes(b"not a picture")  # each rank finds out for itself
    mp.spawn(_gather, (ranks, str(pictures), str(tmp_path / "all.pt")), nprocs=ranks)
    alone = torch.cat(_batches(str(pictures), 0, 1))
    assert torch.equal(torch.load(tmp_path / "all.pt"), alone)


def test_accumulation_and_resuming_change_nothing(pictures: Path) -> None:
    alone = torch.cat(_batches(str(pictures), 0, 1))
    for parts in (4, 5):
        assert torch.equal(torch.cat(_batches(str(pictures), 0, 1, accumulation_steps=parts)), alone)
    assert torch.equal(torch.cat(_batches(str(pictures), 0, 1, start=3)), alone[3 * BATCH :])


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="does not divide among 3 ranks"):
        BatchShard(8, world_size=3)
