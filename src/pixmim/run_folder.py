"""The folder of a run: its files, its lock, and checks that a run may start or resume in it."""

import os
import shlex
import time
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from pixmim.build import with_dataset_stats
from pixmim.config import PretrainConfig
from pixmim.config_io import load_config, pretrain_config
from pixmim.data.uri import absolute, read_parts, split_options
from pixmim.evaluation.best import BEST_FOLDER, BEST_WEIGHTS, Best, read_best
from pixmim.report import write_report
from pixmim.training.distributed import Distributed
from pixmim.training.metric_logger import read_metrics
from pixmim.training.optim import Schedule
from pixmim.training.trackers import ID_FILE
from pixmim.utils.console import print_plain
from pixmim.utils.errors import UserError, shown
from pixmim.utils.files import shortened
from pixmim.utils.lock import locked_folder
from pixmim.utils.trust import inside
from pixmim.weights.detect import read_run
from pixmim.weights.load import build_encoder_with_weights, load_encoder, resolve_model
from pixmim.weights.save import ENCODER_FOLDER, ENCODER_WEIGHTS, save_encoder

FILES = (
    *("config.json", "metrics.jsonl", "skipped.csv", "checkpoints", ID_FILE, "tensorboard"),
    *(ENCODER_FOLDER, f"{ENCODER_FOLDER}/config.json", ENCODER_WEIGHTS),
    *(BEST_FOLDER, f"{BEST_FOLDER}/config.json", BEST_WEIGHTS),
)
"""Files and folders that a run writes."""

MAY_CHANGE = {
    *("data", "out", "device", "cache_images", "shard_cache_gib", "threads", "log_every", "max_bad_fraction"),
    *("accumulation_steps", "parallel", "checkpoint", "knn", "hold_out_every", "keep_best", "bands"),
}
"""Fields that may change when a run is resumed: they affect at most rounding (data: it may have moved)."""


