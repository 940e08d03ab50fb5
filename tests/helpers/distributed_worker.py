"""Train a list of jobs in several processes, each of which calls `main` with the same JSON file.

Keys of a job:

    run       the config
    out       folder of the run
    goes_on   checkpoint of another run to resume from, or an empty string
    poisoned  step at which the images are NaN on the last rank, or null
"""

import json
import shutil
from pathlib import Path

from rich.console import Console
from torch import Tensor

import pixmim.pretraining
from pixmim.config import PretrainConfig
from pixmim.config_io import from_dict
from pixmim.training.distributed import Distributed, init_distributed
from pixmim.transforms.crops import flip_and_normalize
from pixmim.utils.process import exit_now


def main(jobs: str) -> None:
    with init_distributed("cpu", timeout=60) as world:
        for job in json.loads(Path(jobs).read_text()):
            run, out, goes_on = from_dict(PretrainConfig, job["run"], jobs), Path(job["out"]), job["goes_on"]
            if goes_on and world.is_main:
                shutil.copytree(goes_on, out / "checkpoints" / Path(goes_on).name)
                shutil.copy(Path(goes_on).parents[1] / "config.json", out)
            world.gather(None)
            pixmim.pretraining.flip_and_normalize = poison(world, job["poisoned"], max(1, run.accumulation_steps))  # type: ignore[attr-defined]
            pixmim.pretraining.pretrain(run, out, console=Console(quiet=not world.is_main), report=False, world=world)
    exit_now(0)


def poison(world: Distributed, step: int | None, accumulation_steps: int) -> object:
    """Return a `flip_and_normalize` whose images are NaN in one step on the last rank."""
    calls = -1

    def spoiled(*given: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        images = flip_and_normalize(*given)
        spoil = step is not None and calls == step * accumulation_steps and world.rank == world.size - 1
        return images * float("nan") if spoil else images

    return spoiled
