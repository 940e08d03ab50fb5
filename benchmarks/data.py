"""Compare the throughput of a folder and of its caches with the official MAE pipeline, in images/s.

python benchmarks/data.py --data FOLDER        full-size photographs; caches are created in a temporary folder

official   DataLoader, one process per core: PIL, torchvision's RandomResizedCrop (bicubic), ToTensor, Normalize
pixmim     Loader, which yields uint8 and masks; the device flips and normalizes

of a core  processor time for an image, of all threads together; and how many cores 6,000 images/s need
"""

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timing import interleaved, least, machine
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from pixmim.data import open_dataset
from pixmim.data.bad_images import BadImageLog
from pixmim.data.build_resized_cache import make_cache
from pixmim.data.dataset import ImageDataset, InMemoryDataset
from pixmim.data.image_folder import ImageFolder
from pixmim.data.loader import Loader
from pixmim.data.sampler import BatchShard
from pixmim.masking import MaskSampler, RandomMask
from pixmim.transforms.crops import Crop, RandomResizedCrop, SimpleResizedCrop

BATCH, SIZE = 256, 224


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=2048, help="images per measurement")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{machine()}, {os.cpu_count()} cores; median of {options.rounds}")
    folder = open_dataset(options.data)
    assert isinstance(folder, ImageFolder), "pass --data with a folder of full-size photographs, or a .txt list"
    count = options.images // BATCH * BATCH
    src, rrc = SimpleResizedCrop(SIZE), RandomResizedCrop(SIZE)
    with tempfile.TemporaryDirectory() as where:
        caches: dict[str, ImageDataset] = {}
        settings: dict[str, dict[str, Any]] = {"4:4:4": {}, "4:2:0": {"chroma": "420"}, "raw": {"kind": "raw"}}
        for name, kind in settings.items():
            made = make_cache(folder, Path(where) / name, (SIZE, SIZE), **kind)
            caches[name] = open_dataset(str(Path(where) / name))
            rate, size = made.images / made.seconds, made.bytes / made.images
            print(f"cache {name}: made at {rate:.0f} images/s, {size:,.0f} bytes per image")
        kept = InMemoryDataset(caches["4:4:4"])
        long = 10 * count  # images for fast candidates, so that the startup time is negligible
        candidates = {
            "official, from the folder": (official(folder, count), count),
            "pixmim RRC, from the folder": (ours(folder, rrc, count), count),
            "pixmim SRC, from the folder": (ours(folder, src, count), count),
            **{f"pixmim SRC, cache {name}": (ours(data, src, count), count) for name, data in caches.items()},
            "pixmim SRC, cache raw": (ours(caches["raw"], src, long), long),
            "pixmim SRC, cache 4:4:4 in memory": (ours(kept, src, long), long),
        }
        seconds = interleaved({name: turn for name, (turn, _) in candidates.items()}, options.rounds)
        cores = {
            name: least(turn, options.rounds, time.process_time) / images
            for name, (turn, images) in candidates.items()
            if name.startswith("pixmim")  # the processes of the official pipeline are not this one
        }
    print(f"{len(folder)} images at {SIZE} px")
    rates = {name: images / seconds[name] for name, (_, images) in candidates.items()}
    for name, rate in rates.items():
        line = f"{name:<36}{rate:9.0f} images/s   {rate / rates['official, from the folder']:6.1f} x official"
        if cost := cores.get(name):
            line += f"   {cost * 1e6:5.0f} us of a core   {6000 * cost:4.1f} for 6,000/s"
        print(line)


class Official(Dataset[torch.Tensor]):
    """MAE's published transform."""

    def __init__(self, folder: ImageFolder) -> None:
        self.paths = [folder.path_of(i) for i in range(len(folder))]
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(SIZE, scale=(0.2, 1.0), interpolation=3),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            ]
        )

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[index % len(self.paths)]).convert("RGB"))


def official(folder: ImageFolder, count: int) -> Callable[[], None]:
    loader = DataLoader(Official(folder), batch_size=BATCH, num_workers=os.cpu_count() or 1)
    return lambda: take(iter(loader), count)


def ours(source: ImageDataset, crop: Crop, count: int) -> Callable[[], None]:
    def run() -> None:
        skipped = BadImageLog(None, len(source), 0.5)
        masks = MaskSampler(RandomMask(), (SIZE // 16, SIZE // 16), 0, BATCH)
        with Loader(source, crop, BatchShard(BATCH), skipped=skipped, masks=masks.at) as loader:
            take(loader, count)

    return run


def take(batches: Iterator[Any], count: int) -> None:
    for _ in itertools.islice(batches, count // BATCH):
        pass


if __name__ == "__main__":
    main()
