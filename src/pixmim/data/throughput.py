"""Measure how many images per second this machine gets out of a dataset, and what would give more."""

import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from pixmim.data.bad_images import BadImageLog
from pixmim.data.build_resized_cache import make_cache
from pixmim.data.caching import RAM_SHARE, decoded_bytes, total_ram
from pixmim.data.dataset import HasExtent, ImageDataset
from pixmim.data.loader import Loader
from pixmim.data.resized_cache import Kind, open_cache
from pixmim.data.sampler import BatchShard, ShuffledOrder
from pixmim.data.shards.dataset import ShardDataset
from pixmim.data.wrappers import InMemoryDataset, Subset
from pixmim.transforms.crops import Crop
from pixmim.utils.files import open_regular
from pixmim.utils.threads import num_threads

_TURNS = 3  # a rate is the median of these
_SAMPLE = 1024  # most images to measure with
_CACHED = 256  # most of them in a trial cache
_PAGE_CACHE = 0.5  # share of the memory in which files are expected to stay after the first epoch
_FASTER = 1.3  # factor that is worth acting on

DISK, MEMORY, DECODED = "originals, from disk", "originals, from memory", "decoded in memory"

Extent = tuple[str, int, int]
"""File, first byte and number of bytes of an image (0: all that follow)."""


@dataclass(frozen=True)
class Throughput:
    """One way to read the images: its rate in images/s, bytes per image, and how to get it if it is not in use."""

    name: str
    rate: float
    bytes: float | None = None
    advice: str = ""


@dataclass(frozen=True)
class Report:
    """All that was measured.

    Args:
        rows: Throughput of each way.
        current: The way that training takes after the first epoch, as the data is now.
        limit: What limits it.
        sampled: Number of images that were measured with.
        bad: How many of them are unreadable, and why; empty if none is.
    """

    rows: list[Throughput]
    current: Throughput
    limit: str
    sampled: int
    bad: str = ""


def measure(
    source: ImageDataset,
    crop: Crop,
    cover: tuple[int, int],
    *,
    command: str = "pixmim cache",
    threads: int = 0,
    seconds: float = 1.0,
    on_start: Callable[[str], None] = lambda what: None,
) -> Report:
    """Measure a dataset from disk, from memory and from trial caches, always with the same images.

    Args:
        source: The images.
        crop: What the network sees of each.
        cover: (h, w) that the images of a cache just cover.
        command: Command that makes a cache, for the advice.
        threads: Number of threads; 0 means as many as training uses.
        seconds: Longest time of a turn.
        on_start: Called with the name of each measurement.

    Raises:
        UserError: If most images are unreadable.
    """
    threads, images, memory = num_threads(threads), len(source), total_ram()
    order = ShuffledOrder(0, images, source.shard_sizes)
    sample = Subset(source, order.at(0, np.arange(min(_SAMPLE, images))).tolist())
    skipped, rows = BadImageLog(None, len(sample), 0.5, "allowed here"), dict[str, Throughput]()

    def add(
        name: str, data: ImageDataset, size: float | None, advice: str = "", extents: Sequence[Extent] = ()
    ) -> float:
        on_start(name)
        rows[name] = Throughput(name, _rate(data, crop, threads, seconds, skipped, extents), size, advice)
        return rows[name].rate

    extents, size, disk = list[Extent](), None, float("inf")
    if isinstance(source, HasExtent) and source.shard_sizes is None:
        extents = [source.extent(i) for i in sample.indices]
        size = statistics.fmean(count or os.stat(path).st_size for path, _, count in extents)
        disk = add(DISK, sample, size, extents=extents) * size
    loaded = add(MEMORY, sample, size)
    on_disk = size is not None and images * size > _PAGE_CACHE * memory and disk < loaded * size / _FASTER

    few = Subset(sample, [i for i in range(len(sample)) if i not in skipped][:_CACHED])
    kept = InMemoryDataset(few)
    with tempfile.TemporaryDirectory() as folder:
        for kind, flag in _kinds(source):
            on_start(f"making a {kind} cache")
            made = make_cache(few, Path(folder, kind), cover, kind=kind, threads=threads, part=(0, 1))
            cached, stored = open_cache(Path(folder, kind), source.image_spec), made.bytes / made.images
            minutes = max(1, round(images * made.seconds / made.images / 60))
            advice = f"`{command}{flag}` takes {minutes:,} min and {_size(images * stored)}"
            rate = add(f"{kind} cache", cached, stored, advice)
            if on_disk and images * stored > _PAGE_CACHE * memory:
                rows[f"{kind} cache"] = Throughput(f"{kind} cache", min(rate, disk / stored), stored, advice)
            kept = InMemoryDataset(cached)
        decoded = statistics.fmean(kept.image(i).nbytes for i in range(len(kept)))
        fits = images * decoded <= RAM_SHARE * memory
        add(DECODED, kept, decoded, f"a cache stays decoded in memory, {_size(images * decoded)}" * fits)

    total = decoded_bytes(source)
    if total is not None and total <= RAM_SHARE * memory:
        current, limit = DECODED, "cropping limits"
    elif on_disk:
        current, limit = DISK, f"the disk limits, {_size(images * (size or 0))} do not stay in memory"
    else:
        current, limit = MEMORY, f"decoding and cropping limit, on {threads} of {os.cpu_count()} cores"
    bad = f"{len(skipped)} of {len(sample)} images cannot be read: {skipped.reasons}" if len(skipped) else ""
    return Report(list(rows.values()), rows[current], limit, len(sample), bad)


