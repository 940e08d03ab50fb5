"""Create a resized cache, so that each epoch costs a small decode or a copy per image.

PixMIM's simple resized crop starts with a resize that is the same in every epoch. A cache does it once.
"""

import io
import json
import os
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import simplejpeg

from pixmim.data.bad_images import BadImageLog
from pixmim.data.dataset import BadImage, ImageDataset, prefetch_in_order
from pixmim.data.decode.limits import check_size
from pixmim.data.resized_cache import (
    GROUPS_FILE,
    CacheSettings,
    Chroma,
    Kind,
    checksum,
    encode_groups,
    read_index,
    read_settings,
    shard_name,
)
from pixmim.data.shards.dataset import INDEX_DTYPE
from pixmim.transforms.crops import Interpolation, cover_size, resize
from pixmim.utils.errors import UserError
from pixmim.utils.files import atomic_write, write_json, write_text_atomically
from pixmim.utils.threads import ThreadPool, ordered_map

_MAX_JPEG_SIDE = 65_500  # pixels, of libjpeg

Sample = tuple[int, dict[str, bytes], int, tuple[int, int]]
"""Dataset index; files by extension, the image first; class or -1; (h, w) of the image."""


@dataclass(frozen=True)
class CacheResult:
    """Images and bytes that one process wrote, and images that it could not read."""

    images: int
    skipped: int
    bytes: int
    seconds: float
    complete: bool  # all shards of the cache exist now


