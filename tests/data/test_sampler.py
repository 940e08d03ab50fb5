"""The order of an epoch: every image once, near pieces together, and known without the whole."""

from itertools import pairwise

import numpy as np
import pytest

from pixmim.data.sampler import WINDOW, ShuffledOrder
from pixmim.utils import rng

PIECES = np.asarray([7, 1, 30, 12, 5] * 9 + [3])  # 46 pieces in three windows


def test_without_pieces_it_is_one_permutation() -> None:
    assert ShuffledOrder(3, 100).at(2, np.arange(100)).tolist() == rng.permutation(3, 2, 100).tolist()
    assert ShuffledOrder(3, 100).upcoming_shards(2, 50) == []


def test_with_pieces_every_image_comes_once_an_epoch_window_by_window() -> None:
    count, ends = int(PIECES.sum()), np.cumsum(PIECES)
    order = ShuffledOrder(3, count, PIECES)
    seen = []
    for epoch in range(3):
        found = order.at(epoch, np.arange(count))
        assert sorted(found) == list(range(count))
        pieces = np.searchsorted(ends, found, side="right")
        first = {int(piece): int(np.flatnonzero(pieces == piece)[0]) for piece in np.unique(pieces)}
        last = {int(piece): int(np.flatnonzero(pieces == piece)[-1]) for piece in np.unique(pieces)}
        # The pieces of a window are over before the next window begins.
        shuffled = rng.shuffled(3, "shard_sizes", epoch, len(PIECES), np.arange(len(PIECES))).tolist()
        windows = [shuffled[k : k + WINDOW] for k in range(0, len(shuffled), WINDOW)]
        for one, two in pairwise(windows):
            assert max(last[piece] for piece in one) < min(first[piece] for piece in two)
            assert order.upcoming_shards(epoch, first[one[0]]) == one + two
        # In the last window the next epoch's first one is asked for.
        ahead = rng.shuffled(3, "shard_sizes", epoch + 1, len(PIECES), np.arange(WINDOW)).tolist()
        assert order.upcoming_shards(epoch, count - 1) == list(dict.fromkeys(windows[-1] + ahead))
        seen.append(found.tolist())
    assert seen[0] != seen[1] != seen[2]


def test_images_of_a_window_are_mixed() -> None:
    order = ShuffledOrder(0, 1600, np.full(16, 100))
    pieces = order.at(0, np.arange(1600)) // 100
    share = (pieces[1:] == pieces[:-1]).mean()
    assert 0.03 < share < 0.1  # a sixteenth of neighbours are of one piece


def test_a_place_is_known_by_itself() -> None:
    order, whole = ShuffledOrder(3, int(PIECES.sum()), PIECES), ShuffledOrder(3, int(PIECES.sum()), PIECES)
    together = whole.at(1, np.arange(PIECES.sum()))
    for place in (400, 0, 17, 250):
        assert order.at(1, [place]).tolist() == [together[place]]


def test_a_hundred_million_images_need_no_memory() -> None:
    far = ShuffledOrder(0, 10**8, np.full(50_000, 2_000))
    found = far.at(7, np.arange(10**8 - 1000, 10**8))
    assert len(set(found.tolist())) == 1000 and found.min() >= 0 and found.max() < 10**8


def test_shards_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match=r"98 .*100"):
        ShuffledOrder(0, 100, np.asarray([90, 8]))
