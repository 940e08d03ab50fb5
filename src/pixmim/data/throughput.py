"""Measure how many images per second this machine loads from a dataset, and from caches of it."""

import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import numpy as np

from pixmim.data.bad_images import BadImageLog
from pixmim.data.build_resized_cache import make_cache
from pixmim.data.caching import MEMORY_FRACTION, decoded_bytes
from pixmim.data.dataset import Extent, HasExtent, ImageDataset, InMemoryDataset, Subset
from pixmim.data.duplicates import file_sizes
from pixmim.data.loader import Loader
from pixmim.data.resized_cache import Kind, open_cache
from pixmim.data.sampler import BatchShard, ShuffledOrder
from pixmim.data.shards.dataset import ShardDataset
from pixmim.transforms.crops import Crop
from pixmim.utils.files import open_regular
from pixmim.utils.memory import total_memory
from pixmim.utils.threads import num_threads

_REPEATS = 3  # the median of these is reported
_MAX_SAMPLE = 1024  # images to measure with
_MAX_CACHED = 256  # images in a trial cache
_PAGE_CACHE_FRACTION = 0.5  # of the RAM, in which files are expected to stay after the first epoch
_MIN_SPEEDUP = 1.3  # that is worth recommending

DISK, MEMORY, DECODED = "originals, from disk", "originals, from memory", "decoded in memory"


@dataclass(frozen=True)
class Throughput:
    """One way to read the images: images/s, bytes per image, and how to get it (empty if it needs no change)."""

    name: str
    rate: float
    bytes: float | None = None
    advice: str = ""


@dataclass(frozen=True)
class Report:
    """Measured throughputs."""

    rows: list[Throughput]
    current: Throughput  # what training reaches after the first epoch, as the data is now
    limit: str  # its bottleneck
    sampled: int  # images that were measured with
    bad: str = ""  # summary of the unreadable ones among them


def measure(
    dataset: ImageDataset,
    crop: Crop,
    cover: tuple[int, int],
    *,
    command: str = "pixmim cache",
    threads: int = 0,
    seconds: float = 1.0,
    on_start: Callable[[str], None] = lambda name: None,
) -> Report:
    """Measure a dataset from disk, from memory and from trial caches, always with the same images.

    Args:
        dataset: The images.
        crop: The crop of each image.
        cover: (h, w) in pixels that the images of a cache just cover.
        command: Command that creates a cache, for the advice.
        threads: Number of threads; 0: as many as training uses.
        seconds: Longest duration of one measurement.
        on_start: Called with the name of each measurement.

    Raises:
        UserError: If most images are unreadable.
    """
    threads, images, ram = num_threads(threads), len(dataset), total_memory() or 0
    order = ShuffledOrder(0, images, dataset.shard_sizes)
    sample = Subset(dataset, order.at(0, np.arange(min(_MAX_SAMPLE, images))).tolist())
    skipped, rows = BadImageLog(None, len(sample), 0.5, "allowed here"), dict[str, Throughput]()

    def add(name: str, data: ImageDataset, size: float | None, advice: str = "", drop: Sequence[Extent] = ()) -> float:
        on_start(name)
        rows[name] = Throughput(name, _measure_rate(data, crop, threads, seconds, skipped, drop), size, advice)
        return rows[name].rate

    size, disk_bandwidth = None, float("inf")
    located = [sample.locate(i) for i in range(len(sample))]
    extents = [e for source, i in located if isinstance(source, HasExtent) for e in source.extents(i)]
    sizes = file_sizes(sample)
    if dataset.shard_sizes is None and len(extents) >= len(sample) and (sizes > 0).any():
        size = float(sizes[sizes > 0].mean())
        disk_bandwidth = add(DISK, sample, size, drop=extents) * size
    memory_rate = add(MEMORY, sample, size)
    skipped.check()  # also for images that were read ahead, but not used
    fits_page_cache = size is None or images * size <= _PAGE_CACHE_FRACTION * ram
    disk_limits = size is not None and not fits_page_cache and disk_bandwidth < memory_rate * size / _MIN_SPEEDUP

    readable = Subset(sample, [i for i in range(len(sample)) if i not in skipped][:_MAX_CACHED])
    in_memory = InMemoryDataset(readable)
    with tempfile.TemporaryDirectory() as folder:
        for kind, flag in _trial_kinds(dataset):
            name, path = f"{kind} cache", Path(folder, kind)
            on_start(f"creating a {name}")
            result = make_cache(readable, path, cover, kind=kind, threads=threads, part=(0, 1))
            cached, stored = open_cache(path, dataset.image_spec), result.bytes / result.images
            minutes = max(1, round(images * result.seconds / result.images / 60))
            rate = add(name, cached, stored, f"`{command}{flag}` takes {minutes:,} min and {_format(images * stored)}")
            if disk_limits and images * stored > _PAGE_CACHE_FRACTION * ram:
                rows[name] = replace(rows[name], rate=min(rate, disk_bandwidth / stored))
            in_memory = InMemoryDataset(cached)
        decoded = statistics.fmean(in_memory.image(i).nbytes for i in range(len(in_memory)))
        fits = images * decoded <= MEMORY_FRACTION * ram
        add(DECODED, in_memory, decoded, f"a cache stays decoded in memory, {_format(images * decoded)}" * fits)

    total = decoded_bytes(dataset)
    if total is not None and total <= MEMORY_FRACTION * ram:
        current, limit = DECODED, "limited by cropping"
    elif disk_limits:
        current, limit = DISK, f"limited by the disk; {_format(images * (size or 0))} do not stay in memory"
    else:
        current, limit = MEMORY, f"limited by decoding and cropping on {threads} of {os.cpu_count()} cores"
    bad = f"{len(skipped)} of {len(sample)} images cannot be read: {skipped.reasons}" if len(skipped) else ""
    return Report(list(rows.values()), rows[current], limit, len(sample), bad)


