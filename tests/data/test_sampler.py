"""Test the order of an epoch: each image once, shard by shard, each position independent of the others."""

from itertools import pairwise

import numpy as np
import pytest

from pixmim.data.sampler import WINDOW, BatchShard, ShuffledOrder
from pixmim.utils import rng

SHARD_SIZES = np.asarray([7, 1, 30, 12, 5] * 9 + [3])  # 46 shards in three windows


def test_without_shards_an_epoch_is_a_permutation() -> None:
    assert ShuffledOrder(3, 100).at(2, np.arange(100)).tolist() == rng.permutation(3, 2, 100).tolist()
    assert ShuffledOrder(3, 100).upcoming_shards(2, 50) == []


def test_with_shards_each_image_occurs_once_per_epoch_window_by_window() -> None:
    count, ends = int(SHARD_SIZES.sum()), np.cumsum(SHARD_SIZES)
    order = ShuffledOrder(3, count, SHARD_SIZES)
    seen = []
    for epoch in range(3):
        found = order.at(epoch, np.arange(count))
        assert sorted(found) == list(range(count))
        shards = np.searchsorted(ends, found, side="right")
        first = {int(shard): int(np.flatnonzero(shards == shard)[0]) for shard in np.unique(shards)}
        last = {int(shard): int(np.flatnonzero(shards == shard)[-1]) for shard in np.unique(shards)}
        # All images of a window precede those of the next window.
        shuffled = rng.shuffled(3, "shard_sizes", epoch, len(SHARD_SIZES), np.arange(len(SHARD_SIZES))).tolist()
        windows = [shuffled[k : k + WINDOW] for k in range(0, len(shuffled), WINDOW)]
        for one, two in pairwise(windows):
            assert max(last[shard] for shard in one) < min(first[shard] for shard in two)
            assert order.upcoming_shards(epoch, first[one[0]]) == one + two
        # The last window prefetches the first window of the next epoch.
        ahead = rng.shuffled(3, "shard_sizes", epoch + 1, len(SHARD_SIZES), np.arange(WINDOW)).tolist()
        assert order.upcoming_shards(epoch, count - 1) == list(dict.fromkeys(windows[-1] + ahead))
        seen.append(found.tolist())
    assert seen[0] != seen[1] != seen[2]


def test_images_of_a_window_are_mixed() -> None:
    order = ShuffledOrder(0, 1600, np.full(16, 100))
    shards = order.at(0, np.arange(1600)) // 100
    share = (shards[1:] == shards[:-1]).mean()
    assert 0.03 < share < 0.1  # a sixteenth of neighbors are in the same shard


def test_a_position_is_computed_independently() -> None:
    order, full = (
        ShuffledOrder(3, int(SHARD_SIZES.sum()), SHARD_SIZES),
        ShuffledOrder(3, int(SHARD_SIZES.sum()), SHARD_SIZES),
    )
    all_indices = full.at(1, np.arange(SHARD_SIZES.sum()))
    for position in (400, 0, 17, 250):
        assert order.at(1, [position]).tolist() == [all_indices[position]]


def test_a_hundred_million_images_need_no_memory() -> None:
    order = ShuffledOrder(0, 10**8, np.full(50_000, 2_000))
    found = order.at(7, np.arange(10**8 - 1000, 10**8))
    assert len(set(found.tolist())) == 1000 and found.min() >= 0 and found.max() < 10**8


@pytest.mark.parametrize(("batch", "ranks", "parts"), [(8, 3, 1), (0, 1, 1), (3, 1, 4), (8, 4, 3)])
def test_a_batch_without_equal_shares_or_with_an_empty_part_is_refused(batch: int, ranks: int, parts: int) -> None:
    with pytest.raises(ValueError, match=f"batch of {batch} into {ranks} x {parts} parts"):
        BatchShard(batch, world_size=ranks, parts=parts)
