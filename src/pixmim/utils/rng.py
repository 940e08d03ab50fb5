"""Stateless random numbers: functions of (seed, stream, epoch or step, index).

Without state there is nothing to save in a checkpoint. A run that resumes within an epoch, or distributes its batches
over other threads or machines, computes the same numbers.

Each number is a hash of its coordinates: a counter times the 64-bit golden ratio, through the finalizer of SplitMix64
(Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), vectorized in NumPy.
"""

import zlib

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)
_ROUNDS = 8


def _mix(x: Bits) -> Bits:
    """Apply SplitMix64's finalizer. Multiplication wraps modulo 2^64 on purpose."""
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLY_1
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLY_2
    return x ^ (x >> np.uint64(31))


def _absorb(key: Bits, value: Bits) -> Bits:
    return _mix((key ^ value) * _GOLDEN + _GOLDEN)


def bits(seed: int, stream: str, epoch: npt.ArrayLike, indices: npt.ArrayLike, count: int) -> Bits:
    """Return uniform 64-bit integers of shape (len(indices), count).

    Args:
        seed: Seed of the run.
        stream: Purpose, such as "order", "crop" or "mask": streams of one seed share no numbers.
        epoch: One for all rows, or one for each.
        indices: Index of each row, which depends on no other row.
        count: Numbers per row.
    """
    key = np.zeros(1, np.uint64)
    for word in (np.uint64(seed % 2**64), np.uint64(zlib.crc32(stream.encode())), epoch, indices):
        key = _absorb(key, np.asarray(word).astype(np.uint64))
    return _absorb(key[:, None], np.arange(count, dtype=np.uint64))


def uniform(
    seed: int, stream: str, epoch: npt.ArrayLike, indices: npt.ArrayLike, count: int
) -> npt.NDArray[np.float64]:
    """Return uniform numbers in [0, 1), multiples of 2^-53, with the arguments of `bits`."""
    return np.multiply(bits(seed, stream, epoch, indices, count) >> np.uint64(11), 2.0**-53, dtype=np.float64)


def uniform32(
    seed: int, stream: str, epoch: npt.ArrayLike, indices: npt.ArrayLike, count: int
) -> npt.NDArray[np.float32]:
    """Return the numbers of `uniform` in single precision, still below 1, to which one of 2^25 would be rounded."""
    u = uniform(seed, stream, epoch, indices, count).astype(np.float32)
    return np.minimum(u, np.nextafter(np.float32(1), np.float32(0)))


def key(seed: int, stream: str, epoch: int) -> int:
    """Return a seed of 63 bits for another library's generator."""
    return int(bits(seed, stream, epoch, [0], 1)[0, 0] >> np.uint64(1))


def shuffled(
    seed: int, stream: str, epoch: npt.ArrayLike, count: npt.ArrayLike, places: npt.ArrayLike, part: npt.ArrayLike = 0
) -> npt.NDArray[np.int64]:
    """Return the entries at some positions of a random permutation of 0 .. count - 1, without computing the others.

    Each (seed, stream, epoch, part) has its own permutation: a Feistel network over pairs (l, r) of numbers below a
    and b, a b >= count. Each round adds to one number a hash of the other (Black and Rogaway, "Ciphers with arbitrary
    finite domains", CT-RSA 2002). Results of count or more pass through the network again.

    Args:
        seed: Seed of the run.
        stream: Purpose, as for `bits`.
        epoch: One for all positions, or one for each; likewise `count` and `part`.
        count: Length of the permutation.
        places: Positions (n).
        part: Number of the permutation within the epoch.
    """
    x = np.array(places, np.uint64)
    n = np.broadcast_to(np.asarray(count, np.uint64), x.shape)
    keys = np.broadcast_to(bits(seed, stream, epoch, part, _ROUNDS), (len(x), _ROUNDS))
    a = np.ceil(np.sqrt(n.astype(np.float64))).astype(np.uint64)
    b = (n + a - np.uint64(1)) // a
    pending = np.arange(len(x))  # rows that are not below their count yet
    while len(pending):
        x[pending] = _network(x[pending], a[pending], b[pending], keys[pending])
        pending = pending[x[pending] >= n[pending]]
    return x.astype(np.int64)


def permutation(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """Return the full order of an epoch over `count` samples."""
    return shuffled(seed, "order", epoch, count, np.arange(count))


def _network(x: Bits, a: Bits, b: Bits, keys: Bits) -> Bits:
    l, r = x // b, x % b  # noqa: E741 (names of a Feistel network)
    for i in range(0, _ROUNDS, 2):
        l = (l + _absorb(keys[:, i], r) % a) % a  # noqa: E741
        r = (r + _absorb(keys[:, i + 1], l) % b) % b
    return l * b + r
