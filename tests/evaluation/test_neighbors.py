"""Nearest images by features, compared with loops in float64."""

import numpy as np
import pytest
import torch

from pixmim.evaluation import neighbors
from pixmim.evaluation.neighbors import most_similar_pairs, nearest, nearest_others


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(50, 6, generator=torch.Generator().manual_seed(3))


def cosines(features: torch.Tensor) -> np.ndarray:
    unit = features.double().numpy()
    unit = unit / np.sqrt((unit**2).sum(axis=1, keepdims=True))
    return np.asarray([[float((a * b).sum()) for b in unit] for a in unit])


def test_nearest_are_those_of_a_loop(features: torch.Tensor) -> None:
    values, indices = nearest(features, features[:7], 5)
    for row, expected in enumerate(cosines(features)[:7]):
        order = np.argsort(-expected)[:5]
        assert indices[row].tolist() == order.tolist()
        np.testing.assert_allclose(values[row].numpy(), expected[order], atol=1e-6)


def test_more_neighbors_than_images_gives_all(features: torch.Tensor) -> None:
    assert nearest(features[:3], features[:1], 10)[1].shape == (1, 3)


def test_nearest_other_is_never_the_image_itself(features: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "_BLOCK", 8)
    done: list[int] = []
    similarity, index = nearest_others(features, done.append)
    expected = cosines(features)
    np.fill_diagonal(expected, -2)
    assert index.tolist() == expected.argmax(axis=1).tolist()
    np.testing.assert_allclose(similarity.numpy(), expected.max(axis=1), atol=1e-6)
    assert done == [8, 16, 24, 32, 40, 48, 50]
    with pytest.raises(ValueError, match="at least two"):
        nearest_others(features[:1])


def test_pairs_are_listed_once_from_the_most_similar_on() -> None:
    similarity, index = torch.tensor([0.9, 0.9, 0.5, 0.95]), torch.tensor([1, 0, 1, 2])
    pairs = most_similar_pairs(similarity, index, 10)
    assert [(i, j) for i, j, _ in pairs] == [(2, 3), (0, 1), (1, 2)]
    assert [round(value, 3) for *_, value in pairs] == [0.95, 0.9, 0.5]
    assert len(most_similar_pairs(similarity, index, 2)) == 2
