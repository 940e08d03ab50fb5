"""The folder of a run: which files it holds, who may write into it, and which run may be resumed in it."""

import os
import time
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial
from itertools import count
from pathlib import Path
from shlex import quote

from rich.console import Console

from pixmim.config import PretrainConfig
from pixmim.config_io import load_config
from pixmim.data.uri import absolute
from pixmim.training.distributed import Distributed
from pixmim.training.trackers import ID_FILE
from pixmim.utils.console import print_plain
from pixmim.utils.errors import UserError
from pixmim.utils.lock import locked_folder
from pixmim.utils.trust import inside
from pixmim.weights.save import ENCODER_FOLDER, ENCODER_WEIGHTS

FILES = (
    *(
        "config.json",
        "metrics.jsonl",
        "skipped.csv",
        "checkpoints",
        ENCODER_FOLDER,
        f"{ENCODER_FOLDER}/config.json",
        ENCODER_WEIGHTS,
    ),
    *(ID_FILE, "tensorboard"),
)
"""What a run writes."""

MAY_CHANGE = {
    *("data", "out", "device", "cache_images", "shard_cache_gib", "threads", "log_every", "max_bad_fraction"),
    *("accumulation_steps", "parallel", "checkpoint", "knn", "bands"),
}
"""Fields that a resumed run may change: they affect at most rounding (data: it may have moved)."""


def claim(named: str, recipe: str, world: Distributed, stack: ExitStack, console: Console) -> Path:
    """Lock a run's folder until `stack` is closed. Collective: call on every rank.

    Args:
        named: The folder; empty for a new one, named after the recipe and the time.
        recipe: Name of the recipe.
        world: The ranks of the run, of which the first one holds the lock.
        stack: Holds the lock.
        console: Told if the holder of an old lock must be watched first.

    Returns:
        The folder.

    Raises:
        UserError: If another process works in the folder, or it cannot be made.
    """
    folder, problem = named, ""
    if world.is_main:
        stem = f"runs/{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
        names = (f"{stem}-{number}" if number > 1 else stem for number in count(1))
        while True:
            folder = named or next(names)
            try:
                stack.enter_context(locked_folder(Path(folder), partial(print_plain, console), new=not named))
            except FileExistsError:
                if not named:  # another run started in the same second
                    continue
                problem = f"{folder} is a file: choose another --out"
            except (UserError, OSError) as error:
                problem = str(error)
            break
    folder, problem = world.broadcast((folder, problem))
    if problem:
        raise UserError(problem)
    return Path(folder)


def check_new_run(out: Path) -> None:
    """Raise UserError if a folder without a run holds anything that a new run would overwrite."""
    for name in (*FILES, "report.html", "reconstructions"):
        if os.path.lexists(out / name):
            raise UserError(f"{out / name} is there already, and belongs to no run: choose another --out")


def check_links(out: Path) -> None:
    """Raise UserError if a file of a run is a link out of its folder."""
    for name in FILES:
        inside(out, name)


def with_full_paths(config: PretrainConfig, out: Path) -> PretrainConfig:
    """Return the configuration with `out`, and with paths of data that hold wherever it is read from."""
    knn = replace(config.knn, train=absolute(config.knn.train), test=absolute(config.knn.test))
    return replace(config, out=str(out), data=absolute(config.data), knn=knn)


def check_same_run(config: PretrainConfig, out: Path, *, resume: bool = False) -> PretrainConfig:
    """Check that a configuration is that of the run in a folder.

    Args:
        config: The configuration.
        out: The folder, with a config.json.
        resume: Allow another length, and data that have moved.

    Returns:
        The configuration, with the mean and std that the run started with where it has none.

    Raises:
        UserError: If a field differs that decides what is computed.
    """
    started, _ = load_config(out / "config.json")
    config = replace(config, mean=config.mean or started.mean, std=config.std or started.std)
    allowed = MAY_CHANGE | {"epochs", "steps"} if resume else MAY_CHANGE - {"data"}
    for field in fields(PretrainConfig):
        if field.name in allowed or getattr(config, field.name) == getattr(started, field.name):
            continue
        flag = f"--{field.name.replace('_', '-')}"
        if resume:
            raise UserError(f"{flag} cannot change when the run in {out} is resumed: start a new run in another --out")
        raise UserError(
            f"{out} holds a run with another {flag}: choose another --out, or resume that one with "
            f"--resume {quote(str(out))}"
        )
    return config
