"""Erasing, mixup, CutMix and soft labels against slow forms and timm's targets."""

import math

import numpy as np
import pytest
import torch
from timm.data.mixup import mixup_target
from torch.nn import functional as F

from pixmim.transforms.mixup import cut_box, erase, erased_box, mix, soft_labels


def images(count: int = 8, size: tuple[int, int] = (24, 32)) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1)) + 10


def test_erasing_makes_boxes_of_noise() -> None:
    before = images(400)
    after = erase(before.clone(), 0.25, seed=3, number=5)
    changed = (after != before).any(dim=1)
    hit = changed.flatten(1).any(dim=1)
    assert 0.18 < float(hit.float().mean()) < 0.32
    areas = []
    for mask, new in zip(changed[hit], after[hit], strict=True):
        rows, columns = mask.any(dim=1).nonzero(), mask.any(dim=0).nonzero()
        box = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
        assert mask[box].all()
        areas.append(float(mask.float().mean()))
        assert new[:, *box].abs().max() < 6  # of deviation 1 around 0, no longer around 10
    assert min(areas) > 0.01 and max(areas) < 0.37 and np.mean(areas) == pytest.approx(0.17, abs=0.03)


def test_erasing_is_a_function_of_seed_and_number() -> None:
    one, same = (erase(images(50), 0.5, seed=3, number=5) for _ in range(2))
    assert torch.equal(one, same)
    assert not torch.equal(one, erase(images(50), 0.5, seed=3, number=6))
    assert torch.equal(erase(images(50), 0.0, seed=3, number=5), images(50))


def test_a_box_to_erase_by_hand() -> None:
    u = [0.0] * 22
    u[0], u[1], u[20], u[21] = 0.5, 0.5, 0.999, 0.0
    side = round(math.sqrt(100 * 80 * (0.02 + 1 / 3) / 2))  # a square: the middle of the log-uniform aspects is 1
    assert erased_box((100, 80), u) == (100 - side, 0, side, side)
    u = [0.999, 0.999] * 11  # a third of the area at 3.3 : 1 does not fit, ten times
    assert erased_box((20, 80), u) is None


def test_mixup_sums() -> None:
    x = images()
    results = [mix(x, 0.8, 0.0, seed=0, number=n) for n in range(300)]
    for mixed, share in results[:20]:
        torch.testing.assert_close(mixed, x * share + x.flip(0) * (1 - share))
    shares = np.asarray([share for _, share in results])
    assert shares.mean() == pytest.approx(0.5, abs=0.05)
    assert shares.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.01)  # of Beta(a, a)


def test_cutmix_counts_pixels() -> None:
    x = images()
    for n in range(40):
        mixed, share = mix(x, 0.0, 1.0, seed=0, number=n)
        own = (mixed == x).all(dim=1)
        other = (mixed == x.flip(0)).all(dim=1)
        assert (own ^ other).all()
        assert float(own[0].float().mean()) == pytest.approx(share)
    assert torch.equal(x, images())


def test_cut_box_by_hand() -> None:
    assert cut_box((100, 60), 0.75, [0.5, 0.5]) == (25, 15, 50, 30)
    assert cut_box((100, 60), 0.75, [0.0, 0.99]) == (0, 44, 25, 16)
    assert cut_box((100, 60), 1.0, [0.5, 0.5])[2:] == (0, 0)


def test_both_take_half_of_the_batches_each() -> None:
    x = images()
    cut = 0
    for n in range(300):
        mixed, share = mix(x, 0.8, 1.0, seed=1, number=n)
        again, same = mix(x, 0.8, 1.0, seed=1, number=n)
        assert torch.equal(mixed, again) and share == same
        cut += bool(torch.equal(mixed, x) or (mixed == x).any())
    assert 120 < cut < 180
    assert mix(x, 0.0, 0.0, seed=1, number=0) == (x, 1.0)


@pytest.mark.parametrize(("share", "smoothing"), [(1.0, 0.0), (0.3, 0.0), (1.0, 0.1), (0.7, 0.1)])
def test_soft_labels_are_timms(share: float, smoothing: float) -> None:
    labels = torch.tensor([0, 3, 1, 1, 2])
    targets = soft_labels(labels, 4, share, smoothing)
    torch.testing.assert_close(targets, mixup_target(labels, 4, share, smoothing))
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(5))
    if share == 1:
        scores = torch.randn(5, 4)
        torch.testing.assert_close(
            F.cross_entropy(scores, targets), F.cross_entropy(scores, labels, label_smoothing=smoothing)
        )
