"""Near-duplicates are found, and nothing else."""

import io

import numpy as np
from PIL import Image

from pixmim.data.duplicates import MAX_DISTANCE, group_duplicates, perceptual_hash
from pixmim.data.synthetic import SyntheticShapes

SHAPES = SyntheticShapes(40, seed=1, size=96)
IMAGES = [SHAPES.read_array(i) for i in range(40)]


def slow_hash(image: np.ndarray) -> np.ndarray:
    """Compute the hash with loops over blocks of pixels in float64."""
    gray = image.astype(np.float64).sum(axis=2)
    rows, columns = ([i * n // 17 for i in range(18)] for n in gray.shape)
    small = np.asarray(
        [[gray[rows[i] : rows[i + 1], columns[j] : columns[j + 1]].mean() for j in range(17)] for i in range(17)]
    )
    right = [small[i, j + 1] > small[i, j] for i in range(16) for j in range(16)]
    below = [small[i + 1, j] > small[i, j] for i in range(16) for j in range(16)]
    return np.asarray(right + below)


def test_the_hash_equals_a_loop_in_float64() -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 71, 3), np.uint8)
    assert (perceptual_hash(image) == slow_hash(image)).mean() > 0.99  # but for ties by rounding


def test_copies_are_near_and_other_images_far() -> None:
    original = [perceptual_hash(image) for image in IMAGES]
    distances = np.asarray([(a != b).sum() for i, a in enumerate(original) for b in original[:i]])
    assert distances.min() > 2 * MAX_DISTANCE
    buffer = io.BytesIO()
    Image.fromarray(IMAGES[0]).save(buffer, "JPEG", quality=40)
    for copy in (IMAGES[0] // 2, np.asarray(Image.open(buffer)), IMAGES[0].astype(np.float32) / 255):
        assert (perceptual_hash(copy) != original[0]).sum() <= MAX_DISTANCE


def test_images_smaller_than_the_thumbnail_have_a_hash() -> None:
    assert perceptual_hash(np.zeros((3, 5, 1), np.uint8)).shape == (512,)


def test_groups_equal_a_comparison_of_all_pairs() -> None:
    generator = np.random.default_rng(0)
    hashes = generator.random((1_100, 512)) < 0.5  # more than two blocks
    for copy, original in ((700, 3), (1_050, 3), (90, 80), (1_099, 1_000)):
        hashes[copy] = hashes[original]
        hashes[copy, :MAX_DISTANCE] ^= True
    hashes[91] = hashes[80]
    hashes[91, : MAX_DISTANCE + 1] ^= True  # a bit too far from 80, and near to 90, which is in a group already
    assert group_duplicates(hashes) == [[3, 700, 1_050], [80, 90], [1_000, 1_099]]
    assert group_duplicates(hashes[:0]) == [] and group_duplicates(hashes[:1]) == []
