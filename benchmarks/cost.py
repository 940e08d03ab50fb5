"""Measure the cost of PixMIM's step against batch size, image size and model: MAE in the default precision.

python benchmarks/cost.py               one of the three varies, the others stay as on the first line

GFLOP/s  the products that the model needs over the time of a step; constant if cost is proportional to work
"""

import argparse
from functools import partial

import torch
from steps import Ours, training_flops
from timing import CLOCKS, interleaved, machine

from pixmim.training.precision import choose_device, choose_precision
from pixmim.utils.memory import retain_freed_memory

BACKBONES = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224", "vit_large_patch16_224")
SIZES = (96, 160, 224, 320, 448)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_small_patch16_224")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, help="128 on a GPU, otherwise 8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: for a CPU that others use too")
    options = parser.parse_args()
    retain_freed_memory()
    device = choose_device("auto")
    gpu = device.type == "cuda"
    batch, precision = options.batch or (128 if gpu else 8), choose_precision("auto", device)
    print(
        f"{machine()}, {precision}; {options.backbone} at {options.size} px, batch {batch}; median of {options.rounds}"
    )
    series = {
        "batch": [(options.backbone, options.size, count) for count in (batch // 8, batch // 2, batch, 2 * batch)],
        "image": [(options.backbone, size, batch) for size in SIZES],
        "model": [(backbone, options.size, batch) for backbone in BACKBONES],
    }
    for what, works in series.items():
        print(f"\n{what:<40}{'GFLOP an image':>16}{'images/s':>10}{'GFLOP/s':>10}")
        turns = {}
        for backbone, size, count in works:
            step = Ours("mae", backbone, size, precision, device)
            turns[f"{backbone}, {size} px, batch {count}"] = partial(
                step, torch.randn(count, 3, size, size, device=device)
            )
        seconds = interleaved(turns, options.rounds, CLOCKS[options.clock], 10 if gpu else 1)
        for (backbone, size, count), (name, time) in zip(works, seconds.items(), strict=True):
            flops = training_flops("mae", backbone, size) / 1e9
            print(f"{name:<40}{flops:>16.1f}{count / time:>10.1f}{flops * count / time:>10.0f}", flush=True)


if __name__ == "__main__":
    main()