@dataclass(frozen=True)
class PretrainResult:
    """A pre-training run that has finished or was interrupted. It is a path: functions that take a run take it too.

    Attributes:
        config: The configuration, as written to config.json.
        folder: Absolute path of the run's folder.
        step: Number of steps done.
        finished: False after an interruption; the same call resumes the run.
    """

    config: PretrainConfig
    folder: Path
    step: int
    finished: bool

    def __fspath__(self) -> str:
        return str(self.folder)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Records of metrics.jsonl, each with `step`, `epoch` and numbers."""
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def best(self) -> Best | None:
        """Measure, value and step of the encoder in encoder-best/; None without `keep_best`."""
        return read_best(self.folder)

    @cached_property
    def encoder(self) -> nn.Module:
        """The trained encoder as a timm module on the CPU, in eval mode, with the `pretrained_cfg` of the run."""
        return load_encoder(self.folder)


def finish_run(out: str | os.PathLike[str], *, console: Console | None = None) -> PretrainResult:
    """Finish a run at its newest checkpoint: write its encoder and report. `pretrain` can still resume it.

    Args:
        out: Folder of the run.
        console: Prints notes.

    Returns:
        The run.

    Raises:
        UserError: If the folder contains no run, or no checkpoint.
    """
    folder, console = Path(os.path.expanduser(out)).absolute(), console or Console()
    check_links(folder)
    with locked_folder(folder, partial(print_plain, console)):
        weights = resolve_model(str(folder), with_decoder=True)
        config = pretrain_config(weights.config, folder)
        save_encoder(build_encoder_with_weights(weights), folder / ENCODER_FOLDER, config, weights.step, weights.steps)
        report_run(folder, console)
    return PretrainResult(config, folder, weights.step, finished=True)


def report_run(folder: Path, console: Console, data: str | None = None) -> None:
    """Write report.html of a run. `data` is as for `write_report`."""
    folder = shortened(folder)  # the page shows it
    write_report([folder], folder / "report.html", data, lambda line: print_plain(console, f"warning: {line}"))


def open_run(
    config: PretrainConfig, out: str, world: Distributed, stack: ExitStack, console: Console, *, resume: bool
) -> tuple[PretrainConfig, Path]:
    """Lock the folder of a run, and check that the run may start or resume there. Collective: call on every rank.

    Args:
        config: Configuration of the run.
        out: The folder; empty for a new one, named after the recipe and the time.
        world: Ranks of the run. Rank 0 holds the lock.
        stack: Releases the lock when it is closed.
        console: Prints notes.
        resume: Require a run in the folder, and allow another length, and data that have moved.

    Returns:
        The configuration, with absolute paths, and the mean and std of the run or the dataset; and the absolute path
        of the folder, since callbacks may change the working directory.

    Raises:
        UserError: If another process uses the folder, if it cannot be created, if it contains another run or files
            that the run would overwrite, or if a new one is inside the data.
    """
    if config.optim.decoder_warmup and not config.init:
        raise UserError(
            "no weights to continue from: pass --init FILE, RUN, timm:NAME or hf:NAME. Without them, "
            f"--optim.decoder-warmup {config.optim.decoder_warmup:g} would freeze a random encoder"
        )
    folder = lock_run_folder(out, config.recipe or "run", world, stack, console)
    config = with_full_paths(config, folder)
    check_links(folder)
    if (folder / "config.json").exists():
        config = check_same_run(config, folder, resume=resume)
    elif resume:
        raise UserError(f"{folder / 'config.json'} does not exist: resume=True needs an existing run")
    else:
        check_new_run(folder)
        check_outside_data(folder, config.data)
        config, lines = with_dataset_stats(config)
        for line in lines:
            print_plain(console, line)
    # Every rank has checked the folder before rank 0 writes to it. Machines may differ in what `pixmim stats` saved.
    mean, std = world.broadcast((config.mean, config.std))
    return replace(config, mean=mean, std=std), folder.absolute()


def lock_run_folder(out: str, recipe: str, world: Distributed, stack: ExitStack, console: Console) -> Path:
    """Lock the folder of a run, or a new one, until `stack` is closed; return it. See `open_run`."""
    folder, problem = os.path.expanduser(out), ""
    if world.is_main:
        stem = f"runs/{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
        for number in count(1):
            folder = folder if out else (f"{stem}-{number}" if number > 1 else stem)
            try:
                stack.enter_context(locked_folder(Path(folder), partial(print_plain, console), new=not out))
            except FileExistsError:
                if not out:  # another run started in the same second
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
    """Raise UserError if a folder without a run contains anything that a new run would overwrite."""
    for name in (*FILES, "report.html", "reconstructions"):
        if os.path.lexists(out / name):
            raise UserError(f"{out / name} already exists and belongs to no run: choose another --out")


def check_outside_data(out: Path, data: str) -> None:
    """Raise UserError if a new run would write its drawings into a folder of its own images."""
    for part in read_parts(data):
        folder = Path(split_options(part.source)[0])
        if os.path.isdir(folder) and out.resolve().is_relative_to(folder.resolve()):
            raise UserError(
                f"{out} is inside --data {folder}, and what a run draws would become images of the data: pass an --out "
                "outside of it"
            )


def check_links(out: Path) -> None:
    """Raise UserError if a file of a run is a symbolic link out of its folder."""
    for name in FILES:
        inside(out, name)


def with_full_paths(config: PretrainConfig, out: Path) -> PretrainConfig:
    """Return the configuration with `out`, and with absolute paths of datasets and initial weights."""
    knn, init = replace(config.knn, train=absolute(config.knn.train), test=absolute(config.knn.test)), config.init
    if init and not init.startswith(("timm:", "hf:")):
        init = os.path.abspath(os.path.expanduser(init))
    return replace(config, out=str(out), data=absolute(config.data), init=init, knn=knn)


def check_same_run(config: PretrainConfig, out: Path, *, resume: bool = False) -> PretrainConfig:
    """Check that a configuration is that of the run in a folder.

    Args:
        config: The configuration.
        out: The folder, with a config.json.
        resume: Allow another length, and data that have moved.

    Returns:
        The configuration, with the mean and std of the run if it has none.

    Raises:
        UserError: If a field differs that affects the result.
    """
    started = with_full_paths(load_config(out / "config.json")[0], out)
    allowed = MAY_CHANGE | {"epochs", "steps"} if resume else MAY_CHANGE - {"data"}
    for name in (field.name for field in fields(PretrainConfig)):
        own, unset = getattr(config, name), (None,) if name in ("mean", "std") else ()
        if name in allowed or own in (*unset, getattr(started, name)):
            continue
        flag = f"--{name.replace('_', '-')}"
        if resume:
            raise UserError(f"{flag} cannot change when the run in {out} is resumed: start a new run in another --out")
        raise UserError(
            f"{out} holds a run with another {flag}: choose another --out, or resume that one with "
            f"--resume {shlex.quote(str(out))}"
        )
    return replace(config, mean=config.mean or started.mean, std=config.std or started.std)


def check_config(config: object) -> None:
    """Raise UserError unless this is the configuration of a run, with data."""
    if not isinstance(config, PretrainConfig):
        raise UserError(f"a run needs a PretrainConfig, as get_recipe returns one, not {shown(config)}")
    if not config.data:
        raise UserError("no data given: pass --data FOLDER, or --data shapes: for the built-in synthetic dataset")


def check_length(out: Path, schedule: Schedule, step: int, images: int) -> list[str]:
    """Check that a run can start, or resume from `step`. Return a line if its length has changed.

    Raises:
        UserError: If the run is longer already, or if its checkpoints are gone.
    """
    if not step and (out / ENCODER_WEIGHTS).exists():
        raise UserError(
            f"{out} contains a finished encoder but no checkpoint to resume from: start a new run from it with "
            f"`--init {shlex.quote(str(out))}` and another --out"
        )
    if step > schedule.steps:
        raise UserError(
            f"{out} is already at step {step:,}, past the requested {schedule.steps:,}: pass more --epochs (or "
            "--steps), or --finish to finish the run as it is"
        )
    before = read_run(out) if step else None
    planned = schedule.steps if before is None else Schedule.of(pretrain_config(before, out), images).steps
    if planned == schedule.steps:
        return []
    return [
        f"length changed from {planned:,} to {schedule.steps:,} steps: from step {step:,}, the learning rate is that "
        f"of a run of {schedule.steps:,} steps, starting at {schedule.lr(min(step, schedule.steps - 1)):.3g}"
    ]
