"""Seconds from the command to the first batch, for a folder of a million pictures.

python benchmarks/listing.py                     1,000 folders of 1,000 files
python benchmarks/listing.py --folders 1         all files in one

Makes a tree of hard links to drawn JPEGs in a temporary folder (TMPDIR), and waits until its folders have not changed
for a minute, since pixmim trusts no listing before. Each turn is `pixmim pretrain pixmim-vit-tiny` in a process of its
own, up to the moment when the loop has its first batch:

shapes  drawn pictures, nothing to list: Python's imports, and building the model
first   nothing is kept of the folder
next    the listing is kept
walk    (in this process) os.walk and a sorted list of str, what a listing costs without all this
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

from pixmim.data.folders.listing import SETTLED
from pixmim.data.synthetic import Shapes

LINKS = 60_000  # to one file; ext4 takes 65,000

CHILD = """
import os, sys, time
from pixmim import cli
from pixmim.data.loader import Loader
given = Loader.__next__
def first(self):
    batch = given(self)
    print(time.time())
    sys.stdout.flush()
    os._exit(0)
Loader.__next__ = first
sys.exit(cli.main(sys.argv[1:]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--folders", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as where:
        root = Path(where, "tree")
        make(root, Path(where, "drawn"), options.files, options.folders)
        made = time.time()
        print(f"{options.files:,} files in {options.folders:,} folders; median of {options.rounds}")
        print(f"{'walk':<8}{statistics.median(walk(root) for _ in range(options.rounds)):6.1f} s")
        time.sleep(max(0.0, made + SETTLED + 1 - time.time()))
        turns: dict[str, list[float]] = {"shapes": [], "first": [], "next": []}
        for turn in range(options.rounds):
            cache = Path(where, f"cache-{turn}")
            turns["shapes"].append(first_batch("shapes:", cache, Path(where, "run")))
            turns["first"].append(first_batch(str(root), cache, Path(where, "run")))
            turns["next"].append(first_batch(str(root), cache, Path(where, "run")))
    for name, seconds in turns.items():
        print(f"{name:<8}{statistics.median(seconds):6.1f} s")


def make(root: Path, drawn: Path, files: int, folders: int) -> None:
    shapes = Shapes(size=224)
    root.mkdir()
    drawn.mkdir()
    pictures = [drawn / f"{number}.jpg" for number in range(max(16, -(-files // LINKS)))]
    for number, path in enumerate(pictures):
        Image.fromarray(shapes.sample(number).image).save(path, quality=95)
    each = -(-files // folders)
    for number in range(files):
        folder = root / f"n{number // each:08d}" if folders > 1 else root
        if number % each == 0:
            folder.mkdir(exist_ok=True)
        # A multiple of a prime: names do not come in order, as they do not in a real folder.
        os.link(pictures[number % len(pictures)], f"{folder}/{number // each}_{number * 7919 % 1_000_003}.JPEG")


def walk(root: Path) -> float:
    began = time.perf_counter()
    sorted(os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names)
    return time.perf_counter() - began


def first_batch(data: str, cache: Path, out: Path) -> float:
    """Seconds from the start of the process."""
    command = [sys.executable, "-c", CHILD, "pretrain", "pixmim-vit-tiny", "--data", data, "--epochs", "1"]
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    began = time.time()
    done = subprocess.run([*command, "--out", str(out)], env=environment, capture_output=True, text=True, check=True)
    (out / "config.json").unlink()
    return float(done.stdout.split()[-1]) - began


if __name__ == "__main__":
    main()
