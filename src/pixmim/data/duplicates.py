"""Find images with the same bytes, and near-duplicates by a perceptual hash."""

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np
from jaxtyping import Bool, Int, Shaped

from pixmim.data.dataset import BadImage, HasBytes, HasExtent, ImageDataset
from pixmim.transforms.crops import Array

MAX_DISTANCE = 30
"""Bits out of 512 in which near-duplicates may differ; docs/my-images.md has the measurements."""

_SIDE = 17  # of the thumbnails, whose neighbors are compared
_BLOCK = 512  # images whose distances to all others are in memory at once


def perceptual_hash(image: Shaped[Array, "h w c"]) -> Bool[Array, " 512"]:
    """Hash an image: the signs of the differences of neighboring pixels in a gray thumbnail.

    The thumbnail is 17 x 17, by averaging. The hash does not depend on brightness, contrast or size, and little on
    compression.
    """
    sums = image.sum(axis=2, dtype=np.float32)
    for axis in (0, 1):
        length = sums.shape[axis]
        edges = np.arange(_SIDE) * length // _SIDE
        counts = np.maximum(1, np.diff(edges, append=length)).astype(np.float32)
        sums = np.add.reduceat(sums, edges, axis=axis) / (counts[:, None] if axis == 0 else counts)
    inner = sums[:-1, :-1]
    return np.concatenate([(sums[:-1, 1:] > inner).ravel(), (sums[1:, :-1] > inner).ravel()])


def group_duplicates(hashes: Bool[Array, "n bits"], max_distance: int = MAX_DISTANCE) -> list[list[int]]:
    """Group images whose hashes differ from that of the first image of the group in at most `max_distance` bits.

    Compares all n^2 / 2 pairs, with the distances of 512 images in memory at once.

    Args:
        hashes: A hash for each image.
        max_distance: Bits that may differ.

    Returns:
        Groups of at least two indices, in increasing order. An image is in the group of the first that it matches.
    """
    signs = np.where(hashes, np.float32(1), np.float32(-1))  # a product of two is the bits minus twice the distance
    least = hashes.shape[1] - 2 * max_distance
    groups: dict[int, list[int]] = {}
    is_first = np.ones(len(signs), np.bool_)
    for start in range(0, len(signs), _BLOCK):
        near = signs[start : start + _BLOCK] @ signs[: start + _BLOCK].T >= least
        for index, row in enumerate(near, start):
            matches = np.flatnonzero(row[:index] & is_first[:index])
            if len(matches):
                is_first[index] = False
                groups.setdefault(int(matches[0]), []).append(index)
    return [[first, *others] for first, others in sorted(groups.items())]


def number_equal_images(data: ImageDataset) -> Int[Array, " n"]:
    """Return a number for each image (n): the index of the first image with the same bytes.

    Of images in files, only those whose files have the same size are read, and the copies in a mixture are not. Images
    that are unreadable, at a URL or synthetic count as different.
    """
    numbers, sizes = np.arange(len(data)), file_sizes(data)
    _, inverse, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    same_place: dict[tuple[int, int], int] = {}
    for index in range(len(data)):
        source, inside = data.locate(index)
        numbers[index] = same_place.setdefault((id(source), inside), index)
    candidates = (sizes < 0) | ((sizes > 0) & (counts[inverse] > 1))
    same_bytes: dict[bytes, int] = {}
    for index, content in digests(data, np.flatnonzero(candidates & (numbers == np.arange(len(data)))).tolist()):
        numbers[index] = same_bytes.setdefault(content, index)
    return numbers[numbers]


def file_sizes(data: ImageDataset) -> Int[Array, " n"]:
    """Return the bytes of each image (n): 0 if it is remote, missing or not encoded, -1 if only reading shows them."""
    sizes = np.zeros(len(data), np.int64)
    for index in range(len(data)):
        source, inside = data.locate(index)
        if isinstance(source, HasExtent):
            with suppress(OSError, ValueError):
                sizes[index] = sum(
                    0 if "://" in file else length or os.stat(file).st_size
                    for file, _, length in source.extents(inside)
                )
        elif isinstance(source, HasBytes):
            sizes[index] = -1
    return sizes


def digests(data: ImageDataset, indices: Sequence[int], max_bytes: float = math.inf) -> Iterator[tuple[int, bytes]]:
    """Yield each index with a hash of the image's bytes, except for images that are not encoded or cannot be read.

    Ends after `max_bytes`.
    """
    for index in indices:
        if max_bytes <= 0:
            return
        source, inside = data.locate(index)
        if isinstance(source, HasBytes):
            with suppress(BadImage):
                content = source.read(inside)
                max_bytes -= len(content)
                yield index, hashlib.sha256(content).digest()
