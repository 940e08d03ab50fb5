"""Create a resized cache, so that a later epoch costs a small decode or a copy.

PixMIM's simple resized crop begins with a resize that is the same in each epoch; it is done here once.
"""

import io
import json
import os
import tarfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import simplejpeg

from pixmim.data.bad_images import BadImageLog
from pixmim.data.dataset import BadImage, ImageDataset, prefetch_in_order
from pixmim.data.resized_cache import CacheSettings, Chroma, Kind, checksum, read_index, read_settings, shard_name
from pixmim.data.shards.dataset import INDEX_DTYPE
from pixmim.transforms.crops import Interpolation, cover_size, resize
from pixmim.utils.errors import UserError
from pixmim.utils.files import atomic_write, write_json, write_text_atomically
from pixmim.utils.threads import ThreadPool

Sample = tuple[int, dict[str, bytes], int, tuple[int, int]]
"""Number in the dataset; files by extension, the image first; class or -1; (h, w) of the image."""


@dataclass(frozen=True)
class CacheResult:
    """What one process did.

    Args:
        images: Images written.
        skipped: Images that could not be read.
        bytes: Bytes written.
        seconds: Duration.
        complete: Whether all shards of the cache exist now.
    """

    images: int
    skipped: int
    bytes: int
    seconds: float
    complete: bool


