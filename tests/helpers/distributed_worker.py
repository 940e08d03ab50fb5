"""Train a list of jobs, one after another, on several processes that each call `main` with the same file.

config       a configuration
out          folder of the run
resume_from  a checkpoint of another run to resume from, or an empty string
poisoned     the step whose images are NaN on the last rank, or null
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
            config = from_dict(PretrainConfig, job["config"], jobs)
            out, resume_from = Path(job["out"]), job["resume_from"]
            if resume_from and world.is_main:
                shutil.copytree(resume_from, out / "checkpoints" / Path(resume_from).name)
                shutil.copy(Path(resume_from).parents[1] / "config.json", out)
            world.gather(None)
            pixmim.pretraining.flip_and_normalize = poison(world, job["poisoned"], max(1, config.accumulation_steps))  # type: ignore[attr-defined]
            console = Console(quiet=not world.is_main)
            pixmim.pretraining.pretrain(config, out, console=console, report=False, world=world)
    exit_now(0)


def poison(world: Distributed, step: int | None, accumulation_steps: int) -> object:
    """Return `flip_and_normalize`, with images that are not finite in one step on the last rank."""
    calls = -1

    def poisoned(*args: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        images = flip_and_normalize(*args)
        is_bad = step is not None and calls == step * accumulation_steps and world.rank == world.size - 1
        return images * float("nan") if is_bad else images

    return poisoned
