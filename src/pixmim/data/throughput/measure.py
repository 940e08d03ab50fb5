"""What this machine does with somebody's images, in images a second: the disk, the decoding, the crop, the Loader."""

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from time import perf_counter

import numpy as np
from torch import Tensor

from pixmim.data.build_resized_cache import make_cache
from pixmim.data.caching import SHARE, decoded_bytes, of_machine
from pixmim.data.dataset import BadImage, Placed, Source
from pixmim.data.in_memory import Kept
from pixmim.data.resized_cache import Kind, open_cache
from pixmim.data.shards.dataset import ShardDataset
from pixmim.data.throughput.subset import Subset
from pixmim.data.throughput.timing import Extent, forget, loader_rate, rate, read
from pixmim.transforms.crops import Crop
from pixmim.utils import rng
from pixmim.utils.errors import UserError
from pixmim.utils.threads import how_many

MANY = 4
"""Times as many threads as asked for, to see whether a disk would give more to more of them."""

_SAMPLE = 16, 1024  # images, at least and at most
_CACHED = 256  # of them, at most, in a cache that is tried out
_HELD = 64  # of them, at most, on which the crop is tried out,
_HELD_BYTES = 2**28  # with so many bytes at most


@dataclass(frozen=True)
class Disk:
    """Reading alone, in images a second.

    bytes  of an image, on average
    first  after the system was asked to drop the files from its memory
    many   the same with MANY times as many threads
    again  from the system's memory
    """

    bytes: float
    first: float
    many: float
    again: float


@dataclass(frozen=True)
class Cached:
    """A cache of some of the sample: bytes of an image; images a second while it is made, and from the Loader."""

    bytes: float
    made: float
    loader: float


@dataclass(frozen=True)
class Rates:
    """Images a second on `threads` threads of a machine with `cores` cores and `memory` bytes.

    images, sample, bad  in the data set; of them used; of those unreadable
    example       an unreadable one, with the reason
    disk          None for images that do not lie in files on this machine
    decode        reading, mostly from the system's memory, and decoding, on one thread
    decode_all    the same on all threads
    crop          crops of decoded images, on one thread
    loader_first  batches as in training, of files that the system was asked to drop from its memory
    loader        batches as in training, of files in the system's memory
    caches        of the sample, in the system's memory: "jpeg" (4:4:4, quality 95) and "raw", as far as they make sense
    kept          batches of images that are kept decoded in memory, as a small cache's are
    decoded       bytes of an image that is kept so
    keeps         whether training keeps these images so without being asked
    """

    images: int
    sample: int
    bad: int
    example: str
    threads: int
    cores: int
    memory: int
    disk: Disk | None
    decode: float
    decode_all: float
    crop: float
    loader_first: float | None
    loader: float
    caches: dict[Kind, Cached]
    kept: float
    decoded: float
    keeps: bool


