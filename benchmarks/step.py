"""Time a training step of MAE (forward, backward, optimizer) against other implementations, and with real data.

python benchmarks/step.py                                     a tiny ViT at 64 px, batch 128
python benchmarks/step.py --backbone vit_base_patch16_224 --size 224 --patch 16 --batch 16 --rounds 3

On a GPU, with all details:

python benchmarks/step.py --backbone vit_base_patch16_224 --size 224 --patch 16 --batch 256 --data FOLDER \\
    --compile --profile

plain MAE     a direct implementation of the paper (plain_mae.py)
transformers  its ViTMAEForPreTraining
lightly       its modules for MAE, if installed: pip install lightly

MFU  model-FLOPs utilization: the products that the model needs (of visible patches only, for all candidates) over the
     throughput of one large product in the same precision; on a GPU also over the vendor's peak for bf16
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from plain_mae import PlainMAE
from steps import COMPILE, Compile, Ours, Step, huggingface_mae, memory, theirs, training_flops
from timing import CLOCKS, interleaved, largest_costs, machine, product_rate, stated_peak
from torch import Tensor, nn

import pixmim
from pixmim.data import open_dataset
from pixmim.data.bad_images import BadImageLog
from pixmim.data.build_resized_cache import make_cache
from pixmim.data.loader import Loader
from pixmim.data.sampler import BatchShard
from pixmim.data.shards.dataset import ShardDataset
from pixmim.targets import IMAGENET_MEAN, IMAGENET_STD
from pixmim.training.precision import choose_device, choose_precision
from pixmim.transforms.crops import SimpleResizedCrop, flip_and_normalize
from pixmim.utils.memory import retain_freed_memory

PIXMIM = "pixmim PixMIM"


class Row(NamedTuple):
    """A candidate: its step, its precision, and the model that it trains."""

    step: Step
    precision: str
    model: nn.Module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--patch", type=int, default=8)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="in a turn; 10 on a GPU, otherwise 1")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="processor: for a CPU that others use too")
    parser.add_argument("--data", help="images or a cache of them; drawn ones if left out")
    parser.add_argument(
        "--compile", nargs="?", const="full", choices=COMPILE, default="none", help="all in half precision"
    )
    parser.add_argument("--profile", action="store_true", help="print what takes pixmim's time")
    options = parser.parse_args()
    retain_freed_memory()
    device = choose_device("auto")
    fast = choose_precision("auto", device)
    options.steps = options.steps or (10 if device.type == "cuda" else 1)
    images = torch.randn(options.batch, 3, options.size, options.size, device=device)
    rows, target = candidates(options, device, fast), pixmim.LowFrequency("auto")
    turns: dict[str, Callable[[], object]] = {name: partial(row.step, images) for name, row in rows.items()}
    seconds = interleaved(
        {**turns, "target": lambda: target(images)}, options.rounds, CLOCKS[options.clock], options.steps
    )

    about = f"{options.backbone} at {options.size} px, patch {options.patch}, batch {options.batch}; {machine()}"
    print(about + (f"; {fast} compiled: {options.compile}" if options.compile != "none" else ""))
    table(options, rows, seconds, images)
    ours = f"{PIXMIM}, {fast}"
    spent = seconds["target"] / seconds[ours]
    print(f"PixMIM's target takes {seconds['target'] * 1e3:.1f} ms, {spent:.2%} of a step in {fast}")
    verdict(seconds, fast)
    with_data(options, rows[ours].step, images)
    if options.profile:
        for name, share in largest_costs(turns[ours], device, 25):
            print(f"{share:6.1%}  {name}")


def candidates(options: argparse.Namespace, device: torch.device, fast: str) -> dict[str, Row]:
    """Return all candidates in float32 and in the precision that pixmim chooses on this device."""
    rows: dict[str, Row] = {}
    others, thin = peers(), decoder(options.backbone)
    for precision in dict.fromkeys(("fp32", fast)):
        compile: Compile = options.compile if precision == fast else "none"
        for name, target in (("pixmim MAE", pixmim.Pixels()), (PIXMIM, None)):
            ours = Ours("mae", options.backbone, options.size, precision, device, target, compile, **shape(options))
            rows[f"{name}, {precision}"] = Row(ours, precision, ours.model)
        vit: Any = ours.model.encoder
        sizes = (options.size, options.patch, vit.embed_dim, len(vit.blocks), vit.blocks[0].attn.num_heads, thin)
        for name, build in others.items():
            model = build(*sizes)
            rows[f"{name}, {precision}"] = Row(theirs(model, precision, device, compile), precision, model)
    return rows


def peers() -> dict[str, Callable[..., nn.Module]]:
    """Return constructors of the installed peers, called with size, patch, width, depth, heads and decoder."""
    found: dict[str, Callable[..., nn.Module]] = {"plain MAE": PlainMAE, "transformers": huggingface_mae}
    try:
        from lightly_mae import LightlyMAE
    except ImportError as error:
        print(f"lightly's row is left out ({error}): pip install lightly")
        return found
    return {**found, "lightly": LightlyMAE}


def shape(options: argparse.Namespace) -> dict[str, Any]:
    """Return the sizes of the model as options of `create_model`."""
    width, depth, heads = decoder(options.backbone)
    return {"patch_size": options.patch, "decoder_dim": width, "decoder_depth": depth, "decoder_heads": heads}


def decoder(backbone: str) -> tuple[int, int, int]:
    """Return width, depth and heads of the published decoder, or of a thin one for tiny encoders."""
    return (128, 4, 4) if "tiny" in backbone else (512, 8, 16)


def table(options: argparse.Namespace, rows: dict[str, Row], seconds: dict[str, float], images: Tensor) -> None:
    flops = training_flops("mae", options.backbone, options.size, **shape(options))
    clock = CLOCKS[options.clock]
    peaks = {p: product_rate(images.device, p, clock) for p in dict.fromkeys(row.precision for row in rows.values())}
    reached = ", ".join(f"{peak / 1e12:.3g} TFLOP/s in {precision}" for precision, peak in peaks.items())
    print(f"{flops / 1e9:.1f} GFLOP a training image; a large product reaches {reached}")
    stated, base = stated_peak(), seconds["plain MAE, fp32"]
    for name, row in rows.items():
        rate = len(images) / seconds[name]
        line = f"{name:<22}{seconds[name] * 1e3:9.1f} ms {rate:9.1f} images/s {base / seconds[name]:6.2f} x plain"
        line += f"   MFU {flops * rate / peaks[row.precision]:4.0%}"
        if stated:
            line += f", {flops * rate / stated:.1%} of {stated / 1e12:.0f}"
        if images.device.type == "cuda":
            line += f"   {memory(row.step, row.model, images) / 2**30:5.1f} GiB"
        print(line)


def verdict(seconds: dict[str, float], fast: str) -> None:
    """Print how the best of pixmim compares with the best peer."""
    for ours, precision in dict.fromkeys((("fp32", "fp32"), (fast, fast), (fast, "fp32"))):
        others = {name: time for name, time in seconds.items() if name.endswith(precision) and "pixmim" not in name}
        best = min(others, key=others.__getitem__)
        ratio = others[best] / seconds[f"{PIXMIM}, {ours}"]
        print(f"{PIXMIM}, {ours}: {ratio:.2f} x the best of the others in {precision} ({best.split(',')[0]})")


def with_data(options: argparse.Namespace, step: Step, images: Tensor) -> None:
    """Time the step on crops from a cache, as in `pretrain`, and print the share of the rate without loading."""
    device = images.device
    mean, std = (torch.tensor(values, device=device) for values in (IMAGENET_MEAN, IMAGENET_STD))
    count = max(512, 4 * options.batch)
    source = open_dataset(options.data or f"shapes:count={count},size={options.size}")
    with tempfile.TemporaryDirectory() as where:
        if not isinstance(source, ShardDataset):
            make_cache(source, Path(where), (options.size, options.size))
            source = open_dataset(where)
        skipped = BadImageLog(None, len(source), 0.5)
        with Loader(
            source, SimpleResizedCrop(options.size), BatchShard(options.batch), skipped=skipped, device=device
        ) as batches:

            def fed() -> None:
                batch = next(batches)
                crops, flip = (t.to(device, non_blocking=True) for t in (batch.images, batch.flip))
                step(flip_and_normalize(crops, flip, mean, std))

            turns: dict[str, Callable[[], object]] = {"synthetic": partial(step, images), "cached": fed}
            # The loader is two batches ahead: what it did while the other's turn lasted must not count.
            seconds = interleaved(turns, -(-options.rounds // 2), CLOCKS[options.clock], max(2, options.steps), warm=3)
    rate, left = options.batch / seconds["cached"], seconds["synthetic"] / seconds["cached"]
    dataset_name = options.data or "synthetic images"
    print(f"from a cache of {dataset_name}: {rate:.1f} images/s, {left:.1%} of the rate without data")


if __name__ == "__main__":
    main()
