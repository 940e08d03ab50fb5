"""Time what a training step costs the host, which must stay ahead of a GPU: Python, autograd and the dispatcher.

python benchmarks/host.py               steps with next to no arithmetic on one core, and the masks of an image
python benchmarks/host.py --compile     also with compiled blocks, as on a GPU by default; compiling takes minutes

The models have the depth of a ViT-B and a ViT-L with MAE's decoder, a width of 24, and one image of four patches. On a
GPU, launches take the place of the arithmetic that is left. Times are of the processor; `least` is what remains when no
other process disturbs.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from steps import Compile, Ours
from timing import least, machine
from torch import Tensor

from pixmim.mask_patterns import GreenNoiseMask
from pixmim.masking import BlockwiseRandomMask, MaskGenerator, MaskSampler, RandomMask
from pixmim.utils.memory import retain_freed_memory

SIZE, WIDTH = 32, 24
DEPTHS = {"ViT-B": 12, "ViT-L": 24}
MASKS: dict[str, MaskGenerator] = {
    "random": RandomMask(0.75),
    "blocks of 2 x 2": BlockwiseRandomMask(0.75, 2),
    "green noise": GreenNoiseMask(0.75),
}
GRID, BATCH = (14, 14), 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="also measure compiled blocks")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: with the casts of a GPU")
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    retain_freed_memory()
    torch.set_num_threads(1)
    print(f"{machine()}; {options.precision}; median of {options.rounds}, ms of the processor")
    print(f"{'a step of':<22}{'forward':>9}{'loss':>9}{'backward':>9}{'update':>9}{'all':>9}{'least':>9}")
    kinds: list[Compile] = ["none", "blocks"] if options.compile else ["none"]
    steps = {
        f"{name}{', compiled' * (kind != 'none')}": host_step(depth, kind, options.precision)
        for kind in kinds
        for name, depth in DEPTHS.items()
    }
    times: dict[str, list[list[float]]] = {name: [] for name in steps}
    images = torch.randn(1, 3, SIZE, SIZE)
    for turn in range(options.rounds + 5):
        for name, step in steps.items():  # in turns: a drift of the machine affects all
            stages = staged(step, images)
            if turn >= 5:
                times[name].append(stages)
    for name, rounds in times.items():
        medians = [statistics.median(stage) * 1e3 for stage in zip(*rounds, strict=True)]
        print(f"{name:<22}{''.join(f'{ms:9.2f}' for ms in medians)}{min(each[-1] for each in rounds) * 1e3:9.2f}")
    print(f"masks of {GRID[0]} x {GRID[1]} patches, in batches of {BATCH}: least us an image")
    for name, generator in MASKS.items():
        sampler = MaskSampler(generator, GRID, 0, BATCH)
        seconds = least(lambda: sampler(0, range(BATCH)), options.rounds, time.process_time)  # noqa: B023
        print(f"{name:<22}{seconds / BATCH * 1e6:9.2f}")


def host_step(depth: int, compile: Compile, precision: str) -> Ours:
    sizes: dict[str, Any] = {"embed_dim": WIDTH, "num_heads": 2, "decoder_dim": WIDTH, "decoder_heads": 2}
    return Ours(
        "mae", "vit_base_patch16_224", SIZE, precision, torch.device("cpu"), None, compile, depth=depth, **sizes
    )


def staged(step: Ours, images: Tensor) -> list[float]:
    """Return the seconds of forward pass, loss, backward pass and update, and of all four."""
    mask = step.masks(len(images))
    marks = [time.process_time()]

    def mark(run: Callable[[], Tensor | None]) -> Tensor:
        result = run()
        marks.append(time.process_time())
        return result if result is not None else images

    prediction = mark(lambda: step.predict(images, mask))
    loss = mark(lambda: step.loss(prediction, images, mask))
    mark(lambda: step.backward(loss))
    mark(step.update)
    return [*(after - before for before, after in pairwise(marks)), marks[-1] - marks[0]]


if __name__ == "__main__":
    main()