def measure(
    source: Source,
    crop: Crop,
    cover: tuple[int, int],
    *,
    threads: int = 0,
    seconds: float = 1.0,
    tell: Callable[[str], None] = lambda what: None,
) -> Rates:
    """Measure all of Rates, in about 35 turns; always on the same sample.

    cover    (h, w) that the images of a cache would just cover
    threads  0: as many as the Loader takes
    seconds  that a turn takes at most
    tell     is told what comes next

    Raises UserError if most of the sample cannot be read.
    """
    threads = how_many(threads)
    tell("a first look")
    sample = _sample(source, threads * seconds)
    extents: list[Extent] = []
    if isinstance(source, Placed) and source.pieces is None:  # in files on this machine
        extents = [source.extent(index) for index in sample]
    disk = None
    if extents:
        tell("the disk")
        disk = Disk(
            bytes=statistics.fmean(read(extent) for extent in extents),
            first=rate(read, lambda: _dropped(extents), threads, seconds),
            many=rate(read, lambda: _dropped(extents), MANY * threads, seconds),
            again=rate(read, lambda: cycle(extents), threads, seconds),
        )

    tell("decoding")
    decoder = _Decoder(source)
    decode_all = rate(decoder, lambda: cycle(sample), threads, seconds)
    decode = rate(decoder, lambda: cycle(sample), 1, seconds)
    if 2 * len(decoder.bad) > len(decoder.seen):
        raise UserError(f"{len(decoder.bad)} of {len(decoder.seen)} images cannot be read, such as {decoder.example}")

    tell("the crop")
    numbers = rng.uniform(0, "crop", 0, range(len(decoder.held)), crop.draws).tolist()
    pairs = list(zip(decoder.held, numbers, strict=True))
    cropped = rate(lambda pair: crop.crop(*pair), lambda: cycle(pairs), 1, seconds)

    tell("the loader")
    part = Subset(source, [index for index in sample if index not in decoder.bad])
    loader_first = loader_rate(part, crop, threads, seconds, drop=extents) if extents else None
    loader = loader_rate(part, crop, threads, seconds)

    tell("caches")
    few = Subset(part, range(min(len(part), _CACHED)))
    kept = Kept(few)
    caches: dict[Kind, Cached] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in _kinds(source):
            made = make_cache(few, Path(folder, kind), cover, kind=kind, threads=threads, part=(0, 1))
            cached = open_cache(Path(folder, kind), source.form)
            at = loader_rate(cached, crop, threads, seconds)
            caches[kind] = Cached(made.bytes / made.images, made.images / made.seconds, at)
            kept = Kept(cached)
        decoded = statistics.fmean(kept.image(index).nbytes for index in range(len(kept)))
        from_memory = loader_rate(kept, crop, threads, seconds)
    whole = decoded_bytes(source)
    return Rates(
        images=len(source),
        sample=len(sample),
        bad=len(decoder.bad),
        example=decoder.example,
        threads=threads,
        cores=os.cpu_count() or 1,
        memory=of_machine(),
        disk=disk,
        decode=decode,
        decode_all=decode_all,
        crop=cropped,
        loader_first=loader_first,
        loader=loader,
        caches=caches,
        kept=from_memory,
        decoded=decoded,
        keeps=whole is not None and whole <= SHARE * of_machine(),
    )


class _Decoder:
    """Reads and decodes; remembers what cannot be read, and holds a few images for the crop."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.seen: set[int] = set()
        self.bad: dict[int, str] = {}
        self.held: list[Tensor] = []

    def __call__(self, index: int) -> None:
        self.seen.add(index)
        try:
            image = self._source.image(index)
        except BadImage as error:
            self.bad[index] = str(error)
            return
        if len(self.held) < _HELD and (len(self.held) + 1) * image.nbytes <= _HELD_BYTES:
            self.held.append(image)

    @property
    def example(self) -> str:
        """An image that cannot be read, and why; empty if there is none."""
        return next((f"{self._source.locate(index)}: {reason}" for index, reason in self.bad.items()), "")


def _sample(source: Source, budget: float) -> list[int]:
    """Images at random, the same each time: as many as one thread gets through in `budget` seconds, within bounds.

    Out of few pieces, where a source is read in pieces.
    """
    least, most = (min(bound, len(source)) for bound in _SAMPLE)
    generator = np.random.default_rng(0)
    if source.pieces is None:
        some = generator.choice(len(source), most, replace=False)
    else:
        firsts = np.cumsum(source.pieces) - source.pieces
        pieces = generator.permutation(len(firsts))
        enough = pieces[: np.searchsorted(np.cumsum(source.pieces[pieces]), most) + 1]
        some = np.concatenate([np.arange(firsts[piece], firsts[piece] + source.pieces[piece]) for piece in enough])
        some = generator.permutation(some[:most])
    indices: list[int] = some.tolist()
    trial, began = _Decoder(source), perf_counter()
    for done, index in enumerate(indices, 1):
        trial(index)
        passed = perf_counter() - began
        if passed > budget / 10 or done == least:
            break
    return indices[: max(least, min(most, int(budget * done / passed)))]


def _dropped(extents: Sequence[Extent]) -> Iterator[Extent]:
    for extent in extents:
        forget(extent)
    yield from extents


def _kinds(source: Source) -> list[Kind]:
    """Kinds of caches that would be something else than the source is."""
    if isinstance(source, ShardDataset) and source.sizes is not None:  # it is a cache
        return [] if source.raw else ["raw"]
    pixels, channels = source.form.pixels, source.form.channels
    return ["jpeg", "raw"] if pixels == "uint8" and channels in (1, 3) else ["raw"]
