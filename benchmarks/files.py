"""Measure what many files cost: memory and time of a list or a folder, of an epoch's order, and of a resume within it.

python benchmarks/files.py                  ten million; no image is read
python benchmarks/files.py --kind folder    the folder is simulated: os.scandir returns made-up entries

Each size is measured in a process of its own, in seconds of a core. `peak` is the memory that opening takes at most,
`kept` what remains.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from pixmim.data import open_dataset
from pixmim.data.sampler import BatchShard, CropSampler

BATCH, PER_FOLDER = 4096, 1_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--kind", choices=("list", "folder"), nargs="+", default=["list", "folder"])
    parser.add_argument("--alone", action="store_true", help="measure one kind and one size in this process")
    options = parser.parse_args()
    if options.alone:
        measure(options.kind[0], options.files[0])
        return
    print(f"{'':<20}{'opened in':>11}{'peak':>9}{'kept':>9}{'a file':>8}{'epoch':>9}{'resume':>10}", flush=True)
    for kind in options.kind:
        for count in options.files:
            subprocess.run([sys.executable, __file__, "--alone", "--kind", kind, "--files", str(count)], check=True)


def measure(kind: str, count: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        open_dataset("shapes:count=1")
        before = resident()
        with {"list": listed, "folder": simulated}[kind](Path(folder), count) as spec:
            start = time.process_time()
            data = open_dataset(spec)
            opened = time.process_time() - start
        peak, kept = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, resident() - before
        assert len(data) == count
    start = time.process_time()
    seen = np.zeros(count, bool)
    sampler, shard = CropSampler(0, count, None, 4, 0.5), BatchShard(BATCH)
    for step in range(count // BATCH):
        seen[sampler.samples(shard.positions(step)).indices] = True
    epoch = time.process_time() - start
    assert seen.sum() == count // BATCH * BATCH
    start = time.process_time()
    middle = CropSampler(0, count, None, 4, 0.5).samples(BatchShard(BATCH, count // 2).positions(0)).indices
    resume = time.process_time() - start
    assert len(data.path_of(int(middle[0]))) > 10
    print(
        f"{f'{kind}, {count / 1e6:.0f} million':<20}{opened:>9.1f} s{peak / 1e6:>6.0f} MB{kept / 1e6:>6.0f} MB"
        f"{kept / count:>6.1f} B{epoch:>7.1f} s{resume * 1e3:>7.1f} ms",
        flush=True,
    )


@contextmanager
def listed(folder: Path, count: int) -> Iterator[str]:
    """Write a list with the names of ImageNet, of 28 characters."""
    with (folder / "list.txt").open("w") as file:
        file.writelines(
            f"n{i // PER_FOLDER:08d}/n{i // PER_FOLDER:08d}_{i % PER_FOLDER:03d}.JPEG\n" for i in range(count)
        )
    yield str(folder / "list.txt")


@contextmanager
def simulated(folder: Path, count: int) -> Iterator[str]:
    """Let a folder have subfolders of a thousand images."""
    real_stat, real_scandir = os.stat, os.scandir  # for all but the walk, whose paths are bytes

    def entry(path: bytes, name: bytes, is_folder: bool) -> Any:
        return SimpleNamespace(name=name, path=path + name, is_dir=lambda **_: is_folder, is_symlink=lambda: False)

    def scandir(path: Any) -> Any:
        if not isinstance(path, bytes):
            return real_scandir(path)
        top = os.path.basename(path[:-1])
        if path != os.path.join(os.fsencode(folder), b""):
            return nullcontext(entry(path, top + b"_%03d.JPEG" % i, False) for i in range(PER_FOLDER))
        return nullcontext(entry(path, b"n%08d" % i, True) for i in range(count // PER_FOLDER))

    def stat(path: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(path, bytes) and path.startswith(os.fsencode(folder) + b"/n"):
            return SimpleNamespace(st_dev=1, st_ino=hash(path))
        return real_stat(path, *args, **kwargs)

    with mock.patch("os.scandir", scandir), mock.patch("os.stat", stat):
        yield str(folder)


def resident() -> int:
    """Return the bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    main()
