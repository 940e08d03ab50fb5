import math
import zlib

import numpy as np

from pixmim.utils import rng


def test_a_row_depends_on_its_own_coordinates_only() -> None:
    together = rng.uniform(7, "crop", 3, [5, 9, 1], 4)
    for row, index in enumerate([5, 9, 1]):
        assert (rng.uniform(7, "crop", 3, [index], 9)[0, :4] == together[row]).all()
    assert (rng.uniform(7, "crop", [3, 4], [5, 5], 4)[0] == together[0]).all()


def test_every_coordinate_changes_the_numbers() -> None:
    base = rng.uniform(1, "crop", 1, [1], 8)
    others = [(2, "crop", 1, [1]), (1, "mask", 1, [1]), (1, "crop", 2, [1]), (1, "crop", 1, [2])]
    assert all((rng.uniform(*other, 8) != base).all() for other in others)


def test_numbers_are_uniform_and_uncorrelated() -> None:
    u = rng.uniform(0, "test", 0, np.arange(4000), 8)
    assert u.min() >= 0 and u.max() < 1
    counts, _ = np.histogram(u, bins=64, range=(0, 1))
    expected = u.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 110  # chi-square, 63 degrees: exceeded once in 5,000
    flat = u.ravel() - 0.5
    for lag in (1, 8):  # between columns, between rows: the standard error is 0.0056
        assert abs((flat[:-lag] * flat[lag:]).mean() * 12) < 0.025


def test_golden_values_do_not_change_between_versions_or_machines() -> None:
    """A run must resume on another machine: these numbers are a promise."""
    assert rng.bits(0, "order", 0, [0, 1], 1)[:, 0].tolist() == [17807816335083939931, 3496294918068160139]


def test_permutation_holds_every_sample_once_and_differs_between_epochs() -> None:
    first, second = rng.permutation(0, 0, 1000), rng.permutation(0, 1, 1000)
    assert sorted(first) == sorted(second) == list(range(1000))
    assert (first == second).mean() < 0.02


def test_shuffled_is_a_permutation_of_any_count_and_place_by_place() -> None:
    for count in (1, 2, 3, 5, 16, 97, 1000):
        order = rng.permutation(5, 2, count)
        assert sorted(order) == list(range(count))
        some = [count - 1, 0, count // 2]
        assert rng.shuffled(5, "order", 2, count, some).tolist() == order[some].tolist()
    mixed = rng.shuffled(5, "order", [2, 2, 3], [97, 16, 97], [4, 4, 4], [0, 1, 0])
    assert [int(rng.shuffled(5, "order", e, n, [4], p)[0]) for e, n, p in ((2, 97, 0), (2, 16, 1), (3, 97, 0))] == [
        *mixed
    ]


def test_shuffled_puts_everything_everywhere_evenly() -> None:
    """Positions and successors of seven items in 2,100 epochs: chi-square against chance."""
    orders = np.stack([rng.permutation(3, epoch, 7) for epoch in range(2100)])
    where = np.stack([np.bincount(orders[:, place], minlength=7) for place in range(7)])
    assert ((where - 300) ** 2 / 300).sum() < 75  # 36 degrees of freedom: exceeded once in 8,000
    pairs = np.bincount(orders[:, 0] * 7 + orders[:, 1], minlength=49).reshape(7, 7)
    expected = np.where(np.eye(7), 0.0, 2100 / 42)
    assert pairs.diagonal().sum() == 0
    assert ((pairs - expected) ** 2 / np.where(np.eye(7), np.inf, expected)).sum() < 80  # 41: 1 in 4,000


def test_shuffled_follows_its_definition() -> None:
    """Against Python integers, one position at a time."""
    wrap, golden = 2**64, 0x9E3779B97F4A7C15

    def absorb(key: int, value: int) -> int:
        x = ((key ^ value) * golden + golden) % wrap
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % wrap
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % wrap
        return x ^ (x >> 31)

    def place(seed: int, stream: bytes, epoch: int, count: int, x: int) -> int:
        key = 0
        for word in (seed, zlib.crc32(stream), epoch, 0):
            key = absorb(key, word)
        keys = [absorb(key, i) for i in range(8)]
        a = math.isqrt(count - 1) + 1
        b = -(-count // a)
        while True:
            left, right = divmod(x, b)
            for i in range(0, 8, 2):
                left = (left + absorb(keys[i], right) % a) % a
                right = (right + absorb(keys[i + 1], left) % b) % b
            x = left * b + right
            if x < count:
                return x

    for count in (10, 1_000_003, 3 * 10**10):
        places = [0, 1, count // 3, count - 1]
        assert rng.shuffled(9, "order", 4, count, places).tolist() == [place(9, b"order", 4, count, p) for p in places]