def make_cache(
    dataset: ImageDataset,
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
        dataset: The images.
        folder: Folder of the cache.
        size: (h, w) in pixels to cover; the aspect ratio is kept.
        interpolation: That of the crop in training.
        kind: "jpeg", or "raw" pixels, which need no decoding and four times the space.
        quality: JPEG quality.
        chroma: JPEG chroma subsampling. The default distorts PixMIM's low-frequency target least for its size.
        per_shard: Images per shard.
        threads: Number of threads; 0: one per core, at most 16.
        part: (rank, world size): write every world-size-th shard. Default: from torchrun's or Slurm's environment.
        progress: Called with the number of images done.

    Raises:
        UserError: If the folder has other content, or a cache of other images or settings, if JPEG cannot store the
            images, or if none of them can be read.
    """
    if kind == "jpeg" and (dataset.image_spec.channels not in (1, 3) or dataset.image_spec.dtype != "uint8"):
        raise UserError(f"JPEG cannot store {dataset.image_spec}, only 1 or 3 channels in uint8: pass --raw")
    rank, world_size = part or shard_assignment()
    names = [] if dataset.groups is None else [dataset.group_names[group] for group in dataset.groups]
    groups, groups_checksum = encode_groups(names)
    settings = CacheSettings(
        data=dataset.spec,
        fingerprint=dataset.fingerprint(),
        images=len(dataset),
        classes=dataset.classes,
        size=list(size),
        interpolation=interpolation,
        kind=kind,
        quality=quality if kind == "jpeg" else 0,
        chroma=chroma if kind == "jpeg" else "",
        per_shard=per_shard,
        groups=groups_checksum if names else "",
        **asdict(dataset.image_spec),
    )
    _write_or_check_settings(folder, settings)
    if names:
        write_text_atomically(folder / GROUPS_FILE, groups)
    start, images, written, done = time.monotonic(), 0, 0, 0
    skipped = BadImageLog(folder / (f"skipped-{rank}.csv" if world_size > 1 else "skipped.csv"), len(dataset), 1.0)
    labels = dataset.labels  # some datasets compute them at each access
    missing = []
    for shard in range(rank, settings.num_shards, world_size):
        if read_index(folder, shard) is None:
            missing.append(shard)
        else:
            done += len(settings.images_of(shard))
            progress(done)

    def make_sample(index: int) -> Sample | None:
        class_number = -1 if labels is None else int(labels[index])
        with skipped.attempt(dataset, index):
            return _encode(dataset.read_array(index), index, dataset.path_of(index), class_number, settings)
        return None

    def indices() -> Iterator[int]:
        return chain.from_iterable(map(settings.images_of, missing))

    with ThreadPool(threads, "pixmim-cache") as pool:
        made = ordered_map(pool, make_sample, indices(), per_shard)  # continues while a shard is written
        samples = zip(prefetch_in_order(dataset, indices()), made, strict=True)

        def take(count: int) -> Iterator[Sample]:
            nonlocal done
            for _, sample in islice(samples, count):
                done += 1
                progress(done)
                if sample is not None:
                    yield sample

        for shard in missing:
            for leftover in folder.glob(f"{shard_name(shard, 'tar')}.*.tmp"):
                leftover.unlink(missing_ok=True)
            count, tar_bytes = _write_shard(folder, shard, take(len(settings.images_of(shard))))
            images, written = images + count, written + tar_bytes
    total = _write_index(folder, settings)
    if total == 0:
        raise UserError(f"none of the {len(dataset):,} images of {dataset.spec} can be read: see {folder}/skipped*.csv")
    return CacheResult(images, len(skipped), written, time.monotonic() - start, total is not None)


def shard_assignment() -> tuple[int, int]:
    """Return (rank, world size) under torchrun or in a Slurm array; (0, 1) otherwise.

    Raises:
        UserError: If a variable is not a number, or the numbers of an array are not evenly spaced, so that the rank is
            unknown.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return _number_in("RANK"), _number_in("WORLD_SIZE")
    if "SLURM_ARRAY_TASK_ID" not in os.environ or "SLURM_ARRAY_TASK_COUNT" not in os.environ:
        return 0, 1
    task, count = _number_in("SLURM_ARRAY_TASK_ID"), _number_in("SLURM_ARRAY_TASK_COUNT")
    first = _number_in("SLURM_ARRAY_TASK_MIN", 0)
    last = _number_in("SLURM_ARRAY_TASK_MAX", first + count - 1)
    step = max(1, (last - first) // max(1, count - 1))
    if first + (count - 1) * step != last or (task - first) % step:
        raise UserError(
            f"the {count} tasks of this Slurm array, {first} to {last}, are not evenly spaced: submit a range such as "
            f"--array=0-{count - 1}. Shards that exist are kept, so a failed array can be submitted again"
        )
    return (task - first) // step, count


def _number_in(variable: str, default: int = 0) -> int:
    text = os.environ.get(variable, str(default))
    if not (text.isascii() and text.isdecimal()):
        raise UserError(f"{variable}={text!r} is not a number: set it to one, or unset it")
    return int(text)


def _write_or_check_settings(folder: Path, settings: CacheSettings) -> None:
    """Write settings.json, or raise UserError if the folder has another one, or other content."""
    existing = read_settings(folder)
    if existing is None:
        folder.mkdir(parents=True, exist_ok=True)
        others = [path.name for path in folder.iterdir() if not path.name.endswith(".tmp")]
        # Another rank may just have written the first files.
        is_new = not others or (set(others) <= {"settings.json", GROUPS_FILE} and read_settings(folder))
        if not is_new:
            raise UserError(f"{folder} has other files and is not a cache: choose a new folder")
        write_json(folder / "settings.json", asdict(settings))
        return
    for name, value in vars(settings).items():
        other = getattr(existing, name)
        if name != "data" and other != value:
            values = "" if name in ("fingerprint", "classes", "groups") else f" ({other}, not {value})"
            raise UserError(f"{folder} is a cache with another {name}{values}: choose another folder, or remove it")


def _write_index(folder: Path, settings: CacheSettings) -> int | None:
    """Write index.json if all shards exist, and return the number of images in them; otherwise return None."""
    shards, total = [], 0
    for shard in range(settings.num_shards):
        entries = read_index(folder, shard)
        if entries is None:
            return None
        name, tar_bytes = shard_name(shard, "tar"), int(entries[-1]["offset"])
        shards.append({"name": name, "images": len(entries) - 1, "bytes": tar_bytes})
        total += len(entries) - 1
    write_json(folder / "index.json", {"shards": shards, "images": total})
    return total


def _write_shard(folder: Path, shard: int, samples: Iterable[Sample]) -> tuple[int, int]:
    """Write a tar and then its index, both atomically; return the number of samples and the tar's size."""
    entries: list[tuple[int, ...]] = []
    size = 0

    def write(file: IO[bytes]) -> None:
        nonlocal size
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for index, files, label, (h, w) in samples:
                for position, (extension, content) in enumerate(files.items()):
                    member = tarfile.TarInfo(f"{index:09d}.{extension}")
                    member.size = len(content)
                    if position == 0:
                        entries.append((index, archive.offset + tarfile.BLOCKSIZE, len(content), label, h, w))
                    archive.addfile(member, io.BytesIO(content))
        size = file.tell()

    atomic_write(folder / shard_name(shard, "tar"), write)
    content = np.asarray(entries, INDEX_DTYPE).tobytes()
    last = np.asarray((-1, size, checksum(content), -1, 0, 0), INDEX_DTYPE).tobytes()
    write_text_atomically(folder / shard_name(shard, "index"), content + last)
    return len(entries), size


def _encode(image: npt.NDArray[np.generic], index: int, path: str, label: int, settings: CacheSettings) -> Sample:
    """Resize an image (h w c) and encode it with its label and metadata. Raises BadImage if that is too large."""
    height, width, channels = image.shape
    target = cover_size((height, width), (settings.size[0], settings.size[1]))
    check_size(target[1], target[0])
    if settings.kind == "jpeg" and max(target) > _MAX_JPEG_SIDE:
        raise BadImage(
            f"{width}x{height} pixels become {target[1]}x{target[0]}, and a JPEG has {_MAX_JPEG_SIDE:,} at most: cut it"
        )
    pixels = np.ascontiguousarray(resize(image, target, settings.interpolation))
    files: dict[str, bytes] = {}
    if settings.kind == "raw":
        files["raw"] = pixels.astype(pixels.dtype.newbyteorder("<"), copy=False).tobytes()
    elif channels == 1:
        files["jpg"] = simplejpeg.encode_jpeg(pixels, settings.quality, "GRAY", "Gray")
    else:
        files["jpg"] = simplejpeg.encode_jpeg(pixels, settings.quality, "RGB", settings.chroma)
    if label >= 0:
        files["cls"] = str(label).encode()
    metadata = {"path": path, "height": height, "width": width}
    files["json"] = json.dumps(metadata).encode("utf-8", "surrogateescape")
    return index, files, label, (pixels.shape[0], pixels.shape[1])
