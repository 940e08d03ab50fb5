"""Compare training by several processes with training by one process on the same images: losses and weights.

python benchmarks/ranks.py              1, 2 and 4 processes on this CPU over gloo, 16 images each

The processes share the cores of one machine, so this does not measure speed; scaling.py computes it.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

from pixmim.training.metric_logger import read_metrics

EACH, STEPS = 16, 8


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(f"demo in float32 over gloo, {EACH} images for each process, {STEPS} updates; against one process")
    print(f"{'processes':>9}{'batch':>7}  {'':<6}{'loss':>10}{'differs by':>12}{'weights differ by':>19}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 2, 4):
            alone = train(Path(folder) / f"{count}", 1, count, "--accumulation-steps", str(count))
            for way in ("ddp", "fsdp") if count > 1 else ():
                out = train(Path(folder) / f"{count}-{way}", count, count, "--parallel.strategy", way)
                compare(alone, out, count, way)


def train(out: Path, processes: int, parts: int, *flags: str) -> Path:
    """Train on a batch of `parts` x EACH images with several processes; return the folder of the run."""
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
    a, b = (load_file(run / "encoder/model.safetensors") for run in (alone, out))
    weights = max(float((a[name] - b[name]).abs().max()) for name in a)
    print(f"{processes:>9}{EACH * processes:>7}  {way:<6}{several[-1]:>10.6f}{loss:>12.1e}{weights:>19.1e}", flush=True)


if __name__ == "__main__":
    main()
