"""Compare the feature extraction of evaluations with a bare forward loop, on cached images.

python benchmarks/features.py --data FOLDER        labeled photographs; the cache is created in a temporary folder

bare        the encoder's forward pass over batches in memory that are already decoded, cropped and normalized
extract     `extract_features`: reads, decodes, crops, normalizes, and keeps the outputs of the last four blocks
reading     the same without the encoder
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from timing import CLOCKS, interleaved, machine
from torch import Tensor

from pixmim.build import build_encoder
from pixmim.config import ArchitectureConfig, PretrainConfig
from pixmim.data import open_dataset
from pixmim.data.bad_images import BadImageLog
from pixmim.data.build_resized_cache import make_cache
from pixmim.data.dataset import ImageDataset, Subset
from pixmim.data.loader import iterate_in_order
from pixmim.evaluation.context import extract_features
from pixmim.evaluation.frozen_encoder import FrozenEncoder, wrap_live_encoder
from pixmim.training.precision import autocast, choose_attention, choose_device, choose_precision
from pixmim.transforms.crops import evaluation_crop
from pixmim.utils.memory import retain_freed_memory

BACKBONES = ("vit_small_patch16_224", "vit_base_patch16_224", "swin_tiny_patch4_window7_224")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: for a shared CPU")
    options = parser.parse_args()
    print(f"{machine()}, {os.cpu_count()} cores; {options.images} images at 224 px")
    print(f"median of {options.rounds}, {options.clock} time; batches of {options.batch}")
    source = open_dataset(options.data)
    with tempfile.TemporaryDirectory() as where:
        subset = Subset(source, range(min(options.images, len(source))))
        make_cache(subset, Path(where) / "cache", (256, 256))  # evaluations resize to 256/224 of the encoder's size
        cache = open_dataset(f"{where}/cache")
        for backbone in BACKBONES:
            encoder = build_frozen_encoder(backbone)
            seconds = interleaved(
                candidates(encoder, cache, options.batch), options.rounds, clock=CLOCKS[options.clock]
            )
            print(f"{backbone}, {encoder.precision}")
            for name, time in seconds.items():
                print(f"  {name:<10}{len(cache) / time:8.1f} images/s   {seconds['bare'] / time:6.3f} x bare")


def build_frozen_encoder(backbone: str) -> FrozenEncoder:
    run = PretrainConfig(model=ArchitectureConfig("simmim" if "swin" in backbone else "mae", backbone))
    retain_freed_memory()
    device = choose_device("auto")
    precision = choose_precision("auto", device)
    module = build_encoder(run).to(device).eval()
    choose_attention(module, device, precision)
    return wrap_live_encoder(run, module, device, precision)


def candidates(encoder: FrozenEncoder, cache: ImageDataset, batch: int) -> dict[str, Callable[[], None]]:
    batches = [encoder.preprocess(images) for images in read(encoder, cache, batch)]

    @torch.no_grad()
    def bare() -> None:
        with autocast(encoder.device, encoder.precision):
            for images in batches:
                encoder.module(images)

    def extract() -> None:
        extract_features(encoder, cache, batch=batch)

    def reading() -> None:
        for _ in read(encoder, cache, batch):
            pass

    return {"bare": bare, "extract": extract, "reading": reading}


def read(encoder: FrozenEncoder, cache: ImageDataset, batch: int) -> Iterator[Tensor]:
    for images, _, _ in iterate_in_order(
        cache, evaluation_crop(encoder.size), skipped=BadImageLog(None, len(cache), 0.5), batch=batch
    ):
        yield images


if __name__ == "__main__":
    main()
