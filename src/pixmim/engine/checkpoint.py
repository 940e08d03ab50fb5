"""The state of training on disk: written beside and renamed, so that a kill at any moment leaves a good one."""

import json
import os
import re
import shutil
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from pixmim.dist import ALONE, World
from pixmim.engine.optim import Updater
from pixmim.errors import UserError, first_line

AUTOSAVE = 600.0
"""Seconds between checkpoints, unless steps are given."""

_NAME = re.compile(r"step-(\d{9})")
_SUMS = "sums.json"

# A World of one saves by itself, and that is meant.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


class Checkpoints:
    """The checkpoints of one run, each a folder step-NNNNNNNNN. Used in a `with` statement where it writes.

    folder  where they are
    last    the newest ones, as many as this, stay
    stays   and every one whose step this says yes to
    world   the processes of the run: each writes its share of the state, and the first one makes it a checkpoint
    say     told of what went wrong and was put right

    A checkpoint holds weights, moments, counts and the number of steps done, whole or in shards, for any number of
    processes to go on from. Nothing about the data is in it: order, crops and masks are functions of (seed, step). A
    sum of each file tells a damaged one.
    """

    def __init__(
        self,
        folder: Path,
        last: int = 2,
        stays: Callable[[int], bool] = lambda step: False,
        world: World = ALONE,
        say: Callable[[str], None] = print,
    ) -> None:
        self._folder, self._last, self._stays, self._world, self._say = folder, last, stays, world, say
        self._writer = ThreadPoolExecutor(1, "pixmim-save")
        self._writing: Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._writer.shutdown(wait=True)

    def steps(self) -> list[int]:
        """Step numbers of the complete checkpoints, oldest first."""
        found = (_NAME.fullmatch(path.name) for path in self._folder.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)

    def save(
        self,
        step: int,
        model: nn.Module,
        updater: Updater,
        *,
        images: int,
        wait: bool = False,
    ) -> None:
        """Copy the state after `step` updates over a data set of `images`, and write it while training goes on.

        wait  return when it is safely on disk; UserError if it cannot be written. Otherwise a failure is said, and the
              next save tries again
        """
        self._finish(must=False)
        if not self._path(step).exists():
            state = _state(model, updater) | {"step": torch.tensor(step), "images": torch.tensor(images)}
            copy = DefaultStager(StagingOptions(False, False, False, False)).stage(state)
            self._writing = self._writer.submit(self._write, step, cast(dict[str, Any], copy))
        if wait:
            self._finish(must=True)

    def load(self, model: nn.Module, updater: Updater, *, images: int) -> int:
        """Restore the newest whole checkpoint in place, and give the number of updates done; 0 if there is none.

        A damaged one is set aside, which is said, and the one before is used. Raises UserError if all are damaged, or
        if one does not fit the model, or was made over another number of images.
        """
        path = self._newest_whole()
        if path is None:
            return 0
        state = _state(model, updater) | {"step": torch.tensor(0), "images": torch.tensor(0)}
        try:
            load(state, checkpoint_id=path, process_group=self._world.saving, no_dist=self._world.size == 1)
            set_state_dict(
                model, updater.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
            )
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            raise UserError(f"the checkpoint {path} does not fit this run: {_reason(error)}") from error
        if int(state["images"]) != images:
            raise UserError(
                f"the run began with {int(state['images']):,} images, and there are {images:,} now: their order would "
                "be another. Restore the data, or begin a new run."
            )
        updater.state.update(state["updater"])
        return int(state["step"])

    def load_model(self, model: nn.Module) -> int:
        """Restore only the weights of the newest checkpoint, to look at; gives its step. Raises UserError."""
        if not self.steps():
            raise UserError(f"there is no checkpoint in {self._folder}")
        step = self.steps()[-1]
        damage = _damage(self._path(step), 0, 1)
        if damage:
            raise UserError(f"the checkpoint {self._path(step)} is damaged: {damage}")
        state = {"model": model.state_dict()}
        try:
            load(state, checkpoint_id=self._path(step), no_dist=True)
        except CheckpointException as error:
            raise UserError(f"the checkpoint {self._path(step)} holds another model: {_reason(error)}") from error
        model.load_state_dict(state["model"])
        return step

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:09d}"

    def _write(self, step: int, state: dict[str, Any]) -> None:
        """What every process does of a save, in a thread of its own and over a process group of its own."""
        world, final = self._world, self._path(step)
        beside = final.with_suffix(".tmp")
        if world.first:
            self._folder.mkdir(parents=True, exist_ok=True)
            for leftover in self._folder.glob("*.tmp"):  # of a save that was killed
                shutil.rmtree(leftover)
        world.gather(None, world.saving)  # the others write once that is done
        save(state, checkpoint_id=beside, process_group=world.saving, no_dist=world.size == 1)
        own = [*beside.glob(f"__{world.rank}_*")] + [beside / ".metadata"] * world.first
        sums = world.gather({path.name: _sum(path) for path in own}, world.saving)
        if world.first:
            with (beside / _SUMS).open("w") as file:
                json.dump({name: value for part in sums for name, value in part.items()}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, final)
            _sync(self._folder)
            for old in self.steps()[: -self._last]:
                if not self._stays(old):
                    shutil.rmtree(self._path(old))

    def _finish(self, must: bool) -> None:
        """Wait for the save that is being written, if there is one."""
        if self._writing is None:
            return
        try:
            self._writing.result()
        except (OSError, CheckpointException) as error:
            text = f"a checkpoint could not be written to {self._folder}: {_reason(error)}"
            if must:
                raise UserError(f"{text}. Those before it are whole: the same command goes on from them") from error
            self._say(f"warning: {text}; training goes on, and the next one tries again")
        finally:
            self._writing = None

    def _newest_whole(self) -> Path | None:
        """The newest checkpoint whose files are what was written; damaged ones before it are set aside."""
        steps = self._world.share(self.steps())
        for step in reversed(steps):
            path = self._path(step)
            found = self._world.gather(_damage(path, self._world.rank, self._world.size), self._world.saving)
            damage = next((text for text in found if text), "")
            if not damage:
                return path
            aside = path.with_name(f"damaged-{path.name}")
            if self._world.first:
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
            self._say(
                f"warning: the checkpoint of update {step:,} is damaged ({damage}); it was renamed to {aside.name}"
            )
        if steps:
            raise UserError(f"no checkpoint in {self._folder} is whole. To begin anew, remove {self._folder}")
        return None


def milestone(step: int, every: float) -> bool:
    """Whether a step is a whole multiple of `every` steps, which need not be a whole number itself; 0: none is."""
    return every > 0 and step == round(max(1, round(step / every)) * every)


def _state(model: nn.Module, updater: Updater) -> dict[str, Any]:
    weights, moments = get_state_dict(model, updater.optimizer)
    return {"model": weights, "optimizer": moments, "updater": dict(updater.state)}


def _sum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _damage(path: Path, rank: int, ranks: int) -> str:
    """What is wrong with a checkpoint, as far as this process looks: at each of `ranks` files one; empty if nothing."""
    try:
        sums = json.loads((path / _SUMS).read_text())
        for name, value in sorted(sums.items())[rank::ranks]:
            if _sum(path / name) != value:
                return f"{name} is not what was written"
    except (OSError, ValueError) as error:
        return _reason(error)
    return ""


def _reason(error: BaseException) -> str:
    """The first thing that went wrong, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        return _reason(next(iter(error.failures.values()))[0])
    return f"{type(error).__name__}: {first_line(error)}"


def _sync(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        os.fsync(descriptor)
        os.close(descriptor)
