"""Several GPUs, on paper: how long a step of MAE computes, how long it communicates, and what is left of n times one.

python benchmarks/scaling.py            nothing is measured; only the models' sizes are made

What is assumed, and can be given: the model-FLOPs utilisation of one GPU, its stated peak (H100), and images in a step
of all together. In NCCL's rings each GPU sends (n - 1) / n of a buffer to gather it, as much to scatter its sum, and
twice that to sum it everywhere. Rings run over all network adapters of a node side by side, so between nodes of eight
GPUs the rate is that of all adapters together, but never more than NVLink's. Latency, some microseconds a message, is
left out.

DDP    sums the float32 gradients of all weights, once a step
FSDP2  gathers the bf16 weights for the forward pass and again for the backward pass, and scatters the sum of the
       float32 gradients

moved       bytes that each GPU sends in a step
hidden      the share of the communication beside which there is something to compute: for DDP the backward pass (two
            thirds of a step), but for the last bucket of 25 MiB; for FSDP2 all of it, but for the first block's
            gathering and the last one's scattering
efficiency  computation over the whole step: what n GPUs reach of n times one
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
    """Values of MAE that have a gradient, and blocks that FSDP2 gathers one by one; the decoder's, too."""
    with torch.device("meta"):
        model = pixmim.create_model("mae", backbone)
    return sum(p.numel() for p in model.parameters() if p.requires_grad), len(list(transformer_blocks(model)))


def ddp(values: int, gpus: int) -> tuple[float, float]:
    """Bytes that each GPU sends in a step, and those of them that nothing can cover: the last bucket's."""
    ring = 2 * (gpus - 1) / gpus
    return ring * 4 * values, ring * min(BUCKET, 4 * values)


def fsdp2(values: int, count: int, gpus: int) -> tuple[float, float]:
    """The same for weights in `count` shards: the first one's gathering and the last one's scattering have no cover."""
    ring = (gpus - 1) / gpus
    return ring * (2 * 2 + 4) * values, ring * (2 + 4) * values / count


if __name__ == "__main__":
    main()
