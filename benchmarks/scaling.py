"""Compute how MAE scales to several GPUs: time of computation and communication in a step, and the efficiency.

python benchmarks/scaling.py            nothing is measured: the models are built without memory, for their sizes

Assumptions, all of them flags: the model-FLOPs utilization of one GPU, its stated peak (H100), and the images in a step
of all GPUs. In NCCL's rings, each GPU sends (n - 1) / n of a buffer to gather it, the same to scatter its sum, and
twice that for an all-reduce. Rings use all network adapters of a node in parallel, so between nodes of eight GPUs the
rate is that of all adapters, but at most NVLink's. Latency (some microseconds per message) is ignored.

DDP    sums the float32 gradients of all weights once per step
FSDP2  gathers the bf16 weights for the forward pass and again for the backward pass, and scatters the sum of the
       float32 gradients

moved       bytes that each GPU sends in a step
hidden      share of the communication that overlaps with computation: for DDP the backward pass (two thirds of a step),
            except for the last bucket of 25 MiB; for FSDP2 all of it, except for gathering the first block and
            scattering the last one
efficiency  time of computation over time of a step: throughput of n GPUs over n times that of one
"""

import argparse

import torch
from steps import training_flops

import pixmim
from pixmim.training.parallelize import transformer_blocks

MODELS = {"ViT-B/16": "vit_base_patch16_224", "ViT-L/16": "vit_large_patch16_224", "ViT-H/14": "vit_huge_patch14_224"}
BUCKET = 25 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4096, help="images in a step, of all GPUs together")
    parser.add_argument("--mfu", type=float, default=0.35)
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP a second in bf16")
    parser.add_argument("--nvlink", type=float, default=350.0, help="GB a second and direction, of 450 stated")
    parser.add_argument("--network", type=float, default=45.0, help="GB a second of an adapter, of 400 Gbit = 50")
    options = parser.parse_args()
    print(
        f"computed, not measured: {options.batch} images of 224 px a step; {options.mfu:.0%} of {options.peak:.0f} "
        f"TFLOP/s; NVLink {options.nvlink:.0f} GB/s, a network adapter {options.network:.0f} GB/s"
    )
    clusters = {
        "8": (8, options.nvlink),
        "64, 8 adapters a node": (64, min(options.nvlink, 8 * options.network)),
        "64, 1 adapter a node": (64, min(options.nvlink, options.network)),
    }
    print(f"{'':<41}{'values':>9}{'compute':>11}{'moved':>10}{'takes':>11}{'hidden':>8}{'efficiency':>12}")
    for name, backbone in MODELS.items():
        (values, count), flops = sizes(backbone), training_flops("mae", backbone, 224)
        for cluster, (gpus, rate) in clusters.items():
            compute = options.batch / gpus * flops / (options.mfu * options.peak * 1e12)
            for kind, (moved, exposed) in {"DDP": ddp(values, gpus), "FSDP2": fsdp2(values, count, gpus)}.items():
                takes, shown = moved / (rate * 1e9), exposed / (rate * 1e9)
                cover = compute * (2 / 3 if kind == "DDP" else 1)
                shown = shown + max(0.0, takes - shown - cover)
                print(
                    f"{f'{name} on {cluster}, {kind}':<41}{values / 1e6:>7.0f} M{compute * 1e3:>8.0f} ms"
                    f"{moved / 1e9:>7.2f} GB{takes * 1e3:>8.1f} ms{1 - shown / takes:>8.0%}"
                    f"{compute / (compute + shown):>12.1%}"
                )


def sizes(backbone: str) -> tuple[int, int]:
    """Return the number of trained values of MAE, and of blocks that FSDP2 gathers one by one, decoder included."""
    with torch.device("meta"):
        model = pixmim.create_model("mae", backbone)
    return sum(p.numel() for p in model.parameters() if p.requires_grad), len(list(transformer_blocks(model)))


def ddp(values: int, gpus: int) -> tuple[float, float]:
    """Return the bytes that each GPU sends in a step, and those that are exposed: the last bucket."""
    ring = 2 * (gpus - 1) / gpus
    return ring * 4 * values, ring * min(BUCKET, 4 * values)


def fsdp2(values: int, count: int, gpus: int) -> tuple[float, float]:
    """Return the same for weights in `count` blocks: gathering the first and scattering the last are exposed."""
    ring = (gpus - 1) / gpus
    return ring * (2 * 2 + 4) * values, ring * (2 + 4) * values / count


if __name__ == "__main__":
    main()
