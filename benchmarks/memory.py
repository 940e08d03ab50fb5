"""What training takes of memory: reckoned from steps of a few images, against what steps of many then really took.

python benchmarks/memory.py                                 five recipes, with as many images as a CPU does in seconds
python benchmarks/memory.py pixmim-vit-base --images 256

Each recipe has a process of its own. Taken is, on a CUDA device, the most that torch had allocated; on a CPU, what the
process grew by at its fullest moment, the weights included.
"""

import argparse
import subprocess
import sys

import torch
from timing import machine

from pixmim.engine.device import choose_device, choose_precision
from pixmim.engine.memory.footprint import measure
from pixmim.engine.memory.malloc import give_back
from pixmim.engine.optim import Updater, adamw
from pixmim.method import Method
from pixmim.recipes import get_recipe

RECIPES = {
    "demo": 512,
    "pixmim-vit-small": 32,
    "pixmim-vit-base": 16,
    "pixmim-convmae-base": 12,
    "pixmim-simmim-swin-base": 8,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--images", type=int, default=0)
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        row(options.recipes[0], options.images)
        return
    device = choose_device("auto")
    print(f"{machine()}; {choose_precision('auto', device)}; MiB")
    print(
        f"{'':<26}{'fixed':>8}{'an image':>10}{'images':>8}{'reckoned':>10}{'taken':>8}{'fit at once':>13}", flush=True
    )
    for name in options.recipes:
        images = str(options.images or RECIPES.get(name, 16))
        subprocess.run([sys.executable, __file__, name, "--images", images, "--row"], check=True)


def row(name: str, images: int) -> None:
    """Measure in this process, and print a line of the table."""
    run = get_recipe(name)
    method = Method.of(run)
    model, device = method.model, method.device
    updater = Updater(adamw(model, run.lr, run.optim.betas, run.optim.weight_decay), run.optim.clip, False, device)

    found = measure(method.trial, device, model.parameters())
    give_back()  # what the measurement has given back does not count as taken before
    before = resident("VmRSS") - sum(p.numel() * p.element_size() for p in model.parameters())
    for _ in range(2):
        method.trial(images)
        updater.step(run.lr)
    taken = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM") - before
    sizes = found.fixed, found.per_image, found.needs(images), taken
    fixed, each, reckoned, grown = (size / 2**20 for size in sizes)
    print(f"{name:<26}{fixed:>8,.0f}{each:>10,.1f}{images:>8}{reckoned:>10,.0f}{grown:>8,.0f}", end="")
    print(f"{found.fitting(1 << 20):>13,}", flush=True)


def resident(which: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at the most so far (VmHWM), as Linux counts them."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


if __name__ == "__main__":
    main()
