"""Test the synthetic dataset."""

import numpy as np
import pytest

from pixmim.data.dataset import ImageSpec
from pixmim.data.synthetic import SHAPES, TEXTURES, SyntheticShapes
from pixmim.utils.errors import UserError


def test_a_sample_is_a_function_of_seed_and_index() -> None:
    one, same, other = (
        SyntheticShapes(seed=3).sample(7),
        SyntheticShapes(seed=3, count=9).sample(7),
        SyntheticShapes(seed=4).sample(7),
    )
    assert np.array_equal(one.image, same.image) and one.box == same.box
    assert one.image.shape != other.image.shape or not np.array_equal(one.image, other.image)
    assert SyntheticShapes(count=5).sample(10**9).image.dtype == np.uint8  # endless


def test_labels_boxes_and_masks_match_the_image() -> None:
    data = SyntheticShapes(count=300, size=48)
    shapes, textures = data.labels, data.texture_labels
    for i in range(300):
        sample = data.sample(i)
        assert (sample.shape, sample.texture) == (shapes[i], textures[i])
        h, w, _ = sample.image.shape
        assert min(h, w) == 48 and max(h, w) <= 64 and sample.mask.shape == (h, w)
        left, top, right, bottom = sample.box
        inside = sample.mask[top:bottom, left:right]
        assert inside.sum() == sample.mask.sum() > 0.04 * 48 * 48
        assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))


def test_shapes_and_textures_are_uniform_and_independent() -> None:
    data = SyntheticShapes(count=20_000)
    for labels, names in ((data.labels, SHAPES), (data.texture_labels, TEXTURES)):
        counts = np.bincount(labels, minlength=len(names))
        assert len(counts) == 10 and abs(counts - 2000).max() < 200
    joint = np.histogram2d(data.labels, data.texture_labels, bins=10)[0]
    assert abs(joint - 200).max() < 70  # independent


def test_texture_modes() -> None:
    match, conflict = SyntheticShapes(count=500, texture="match"), SyntheticShapes(count=500, texture="conflict")
    assert np.array_equal(match.labels, match.texture_labels)
    assert not (conflict.labels == conflict.texture_labels).any()
    assert len(np.unique(conflict.texture_labels)) == 10


def test_masks_identify_shapes() -> None:
    """Masks of one shape overlap more than those of different shapes, once centered and scaled."""
    data = SyntheticShapes(count=400, size=64)
    masks: dict[int, list[np.ndarray]] = {}
    for i in range(400):
        sample = data.sample(i)
        left, top, right, bottom = sample.box
        cut = sample.mask[top:bottom, left:right]
        rows = np.linspace(0, cut.shape[0] - 1, 24).round().astype(int)
        columns = np.linspace(0, cut.shape[1] - 1, 24).round().astype(int)
        masks.setdefault(sample.shape, []).append(cut[np.ix_(rows, columns)].astype(float))
    means = np.stack([np.mean(masks[k], axis=0) for k in range(10)])
    guesses = [[int(np.argmin(((means - m) ** 2).sum(axis=(1, 2)))) == k for m in masks[k]] for k in range(10)]
    assert min(np.mean(g) for g in guesses) > 0.6


def test_spec_round_trip() -> None:
    data = SyntheticShapes.from_spec("shapes:count=30,seed=5,size=32,texture=conflict")
    assert data.spec == SyntheticShapes(30, 5, 32, "conflict").spec == SyntheticShapes.from_spec(data.spec).spec
    assert (data.count, data.seed, data.size, data.texture) == (30, 5, 32, "conflict")
    assert SyntheticShapes.from_spec("shapes:").count == 20_000
    assert len(SyntheticShapes.from_spec("shapes:count=1000000000000")) == 10**12  # labels are computed lazily
    assert SyntheticShapes.from_spec("shapes:", ImageSpec(1)).image(0).shape[0] == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("shapes:cuont=3", "did you mean 'count'"),
        ("shapes:count=3,count=4", "count= 2 times"),
        ("shapes:count=", "no value for count="),
        ("shapes:count=many", "shapes:count must be"),
        ("shapes:size=2", "shapes:size must be .* from 8 to 4,096"),
        ("shapes:texture=soft", "shapes:texture must be one of 'any', 'match'"),
    ],
)
def test_invalid_options_are_named(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SyntheticShapes.from_spec(spec)
