"""Compute what a large run needs, from the figures of one image, one GPU and one request. Nothing is measured.

python benchmarks/budget.py                 100 million images on 64 GPUs; every input can be given

Inputs are measured by other benchmarks of this folder, stated by a maker, or assumed: see docs/performance.md.
"""

import argparse
from collections.abc import Iterator

from scaling import MODELS, sizes
from steps import training_flops

from pixmim.data.sampler import WINDOW
from pixmim.data.shards.dataset import INDEX_DTYPE

INPUTS = {
    "images": (100e6, "images in the dataset"),
    "gpus": (64, "GPUs"),
    "node": (8, "GPUs in a node"),
    "epochs": (800, "epochs"),
    "batch": (4096, "images in a step"),
    "peak": (989e12, "FLOP/s of a GPU in bf16"),
    "mfu": (0.35, "share of it that is reached"),
    "image-bytes": (45_179, "bytes of a stored image"),
    "core-us": (667, "microseconds of a core to read, decode and crop an image"),
    "shard-images": (2_000, "images in a shard"),
    "path-bytes": (34.7, "bytes of a path in a list"),
    "latency": (0.15, "seconds of a small request to object storage"),
    "threads": (16, "requests at the same time when indexes are read"),
    "store-requests": (5_500, "requests per second that object storage answers for one prefix"),
    "adapter": (45e9, "bytes per second of a node's network adapter"),
    "disk": (1e9, "bytes per second of the storage of checkpoints"),
    "save-seconds": (600, "seconds between checkpoints"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="ViT-B/16")
    for name, (value, text) in INPUTS.items():
        parser.add_argument(f"--{name}", type=float, default=value, help=f"{text} ({value:g})")
    options = vars(parser.parse_args())
    for line in budget(options.pop("model"), **options):
        print(line)


def budget(model: str, **inputs: float) -> Iterator[str]:
    """Yield a line for each need: its name, its value, and its formula."""
    i = {name.replace("-", "_"): value for name, (value, _) in INPUTS.items()} | inputs
    flops, (values, _) = training_flops("mae", MODELS[model], 224), sizes(MODELS[model])
    rate, nodes = i["mfu"] * i["peak"] / flops, i["gpus"] / i["node"]
    total, shards, stored = rate * i["gpus"], i["images"] / i["shard_images"], i["images"] * i["image_bytes"]
    index = INDEX_DTYPE.itemsize + 2 * 4 + 1  # with the height and width of each image, and whether it was read
    saved = 3 * 4 * values

    def line(name: str, value: str, formula: str) -> str:
        return f"{name:<34}{value:>17}   {formula}"

    yield f"{i['images'] / 1e6:,.0f} million images, {model} on {i['gpus']:.0f} GPUs, {i['node']:.0f} in a node"
    yield line("images/s of a GPU", f"{rate:,.0f}", f"mfu x peak / {flops / 1e9:.1f} GFLOP")
    yield line("images/s of all", f"{total:,.0f}", "gpus x that")
    yield line("step", f"{i['batch'] / total * 1e3:.1f} ms", "batch / images/s of all")
    yield line("epoch", f"{i['images'] / total / 60:.1f} min", "images / images/s of all")
    yield line("run", f"{i['epochs'] * i['images'] / total / 3600:.0f} h", "epochs x that")
    yield line("cores of a node for images", f"{rate * i['node'] * i['core_us'] / 1e6:.0f}", "images/s x core-us")
    yield line("stored", f"{stored / 1e12:.1f} TB", "images x image-bytes")
    yield line("shards", f"{shards:,.0f}", "images / shard-images")
    yield line("a shard", f"{i['shard_images'] * i['image_bytes'] / 1e6:.0f} MB", "shard-images x image-bytes")
    windows = 2 * WINDOW * i["shard_images"] * i["image_bytes"]
    yield line("shard cache of a node, at least", f"{windows / 1e9:.1f} GB", f"two windows of {WINDOW} shards")
    full, single = total * i["image_bytes"], total * i["image_bytes"] / nodes
    yield line("network, full shards", f"{full / 1e9:.1f} GB/s a node", "every node reads every shard")
    yield line("  of its adapter", f"{full / i['adapter']:.0%}", "that / adapter")
    yield line("  from the storage", f"{full * nodes / 1e9:.0f} GB/s", "nodes x that")
    yield line("network, single images", f"{single / 1e9:.1f} GB/s a node", "a node reads its own images")
    yield line("  requests", f"{total:,.0f}/s", "one for an image")
    yield line("  prefixes of the storage", f"{total / i['store_requests']:.0f}", "requests / store-requests")
    yield line("memory of the index", f"{i['images'] * index / 1e9:.1f} GB a GPU", f"{index} bytes x images")
    yield line("  in a node", f"{i['images'] * index * i['node'] / 1e9:.0f} GB", "node x that")
    yield line("  or of a list of files", f"{i['images'] * i['path_bytes'] / 1e9:.1f} GB a GPU", "path-bytes x images")
    yield line("memory of the order", f"{4 * 8 * shards / 1e6:.1f} MB a GPU", "32 bytes x shards, none for files")
    requests = shards * i["latency"] / i["threads"]
    yield line("start: indexes from object storage", f"{requests:.0f} s", "shards x latency / threads")
    yield line("checkpoint", f"{saved / 1e9:.2f} GB", f"12 bytes x {values / 1e6:.0f} million values")
    yield line("  of a rank", f"{saved / i['gpus'] / 1e6:.0f} MB", "that / gpus")
    yield line("  written in", f"{saved / i['disk']:.1f} s", "checkpoint / disk, while training continues")
    yield line("  lost by a fault, on average", f"{i['save_seconds'] / 2 / 60:.0f} min", "save-seconds / 2")


if __name__ == "__main__":
    main()
