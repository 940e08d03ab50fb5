"""Training by several processes: what each adds in images is learnt from as by one process; and what it costs to agree.

python benchmarks/ranks.py              1, 2 and 4 processes on this CPU, over gloo, 16 images each: for correctness
python benchmarks/ranks.py --paper      what 8 and 64 GPUs send each other in a step, against what they compute

The processes share the cores of one machine here, so their speed says nothing about several machines.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from pixmim.engine.runlog import read_metrics
from pixmim.grid import grid_of
from pixmim.parts import build_masker, build_model, draw_masks
from pixmim.recipes import get_recipe

EACH, STEPS = 16, 8

MULTIPLIES = 989e12 * 0.35
"""Operations a second of one H100: in bf16, at a good share of what it can."""
SENDS = {8: 450e9, 64: 400e9}
"""Bytes a second that a GPU sends: over NVLink in a machine; between machines all eight share eight times 400 Gbit/s,
and a ring crosses from one to the next once for each of them."""
BATCH = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paper", action="store_true")
    if parser.parse_args().paper:
        paper()
        return
    print(f"demo in float32 over gloo, {EACH} images for each process, {STEPS} updates; against one process")
    print(f"{'processes':>9}{'batch':>7}  {'':<6}{'loss':>10}{'differs by':>12}{'weights differ by':>19}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2, 4):
            alone = train(Path(folder) / f"{count}", 1, count, "--accumulate", str(count))
            for way in ("ddp", "fsdp") if count > 1 else ():
                out = train(Path(folder) / f"{count}-{way}", count, count, "--scale.parallel", way)
                compare(alone, out, count, way)


def train(out: Path, processes: int, parts: int, *flags: str) -> Path:
    """Train on `parts` times as many images by so many processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    length = ["--steps", str(STEPS), "--log-every", "1", "--knn.every", "0", "--batch-size", str(EACH * parts)]
    where = ["--out", str(out), "--device", "cpu", "--precision", "fp32", "--threads", "1"]
    done = subprocess.run(
        [*launch, "-m", "pixmim.cli", "pretrain", "demo", *length, *where, *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return out


def compare(alone: Path, out: Path, processes: int, way: str) -> None:
    one, several = ([line["loss"] for line in read_metrics(run / "metrics.jsonl")] for run in (alone, out))
    assert len(one) == len(several) == STEPS
    loss = max(abs(a - b) for a, b in zip(one, several, strict=True))
    a, b = (load_file(run / "encoder.safetensors") for run in (alone, out))
    weights = max(float((a[name] - b[name]).abs().max()) for name in a)
    print(f"{processes:>9}{EACH * processes:>7}  {way:<6}{several[-1]:>10.6f}{loss:>12.1e}{weights:>19.1e}", flush=True)


def paper() -> None:
    """Bytes and operations of a step, from the models themselves; the seconds are arithmetic, not measured."""
    print(f"MAE, batch {BATCH:,}; {MULTIPLIES / 1e12:,.0f} TFLOP/s; share: of sending, if none of it were hidden")
    print(
        f"{'':<6}{'values':>9}{'GPUs':>6}{'images each':>13}{'computing':>12}{'sends':>11}{'sending':>10}{'share':>7}"
    )
    for name, backbone in {"B/16": "base_patch16", "L/16": "large_patch16", "H/14": "huge_patch14"}.items():
        values, operations = model_of(backbone)
        for count, rate in SENDS.items():
            # DDP: each gradient (4 bytes) goes round twice. FSDP2: weights (2 bytes) twice, and gradients once.
            sent = 8 * values * (count - 1) / count
            computing, sending = operations * BATCH / count / MULTIPLIES, sent / rate
            print(
                f"{name:<6}{values / 1e6:>7,.0f} M{count:>6}{BATCH // count:>13}{computing * 1e3:>9.1f} ms"
                f"{sent / 1e6:>8,.0f} MB{sending * 1e3:>7.1f} ms{sending / (computing + sending):>7.0%}"
            )


def model_of(backbone: str) -> tuple[int, float]:
    """Values of a MAE that are trained, and floating-point operations of a step for each image."""
    run = get_recipe("mae-vit-base")
    with torch.device("meta"):
        model = build_model(replace(run, model=replace(run.model, backbone=f"vit_{backbone}_224")))
    masker, grid = build_masker(run, model.patch), grid_of(run.hw, model.patch)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, *run.hw, device="meta"), draw_masks(run, masker, grid, 0, [0]).to("meta"))
    forward = counter.get_total_flops()
    return sum(p.numel() for p in model.parameters() if p.requires_grad), 3.0 * forward


if __name__ == "__main__":
    main()
