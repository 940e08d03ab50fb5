"""Randomness as a function: (seed, stream, epoch or step, index) -> numbers.

Nothing here has a state, so there is nothing to save in a checkpoint: a run that resumes in the middle of an epoch,
or spreads its batch over other threads or machines, computes the very numbers it would have computed.

Each number is a hash of its coordinates: a counter times the 64-bit golden ratio, through the finaliser of
SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), vectorised in NumPy.
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
    """SplitMix64's finaliser: every input bit moves every output bit. Multiplication wraps modulo 2^64 on purpose."""
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLY_1
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLY_2
    return x ^ (x >> np.uint64(31))


def _absorb(key: Bits, value: Bits) -> Bits:
    return _mix((key ^ value) * _GOLDEN + _GOLDEN)


def bits(seed: int, stream: str, epoch: npt.ArrayLike, indices: npt.ArrayLike, count: int) -> Bits:
    """Uniform 64-bit integers of shape (len(indices), count); row i depends on nothing but its own epoch and index.

    `stream` names the purpose ("order", "crop", "mask"), so that two uses of one seed share no numbers. `epoch` is
    one for all rows, or one for each.
    """
    key = np.zeros(1, np.uint64)
    for word in (np.uint64(seed % 2**64), np.uint64(zlib.crc32(stream.encode())), epoch, indices):
        key = _absorb(key, np.asarray(word).astype(np.uint64))
    return _absorb(key[:, None], np.arange(count, dtype=np.uint64))


def uniform(
    seed: int, stream: str, epoch: npt.ArrayLike, indices: npt.ArrayLike, count: int
) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1) of shape (len(indices), count), multiples of 2^-53."""
    return np.multiply(bits(seed, stream, epoch, indices, count) >> np.uint64(11), 2.0**-53, dtype=np.float64)


def key(seed: int, stream: str, epoch: int) -> int:
    """A seed, of 63 bits, for a generator of another library."""
    return int(bits(seed, stream, epoch, [0], 1)[0, 0] >> np.uint64(1))


def shuffled(
    seed: int, stream: str, epoch: npt.ArrayLike, count: npt.ArrayLike, places: npt.ArrayLike, part: npt.ArrayLike = 0
) -> npt.NDArray[np.int64]:
    """Which of `count` things stands at each place of a random order: int64, of the shape of `places` (1-d).

    For each (seed, stream, epoch, part) a permutation of 0 .. count - 1, of which only what is asked for is computed:
    a hundred million things cost no more than ten. `epoch`, `count` and `part` are one for all places, or one for each.

    A Feistel network over pairs (l, r) of numbers below a and b, a b >= count, whose rounds add to one number a hash of
    the other (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002); what falls beyond count - 1
    goes through it again until it does not.
    """
    x = np.array(places, np.uint64)
    n = np.broadcast_to(np.asarray(count, np.uint64), x.shape)
    keys = np.broadcast_to(bits(seed, stream, epoch, part, _ROUNDS), (len(x), _ROUNDS))
    a = np.ceil(np.sqrt(n.astype(np.float64))).astype(np.uint64)
    b = (n + a - np.uint64(1)) // a
    left = np.arange(len(x))  # rows that are not below their count yet
    while len(left):
        x[left] = _network(x[left], a[left], b[left], keys[left])
        left = left[x[left] >= n[left]]
    return x.astype(np.int64)


def permutation(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """The whole order of one epoch over `count` samples: int64 (count,)."""
    return shuffled(seed, "order", epoch, count, np.arange(count))


def _network(x: Bits, a: Bits, b: Bits, keys: Bits) -> Bits:
    l, r = x // b, x % b  # noqa: E741 (Feistel's own names)
    for i in range(0, _ROUNDS, 2):
        l = (l + _absorb(keys[:, i], r) % a) % a  # noqa: E741
        r = (r + _absorb(keys[:, i + 1], l) % b) % b
    return l * b + r
