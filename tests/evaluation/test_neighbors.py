"""Nearest images by features, compared with loops in float64."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

import pixmim
from helpers.runs import train
from pixmim.config import PretrainConfig
from pixmim.evaluation import neighbors
from pixmim.evaluation.frozen_encoder import FrozenEncoder, load_frozen_encoder
from pixmim.evaluation.neighbors import Index, load_index, most_similar_pairs, nearest, nearest_others
from pixmim.utils.errors import UserError


@pytest.fixture
def features() -> torch.Tensor:
    return F.normalize(torch.randn(50, 6, generator=torch.Generator().manual_seed(3)), dim=1)


def cosines(features: torch.Tensor) -> np.ndarray:
    unit = features.double().numpy()
    unit = unit / np.sqrt((unit**2).sum(axis=1, keepdims=True))
    return np.asarray([[float((a * b).sum()) for b in unit] for a in unit])


def test_nearest_are_those_of_a_loop(features: torch.Tensor) -> None:
    values, indices = nearest(features, 3 * features[:7], 5)
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


@pytest.fixture(scope="session")
def encoders(tiny_run: Callable[..., PretrainConfig], tmp_path_factory: pytest.TempPathFactory) -> list[FrozenEncoder]:
    """Return the trained and the untrained encoder of a run."""
    run = tmp_path_factory.mktemp("index") / "run"
    train(tiny_run(), run)
    return [load_frozen_encoder(str(run), device="cpu", untrained=untrained) for untrained in (False, True)]


def test_index_is_kept_and_renewed_when_encoder_or_images_change(encoders: list[FrozenEncoder], tmp_path: Path) -> None:
    file = tmp_path / "index.safetensors"

    def load(encoder: FrozenEncoder, count: int = 30) -> tuple[Index, bool]:
        """Return the index, and whether it was computed."""
        calls: list[int] = []
        data = pixmim.open_dataset(f"shapes:count={count},size=32", encoder.image_spec)
        return load_index(file, encoder, data, lambda done, total: calls.append(done)), bool(calls)

    first, computed = load(encoders[0])
    again, recomputed = load(encoders[0])
    assert computed and not recomputed and torch.equal(first.unit, again.unit)
    assert first.unit.norm(dim=1).tolist() == pytest.approx([1.0] * 30, abs=1e-5)
    assert torch.equal(nearest_others(first.unit)[1], again.nearest)
    assert [index for index, _ in first.query(first.unit[4:5], 3, without=4)] != [4] and len(first.outliers(5)) == 5
    other, recomputed = load(encoders[1])
    assert recomputed and not torch.equal(other.unit, first.unit)
    assert load(encoders[0], count=20)[1]
    file.write_bytes(b"damaged")
    assert torch.equal(load(encoders[0])[0].unit, first.unit)
    with safe_open(file, "pt") as saved:
        identity, tensors = saved.metadata(), {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
    for unit in (torch.tensor(1.0), first.unit.long(), first.unit * torch.nan, first.unit[1:]):
        save_file(tensors | {"unit": unit.contiguous()}, file, identity)
        again, recomputed = load(encoders[0])
        assert recomputed and torch.equal(again.unit, first.unit)
    with pytest.raises(UserError, match="fewer than two"):
        load(encoders[0], count=1)
