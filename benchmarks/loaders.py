"""Compare pixmim's Loader with widely used loaders on the same resized images.

pip install webdataset litdata datasets        loaders that are not installed are skipped
python benchmarks/loaders.py --data FOLDER     photographs; copies are created in a temporary folder

Each loader reads the JPEGs of a cache (quality 95, shortest side 224) in its own format, decodes and shuffles them,
applies pixmim's simple resized crop, and yields uint8 batches of 64. Each has one persistent process or thread per
core. A measurement is 32 batches, after a warm-up of twice the number of batches that a loader prepares in advance.
Measurements are short, because the speed of shared machines drifts within a minute.

--decoder own          the others use their own decoder: torchvision for files and litdata, Pillow for the rest
--decoder simplejpeg   the others use pixmim's decoder

files       DataLoader over single files
webdataset  WebLoader over tar shards, batched in the workers
litdata     StreamingDataLoader over its chunks
datasets    DataLoader over a memory-mapped Arrow table, read batch by batch
pixmim      the Loader over the cache
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import simplejpeg
import torch
from PIL import Image
from timing import interleaved, machine
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import decode_image
from torchvision.transforms.v2.functional import pil_to_tensor

from pixmim.data import open_dataset
from pixmim.data.bad_images import BadImageLog
from pixmim.data.build_resized_cache import make_cache
from pixmim.data.dataset import Subset
from pixmim.data.loader import Loader
from pixmim.data.resized_cache import open_cache
from pixmim.data.sampler import BatchShard
from pixmim.data.shards.dataset import ShardDataset
from pixmim.transforms.crops import SimpleResizedCrop

BATCH, SIZE, TURN, AHEAD = 64, 224, 32, 4  # AHEAD: batches that each process prefetches
CROP = SimpleResizedCrop(SIZE)
WORKERS = os.cpu_count() or 1
PROCESSES: dict[str, Any] = {"num_workers": WORKERS, "persistent_workers": True, "prefetch_factor": AHEAD}

Batches = Iterator[Tensor]
"""Endless, uint8 (b h w c)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=8000, help="images per epoch")
    parser.add_argument("--chroma", choices=["444", "420"], default="444")
    parser.add_argument("--decoder", choices=["own", "simplejpeg"], default="own")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    source = open_dataset(options.data)
    count = min(options.images, len(source)) // BATCH * BATCH
    assert count, f"pass --data with at least {BATCH} photographs"
    chroma = ":".join(options.chroma)
    print(f"{machine()}, {WORKERS} cores; {count} images, {chroma}, median of {options.rounds}")
    own = options.decoder == "own"
    print(f"decoder of the others: {'their own' if own else 'simplejpeg'}")
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        subset, shard = Subset(source, range(count)), -(-count // (4 * WORKERS))  # four shards per worker
        make_cache(subset, folder / "cache", (SIZE, SIZE), chroma=options.chroma, per_shard=shard)
        cache = open_cache(folder / "cache")
        candidates: dict[str, Batches] = {"files": files(cache, folder / "files", own)}
        for name, prepare in PEERS.items():
            try:
                print(f"{name} {version(name)}")
            except PackageNotFoundError:
                print(f"{name} is not installed: skipped")
                continue
            candidates[name] = prepare(cache, folder / name, own)
        candidates["pixmim"] = pixmim(cache)
        seconds = interleaved(
            {name: partial(next, batches) for name, batches in candidates.items()},
            options.rounds,
            steps=TURN,
            warm=2 * AHEAD * WORKERS,
        )
    best = min(seconds, key=lambda name: seconds[name] if name != "pixmim" else float("inf"))
    for name, time in seconds.items():
        print(f"{name:<12}{BATCH / time:8.0f} images/s   {seconds[best] / time:5.2f} x {best}")


def decode_and_crop(jpeg: bytes) -> Tensor:
    """Decode a JPEG with pixmim's decoder and crop it, uint8 (h w c)."""
    return crop(torch.from_numpy(simplejpeg.decode_jpeg(jpeg)).permute(2, 0, 1))


def crop(image: Tensor) -> Tensor:
    """Crop an image (c h w), uint8 (h w c)."""
    return CROP.crop(image, torch.rand(CROP.num_uniforms).tolist()).permute(1, 2, 0)


def jpegs(cache: ShardDataset) -> Iterable[bytes]:
    """Yield the JPEG files of a cache."""
    for index in range(len(cache)):
        path, start, size = cache.extents(index)[0]
        with open(path, "rb") as tar:
            tar.seek(start)
            yield tar.read(size)


def repeat(loader: Iterable[Any]) -> Batches:
    """Repeat the batches of a loader."""
    while True:
        for batch in loader:
            assert batch.dtype == torch.uint8 and batch.shape[1:] == (SIZE, SIZE, 3)
            yield batch


def pixmim(cache: ShardDataset) -> Batches:
    skipped = BadImageLog(None, len(cache), 0.5)
    with Loader(cache, CROP, BatchShard(BATCH), skipped=skipped, threads=WORKERS) as batches:
        for batch in batches:
            yield batch.images.permute(0, 2, 3, 1)


class Folder(Dataset[Tensor]):
    """Dataset of single JPEG files."""

    def __init__(self, paths: list[str], own: bool) -> None:
        self.paths, self.own = paths, own

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        if self.own:
            return crop(decode_image(self.paths[index]))
        with open(self.paths[index], "rb") as file:
            return decode_and_crop(file.read())


def files(cache: ShardDataset, folder: Path, own: bool) -> Batches:
    return repeat(DataLoader(Folder(write_files(cache, folder), own), BATCH, shuffle=True, **PROCESSES))


def write_files(cache: ShardDataset, folder: Path) -> list[str]:
    """Write each JPEG of a cache to a file of its own; return the paths."""
    folder.mkdir()
    paths = [folder / f"{number:06d}.jpg" for number in range(len(cache))]
    for path, jpeg in zip(paths, jpegs(cache), strict=True):
        path.write_bytes(jpeg)
    return [str(path) for path in paths]


def webdataset(cache: ShardDataset, folder: Path, own: bool) -> Batches:
    import webdataset as wds

    shards = sorted({cache.extents(index)[0][0] for index in range(len(cache))})  # already in WebDataset's format
    data = wds.WebDataset(shards, shardshuffle=len(shards), select_files=is_jpeg, empty_check=False)
    data = data.shuffle(500).decode("torchrgb8") if own else data.shuffle(500)
    data = data.to_tuple("jpg").map_tuple(crop if own else decode_and_crop).batched(BATCH, collation_fn=stack_first)
    return repeat(wds.WebLoader(data, batch_size=None, **PROCESSES))


def is_jpeg(name: str) -> bool:
    return name.endswith(".jpg")


def stack_first(samples: list[tuple[Tensor]]) -> Tensor:
    return torch.stack([image for (image,) in samples])


def litdata(cache: ShardDataset, folder: Path, own: bool) -> Batches:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import Cache

    writer = Cache(str(folder), chunk_bytes="16MB")
    samples = map(Image.open, write_files(cache, folder.with_name("jpegs"))) if own else jpegs(cache)
    for index, sample in enumerate(samples):
        writer[index] = sample  # litdata stores the file of a PIL image
    writer.done()
    writer.merge()

    class Streamed(StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> Tensor:
            return (crop if own else decode_and_crop)(super().__getitem__(index))

    return repeat(StreamingDataLoader(Streamed(str(folder), shuffle=True), batch_size=BATCH, **PROCESSES))


def datasets(cache: ShardDataset, folder: Path, own: bool) -> Batches:
    from datasets import Dataset as Table
    from datasets import Features, Value, disable_progress_bars, load_from_disk
    from datasets import Image as ImageFeature

    disable_progress_bars()
    rows = [{"bytes": jpeg} if own else jpeg for jpeg in jpegs(cache)]
    table = Table.from_dict({"jpg": rows}, features=Features({"jpg": ImageFeature() if own else Value("binary")}))
    table.save_to_disk(folder)
    table = load_from_disk(folder)
    table.set_transform(crops)
    return repeat(DataLoader(table, BATCH, shuffle=True, collate_fn=stack_rows, **PROCESSES))


def crops(rows: dict[str, list[Any]]) -> dict[str, list[Tensor]]:
    """Crop encoded files, or images that datasets has decoded."""
    return {"crop": [decode_and_crop(x) if isinstance(x, bytes) else crop(pil_to_tensor(x)) for x in rows["jpg"]]}


def stack_rows(rows: list[dict[str, Tensor]]) -> Tensor:
    return torch.stack([row["crop"] for row in rows])


PEERS: dict[str, Callable[[ShardDataset, Path, bool], Batches]] = {
    "webdataset": webdataset,
    "litdata": litdata,
    "datasets": datasets,
}


if __name__ == "__main__":
    main()