def make_cache(
    source: ImageDataset,
    folder: Path,
    size: tuple[int, int],
    *,
    interpolation: Interpolation = "bicubic",
    kind: Kind = "jpeg",
    quality: int = 95,
    chroma: Chroma = "444",
    per_shard: int = 2000,
    threads: int = 0,
    part: tuple[int, int] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> CacheResult:
    """Write the images of a dataset to a cache, resized until they just cover `size`. Resumes an interrupted cache.

    Args:
        source: The dataset.
        folder: Where to write.
        size: (h, w) to cover; the aspect ratio is kept.
        interpolation: As in the crop of the runs to come.
        kind: "jpeg", or "raw" pixels, which need no decoding and four times the space.
        quality: Of JPEGs.
        chroma: Subsampling of JPEGs. The default disturbs PixMIM's low-frequency target least for its size.
        per_shard: Images in a shard.
        threads: Decoding threads; 0: one per core, at most 16.
        part: (rank, world size): write every world-size-th shard. Default: from torchrun's or Slurm's environment.
        progress: Called with the number of images done.

    Returns:
        What this process did.

    Raises:
        UserError: If the folder has other content, or a cache of other images or settings; or if JPEG cannot hold
            the images.
    """
    if kind == "jpeg" and (source.image_spec.channels not in (1, 3) or source.image_spec.dtype != "uint8"):
        raise UserError(f"JPEG cannot hold {source.image_spec}, only 1 or 3 channels in uint8: pass --raw")
    rank, world_size = part or shard_assignment()
    settings = CacheSettings(
        data=source.spec,
        fingerprint=source.fingerprint(),
        images=len(source),
        classes=source.classes,
        size=list(size),
        interpolation=interpolation,
        kind=kind,
        quality=quality if kind == "jpeg" else 0,
        chroma=chroma if kind == "jpeg" else "",
        channels=source.image_spec.channels,
        per_shard=per_shard,
        dtype=source.image_spec.dtype,
        tiff_pages=source.image_spec.tiff_pages,
    )
    _write_or_check_settings(folder, settings)
    start, images, written, done = time.monotonic(), 0, 0, 0
    skipped = BadImageLog(folder / (f"skipped-{rank}.csv" if world_size > 1 else "skipped.csv"), len(source), 1.0)
    advance, labels = prefetch_in_order(source), source.labels  # labels once: some datasets compute them each time
    with ThreadPool(threads, "pixmim-cache") as pool:

        def submit(shard: int) -> deque[Future[Sample | None]]:
            numbers = settings.images_of(shard)
            return deque(pool.submit(_make_sample, source, labels, i, settings, skipped) for i in numbers)

        def samples(shard: int, jobs: deque[Future[Sample | None]]) -> Iterator[Sample]:
            nonlocal done
            for number in settings.images_of(shard):
                advance(number)
                sample = jobs.popleft().result()  # not kept: it is freed once it is in the tar
                done += 1
                progress(done)
                if sample is not None:
                    yield sample

        def write(shard: int, jobs: deque[Future[Sample | None]]) -> None:
            nonlocal images, written
            count, size = _write_shard(folder, shard, samples(shard, jobs))
            images, written = images + count, written + size

        previous: tuple[int, deque[Future[Sample | None]]] | None = None
        for shard in range(rank, settings.num_shards, world_size):
            if read_index(folder, shard) is not None:
                done += len(settings.images_of(shard))
                progress(done)
                continue
            for leftover in folder.glob(f"{shard_name(shard, 'tar')}.*.tmp"):
                leftover.unlink(missing_ok=True)
            if previous is None:
                advance(settings.images_of(shard)[0])  # start to prefetch before the first image is read
            current = shard, submit(shard)  # computed while the previous one is written
            if previous is not None:
                write(*previous)
            previous = current
        if previous is not None:
            write(*previous)
    complete = _write_index(folder, settings)
    return CacheResult(images, len(skipped), written, time.monotonic() - start, complete)


def shard_assignment() -> tuple[int, int]:
    """Return (rank, world size) under torchrun or in a Slurm array; (0, 1) otherwise."""
    environment = os.environ
    for rank, ranks in (("RANK", "WORLD_SIZE"), ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")):
        if rank in environment and ranks in environment:
            lowest = int(environment.get("SLURM_ARRAY_TASK_MIN", "0")) if rank.startswith("SLURM") else 0
            return int(environment[rank]) - lowest, int(environment[ranks])
    return 0, 1


def _write_or_check_settings(folder: Path, settings: CacheSettings) -> None:
    """Write settings.json, or raise UserError if the folder has another one, or other content."""
    existing = read_settings(folder)
    if existing is None:
        folder.mkdir(parents=True, exist_ok=True)
        others = [path.name for path in folder.iterdir() if not path.name.endswith(".tmp")]
        if others and others != ["settings.json"]:  # another rank may just have written it
            raise UserError(f"{folder} is not empty and not a cache: choose a new folder")
        write_json(folder / "settings.json", asdict(settings))
        return
    for name, value in vars(settings).items():
        other = getattr(existing, name)
        if name != "data" and other != value:
            values = "" if name in ("fingerprint", "classes") else f" ({other}, not {value})"
            raise UserError(f"{folder} is a cache with another {name}{values}: choose another folder, or remove it")


def _write_index(folder: Path, settings: CacheSettings) -> bool:
    """Write index.json if all shards exist, whoever wrote them; return whether they do."""
    shards = []
    for shard in range(settings.num_shards):
        entries = read_index(folder, shard)
        if entries is None:
            return False
        name = shard_name(shard, "tar")
        shards.append({"name": name, "images": len(entries) - 1, "bytes": int(entries[-1]["offset"])})
    write_json(folder / "index.json", {"shards": shards, "images": sum(int(str(s["images"])) for s in shards)})
    return True


def _write_shard(folder: Path, shard: int, samples: Iterable[Sample]) -> tuple[int, int]:
    """Write a tar and then its index, both atomically; return the number of samples and the tar's size."""
    entries: list[tuple[int, ...]] = []
    size = 0

    def write(file: IO[bytes]) -> None:
        nonlocal size
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for number, files, label, (h, w) in samples:
                for position, (extension, content) in enumerate(files.items()):
                    member = tarfile.TarInfo(f"{number:09d}.{extension}")
                    member.size = len(content)
                    if position == 0:
                        entries.append((number, archive.offset + tarfile.BLOCKSIZE, len(content), label, h, w))
                    archive.addfile(member, io.BytesIO(content))
        size = file.tell()

    atomic_write(folder / shard_name(shard, "tar"), write)
    content = np.asarray(entries, INDEX_DTYPE).tobytes()
    last = np.asarray((-1, size, checksum(content), -1, 0, 0), INDEX_DTYPE).tobytes()
    write_text_atomically(folder / shard_name(shard, "index"), content + last)
    return len(entries), size


def _make_sample(
    source: ImageDataset,
    labels: npt.NDArray[np.int64] | None,
    index: int,
    settings: CacheSettings,
    skipped: BadImageLog,
) -> Sample | None:
    """Return an image resized and encoded, or None if it cannot be read."""
    try:
        original = source.read_array(index)
    except BadImage as error:
        skipped.record(index, source.path_of(index), str(error))
        return None
    height, width, _ = original.shape
    to = cover_size((height, width), (settings.size[0], settings.size[1]))
    pixels = np.ascontiguousarray(resize(original, to, settings.interpolation))
    files: dict[str, bytes] = {}
    if settings.kind == "raw":
        files["raw"] = pixels.astype(pixels.dtype.newbyteorder("<"), copy=False).tobytes()
    elif pixels.shape[2] == 1:
        files["jpg"] = simplejpeg.encode_jpeg(pixels, settings.quality, "GRAY", "Gray")
    else:
        files["jpg"] = simplejpeg.encode_jpeg(pixels, settings.quality, "RGB", settings.chroma)
    label = -1 if labels is None else int(labels[index])
    if label >= 0:
        files["cls"] = str(label).encode()
    facts = {"path": source.path_of(index), "height": height, "width": width}
    files["json"] = json.dumps(facts).encode("utf-8", "surrogateescape")
    return index, files, label, (pixels.shape[0], pixels.shape[1])
