"""Making a cache: each picture decoded and resized once, so that a later epoch costs a small decoding, or a copy.

PixMIM's simple resized crop begins with a resize that does not change from epoch to epoch. It is paid here.
"""

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import simplejpeg

from pixmim.data.bad_images import Skipped
from pixmim.data.dataset import BadImage, Source, follow
from pixmim.data.resized_cache import (
    Sample,
    Settings,
    read_index,
    read_settings,
    shard_path,
    write_json,
    write_settings,
    write_shard,
)
from pixmim.transforms.crops import Interpolation, cover, resized
from pixmim.utils.errors import UserError
from pixmim.utils.threads import workers

Kind = Literal["jpeg", "raw"]
Chroma = Literal["444", "420"]


@dataclass(frozen=True)
class Made:
    """What one process did: images written and skipped, bytes, seconds, and whether the cache is whole now."""

    images: int
    skipped: int
    bytes: int
    seconds: float
    whole: bool


def make_cache(
    source: Source,
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
) -> Made:
    """Write the images of `source`, resized until they just cover `size` (h, w), aspect kept, into `folder`.

    kind      "jpeg", or "raw" pixels: no decoding later, four times the space
    quality, chroma  of the JPEGs; 95 and 4:4:4 disturb PixMIM's target least for their size
    part      (rank, ranks): make every `ranks`-th shard only; by default read off torchrun's or Slurm's environment
    progress  is told how many images are done

    Shards that are whole already stay; so the same call goes on where another was interrupted. Raises UserError if the
    folder holds a cache of other images or settings, and for JPEGs of a form that they cannot hold.
    """
    if kind == "jpeg" and (source.form.channels not in (1, 3) or source.form.pixels != "uint8"):
        raise UserError(f"JPEGs hold 1 or 3 channels in uint8, and not {source.form}: keep the pixels with --raw")
    rank, ranks = part or whose_part()
    settings = Settings(
        data=source.spec,
        fingerprint=source.fingerprint(),
        images=len(source),
        classes=source.classes,
        size=list(size),
        interpolation=interpolation,
        kind=kind,
        quality=quality if kind == "jpeg" else 0,
        chroma=chroma if kind == "jpeg" else "",
        channels=source.form.channels,
        per_shard=per_shard,
        pixels=source.form.pixels,
        pages=source.form.pages,
    )
    _claim(folder, settings)
    began, images, written, done = time.monotonic(), 0, 0, 0
    skipped = Skipped(folder / (f"skipped-{rank}.csv" if ranks > 1 else "skipped.csv"), len(source), 1.0)
    mine, come_to = range(rank, settings.shards, ranks), follow(source)
    labels = source.labels  # once: some sources compute them all each time
    with workers(threads, "pixmim-cache") as pool:
        ahead: deque[tuple[int, deque[Future[Sample | None]]]] = deque()

        def finish_one() -> None:
            nonlocal images, written, done
            shard, jobs = ahead.popleft()

            def results() -> Iterator[Sample]:  # a result is let go of as soon as it is in the tar
                nonlocal done
                last = min((shard + 1) * per_shard, len(source))
                while jobs:
                    come_to(last - len(jobs))
                    sample = jobs.popleft().result()
                    done += 1
                    progress(done)
                    if sample is not None:
                        yield sample

            try:
                count, size = write_shard(folder, shard, results())
            except BaseException:  # interrupted, or the disk is full: no need to compute the rest
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            images, written = images + count, written + size

        for shard in mine:
            first, last = shard * per_shard, min((shard + 1) * per_shard, len(source))
            if read_index(folder, shard) is not None:
                done += last - first
                progress(done)
                continue
            for leftover in folder.glob(f"{shard_path(folder, shard, 'tar').name}.*.tmp"):
                leftover.unlink(missing_ok=True)
            submitted = (pool.submit(_sample, source, labels, i, settings, skipped) for i in range(first, last))
            ahead.append((shard, deque(submitted)))
            if len(ahead) > 1:  # one shard is written while the next one is computed
                finish_one()
        while ahead:
            finish_one()
    whole = _finish(folder, settings)
    return Made(images, len(skipped), written, time.monotonic() - began, whole)


def whose_part() -> tuple[int, int]:
    """(rank, ranks) of this process under torchrun or in a Slurm array; (0, 1) otherwise."""
    environment = os.environ
    for rank, ranks in (("RANK", "WORLD_SIZE"), ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")):
        if rank in environment and ranks in environment:
            lowest = int(environment.get("SLURM_ARRAY_TASK_MIN", "0")) if rank.startswith("SLURM") else 0
            return int(environment[rank]) - lowest, int(environment[ranks])
    return 0, 1


def _claim(folder: Path, settings: Settings) -> None:
    """Write the settings, or find the same ones there."""
    there = read_settings(folder)
    if there is None:
        folder.mkdir(parents=True, exist_ok=True)
        others = [path.name for path in folder.iterdir() if not path.name.endswith(".tmp")]
        if others and others != ["settings.json"]:  # another rank may just have claimed it
            raise UserError(f"{folder} is not empty, and no cache: choose a new folder")
        write_settings(folder, settings)
        return
    for name, value in vars(settings).items():
        if name != "data" and getattr(there, name) != value:
            raise UserError(
                f"{folder} holds a cache with another {name}"
                + (f" ({getattr(there, name)}, not {value})" if name not in ("fingerprint", "classes") else "")
                + ": choose another folder, or remove it"
            )


def _finish(folder: Path, settings: Settings) -> bool:
    """Write index.json if every shard is there, whoever made it."""
    counts = [read_index(folder, shard) for shard in range(settings.shards)]
    if any(entries is None for entries in counts):
        return False
    shards = [
        {"name": shard_path(folder, shard, "tar").name, "images": len(entries) - 1, "bytes": int(entries[-1]["offset"])}
        for shard, entries in enumerate(counts)
        if entries is not None
    ]
    write_json(folder / "index.json", {"shards": shards, "images": sum(int(str(s["images"])) for s in shards)})
    return True


def _sample(
    source: Source, labels: npt.NDArray[np.int64] | None, index: int, settings: Settings, skipped: Skipped
) -> Sample | None:
    try:
        original = source.array(index)
    except BadImage as error:
        skipped.add(index, source.locate(index), str(error))
        return None
    height, width, _ = original.shape
    h, w = settings.size
    interpolation: Interpolation = settings.interpolation  # type: ignore[assignment]
    pixels = np.ascontiguousarray(resized(original, cover((height, width), (h, w)), interpolation))
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
    about = {"path": source.locate(index), "height": height, "width": width}
    files["json"] = json.dumps(about).encode("utf-8", "surrogateescape")
    return index, files, label, (pixels.shape[0], pixels.shape[1])