def recommend(report: Report, target_rate: float | None = None) -> list[str]:
    """Return one line on the current bottleneck, one per faster way, and one on a target rate in images/s."""
    now = report.current.rate
    lines = [f"{now:,.0f} images/s after the first epoch, {report.limit}."]
    faster = [row for row in report.rows if row.advice and row.rate > _MIN_SPEEDUP * now and row != report.current]
    lines += [f"{row.rate:,.0f} images/s, {row.rate / now:.1f} times as many: {row.advice}." for row in faster]
    if not faster:
        lines.append("Nothing measured is clearly faster.")
    if target_rate is not None and now >= target_rate:
        lines.append(f"The data pipeline keeps up with {target_rate:,.0f} images/s.")
    elif target_rate is not None:
        enough = next((row.name for row in faster if row.rate >= target_rate), "nothing measured")
        waiting = 1 - now / target_rate
        lines.append(
            f"A model that takes {target_rate:,.0f} images/s waits {waiting:.0%} of its time; {enough} keeps up."
        )
    return lines + [report.bad] * bool(report.bad)


def drop_from_page_cache(extent: Extent) -> None:
    """Drop these bytes from the page cache. Needs no privileges.

    Has no effect on bytes that were just written, on file systems in memory, on macOS and on Windows.
    """
    path, start, count = extent
    with suppress(OSError, AttributeError):  # AttributeError: the system has no posix_fadvise
        descriptor = open_regular(path)
        try:
            os.posix_fadvise(descriptor, start, count, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _measure_rate(
    dataset: ImageDataset, crop: Crop, threads: int, seconds: float, skipped: BadImageLog, drop: Sequence[Extent] = ()
) -> float:
    """Return the images/s of a Loader; of at most one epoch if extents are dropped from the page cache before it."""
    batch = max(1, min(32, len(dataset) // 8))
    max_batches = max(1, len(dataset) // batch - 1) if drop else 10**9

    def run() -> float:
        for extent in drop:
            drop_from_page_cache(extent)
        with Loader(dataset, crop, BatchShard(batch), skipped=skipped, threads=threads) as batches:
            next(batches)  # from now on, as many batches are in progress as at the end
            start, done = perf_counter(), 0
            while done < max_batches and (not done or perf_counter() - start < seconds):
                next(batches)
                done += 1
            return done * batch / (perf_counter() - start)

    return statistics.median(run() for _ in range(_REPEATS))


def _trial_kinds(dataset: ImageDataset) -> list[tuple[Kind, str]]:
    """Return the kinds of caches to try, with their flags."""
    if isinstance(dataset, ShardDataset) and dataset.sizes is not None:  # it is a cache already
        return [] if dataset.raw else [("raw", " --raw")]
    jpeg = dataset.image_spec.dtype == "uint8" and dataset.image_spec.channels in (1, 3)
    return [("jpeg", ""), ("raw", " --raw")] if jpeg else [("raw", " --raw")]


def _format(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
