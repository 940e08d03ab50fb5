import numpy as np

from pixmim import rng


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
    assert ((counts - expected) ** 2 / expected).sum() < 110  # chi-square, 63 degrees: 1 in 5000 lies above
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