def recommend(report: Report, target_rate: float | None = None) -> list[str]:
    """Return a line on what limits, one on each faster way, and one on a model that takes `target_rate` images/s."""
    now = report.current.rate
    lines = [f"{now:,.0f} images/s after the first epoch: {report.limit}."]
    faster = [row for row in report.rows if row.advice and row.rate > _FASTER * now and row is not report.current]
    lines += [f"{row.rate:,.0f} images/s, {row.rate / now:.1f} times as many: {row.advice}." for row in faster]
    if not faster:
        lines.append("Nothing that was tried is clearly faster.")
    if target_rate is not None and now >= target_rate:
        lines.append(f"The data pipeline keeps up with {target_rate:,.0f} images/s.")
    elif target_rate is not None:
        enough = next((row.name for row in faster if row.rate >= target_rate), "")
        way = f"{enough} keeps up" if enough else "nothing that was tried keeps up"
        lines.append(
            f"A model that takes {target_rate:,.0f} images/s waits {1 - now / target_rate:.0%} of its time; {way}."
        )
    return lines + [report.bad] * bool(report.bad)


def drop_from_page_cache(extent: Extent) -> None:
    """Ask the system to read these bytes from disk next time.

    Needs no rights. Has no effect on bytes that were just written, on file systems in memory, on macOS and on Windows.
    """
    path, start, count = extent
    if not hasattr(os, "posix_fadvise"):
        return
    try:
        descriptor = open_regular(path)
    except OSError:
        return
    try:
        os.posix_fadvise(descriptor, start, count, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _rate(
    source: ImageDataset, crop: Crop, threads: int, seconds: float, skipped: BadImageLog, extents: Sequence[Extent] = ()
) -> float:
    """Return the images that a Loader yields in a second. With `extents`, in an epoch at most, from the disk."""
    batch = max(1, min(32, len(source) // 8))
    most = max(2, len(source) // batch) if extents else 10**9

    def turn() -> float:
        for extent in extents:
            drop_from_page_cache(extent)
        done = 0
        with Loader(source, crop, BatchShard(batch), skipped=skipped, threads=threads) as batches:
            next(batches)  # from here on, as many batches are in progress as at the end
            began = perf_counter()
            while done < most - 1 and (not done or perf_counter() - began < seconds):
                next(batches)
                done += 1
            return done * batch / (perf_counter() - began)

    return statistics.median(turn() for _ in range(_TURNS))


def _kinds(source: ImageDataset) -> list[tuple[Kind, str]]:
    """Return the kinds of caches to try, with their flags: those that the dataset is not yet."""
    if isinstance(source, ShardDataset) and source.sizes is not None:  # it is a cache
        return [] if source.raw else [("raw", " --raw")]
    jpeg = source.image_spec.dtype == "uint8" and source.image_spec.channels in (1, 3)
    return [("jpeg", ""), ("raw", " --raw")] if jpeg else [("raw", " --raw")]


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
