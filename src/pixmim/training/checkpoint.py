"""The state of training on disk: written beside and renamed, so that a kill at any moment leaves a good one."""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TypeVar, cast

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict

from pixmim.training.distributed import SINGLE_PROCESS, Distributed
from pixmim.training.optim import SyncFreeOptimizer
from pixmim.training.sharded_checkpoint import (
    DamagedError,
    Part,
    difference,
    own_share,
    read_manifest,
    restore,
    write_manifest,
    write_share,
)
from pixmim.utils.errors import UserError, first_line
from pixmim.utils.trust import inside

T = TypeVar("T")

AUTOSAVE = 600.0
"""Seconds between checkpoints, unless steps are given."""

_NAME = re.compile(r"step-(\d{9})")


class CheckpointManager:
    """The checkpoints of one run, each a folder step-NNNNNNNNN. Used in a `with` statement where it writes.

    folder  where they are
    last    the newest ones, as many as this, stay
    stays   and every one whose step this says yes to
    world   the processes of the run: each writes its share of the state, and the first one makes it a checkpoint
    say     told of what went wrong and was put right

    A checkpoint holds weights, moments, counts and the number of steps done, whole or in shards, for any number of
    processes to go on from; see `engine.shards` for its files. Nothing about the data is in it: order, crops and masks
    are functions of (seed, step). Neither are settings of the optimizer, which the run's configuration has. Checksums
    tell a damaged one. It may come from a stranger: none is read outside the folder that holds `folder`.
    """

    def __init__(
        self,
        folder: Path,
        last: int = 2,
        stays: Callable[[int], bool] = lambda step: False,
        world: Distributed = SINGLE_PROCESS,
        say: Callable[[str], None] = print,
    ) -> None:
        self._folder, self._last, self._stays, self._world, self._say = folder, last, stays, world, say
        self._writer = ThreadPoolExecutor(1, "pixmim-save")
        self._writing: Future[None] | None = None

    def __enter__(self) -> "CheckpointManager":
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
        updater: SyncFreeOptimizer,
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
            share = own_share(_state(model, updater), self._world.rank, self._world.size)
            self._writing = self._writer.submit(self._write, step, images, share)
        if wait:
            self._finish(must=True)

    def load(self, model: nn.Module, updater: SyncFreeOptimizer, *, images: int) -> int:
        """Restore the newest undamaged checkpoint in place and return its step; 0 if there is no checkpoint.

        A damaged one is renamed, with a warning, and the one before is used. Collective: call on every rank.

        Raises:
            UserError: If all are damaged, or if one does not fit the model, or was made over another number of images.
        """
        steps = self._world.broadcast(self._inside())
        state = _state(model, updater)
        for step in reversed(steps):
            path, damage = self._path(step), ""
            try:
                self._restore(step, state, images)
            except DamagedError as error:
                damage = first_line(error)
            damage = next(filter(None, self._world.gather(damage, self._world.saving)), "")
            if not damage:
                return step
            aside = path.with_name(f"damaged-{path.name}")
            if self._world.is_main:
                _move_aside(path, aside)
            self._say(
                f"warning: the checkpoint of update {step:,} is damaged ({damage}); it was renamed to {aside.name}"
            )
        if steps:
            raise UserError(f"no checkpoint in {self._folder} is whole. To begin anew, remove {self._folder}")
        return 0

    def load_model(self, model: nn.Module) -> tuple[int, int]:
        """Restore only the weights of the newest checkpoint, to look at; return its step and its number of images.

        Raises:
            UserError: If there is none, or it is damaged, or of another model.
        """
        steps = self._inside()
        if not steps:
            raise UserError(f"there is no checkpoint in {self._folder}")
        path = self._path(steps[-1])
        state = _named("model", model.state_dict())
        try:
            manifest = read_manifest(path)
            there = {name: entry for name, entry in manifest.tensors.items() if name.startswith("model.")}
            wrong = difference(there, state)
            if wrong:
                raise UserError(f"the checkpoint {path} holds another model: {wrong}")
            restore(path, there, state)
        except DamagedError as error:
            raise UserError(f"the checkpoint {path} is damaged: {first_line(error)}") from error
        return steps[-1], manifest.images

    def _inside(self) -> list[int]:
        """Return `steps()`. Raises UserError if a symbolic link in their place leads out of the run."""
        inside(self._folder.parent, self._folder.name)
        return self.steps()

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:09d}"

    def _restore(self, step: int, state: dict[str, Tensor], images: int) -> None:
        """Restore a state in place. Raises DamagedError, after which it may be partly restored, or UserError."""
        path = self._path(step)
        there = read_manifest(path)
        if there.step != step:
            raise DamagedError(f"it is that of update {there.step:,}")
        wrong = difference(there.tensors, state)
        if wrong:
            raise UserError(f"the checkpoint {path} does not fit this run: {wrong}")
        if there.images != images:
            raise UserError(
                f"the run began with {there.images:,} images, and there are {images:,} now: their order would be "
                "another. Restore the data, or begin a new run."
            )
        restore(path, there.tensors, state)
        if not all(value.isfinite() and value >= 0 for name, value in state.items() if name.startswith("updater.")):
            raise DamagedError("a count is not a number")

    def _write(self, step: int, images: int, share: Mapping[str, Part]) -> None:
        """Write a checkpoint: on every rank, in a thread of its own and over a process group of its own."""
        final = self._path(step)
        beside = final.with_suffix(".tmp")

        def prepare() -> None:
            if self._world.is_main:
                self._folder.mkdir(parents=True, exist_ok=True)
                for leftover in self._folder.glob("*.tmp"):  # of a save that was killed
                    _remove(leftover)
                beside.mkdir()

        def publish() -> None:
            if self._world.is_main:
                write_manifest(beside, step, images, shares)
                _sync(beside)
                os.replace(beside, final)
                _sync(self._folder)
                for old in self.steps()[: -self._last]:
                    if not self._stays(old):
                        _remove(self._path(old))

        self._together(prepare)
        shares = self._together(lambda: write_share(beside, share, self._world.rank))
        self._together(publish)

    def _together(self, work: Callable[[], T]) -> list[T]:
        """Do the same work on every rank and return all results. Raises OSError on all ranks if it fails on one."""
        result, failure = None, ""
        try:
            result = work()
        except OSError as error:
            failure = f"{type(error).__name__}: {first_line(error)}"
        done = self._world.gather((result, failure), self._world.saving)
        failure = next(filter(None, (text for _, text in done)), "")
        if failure:
            raise OSError(failure)
        return cast(list[T], [result for result, _ in done])

    def _finish(self, must: bool) -> None:
        """Wait for the save that is being written, if there is one."""
        if self._writing is None:
            return
        try:
            self._writing.result()
        except OSError as error:
            text = f"a checkpoint could not be written to {self._folder}: {first_line(error)}"
            if must:
                raise UserError(f"{text}. Those before it are whole: the same command goes on from them") from error
            self._say(f"warning: {text}; training goes on, and the next one tries again")
        finally:
            self._writing = None


def is_multiple_of(step: int, every: float) -> bool:
    """Whether a step is a whole multiple of `every` steps, which need not be a whole number itself; 0: none is."""
    return every > 0 and step == round(max(1, round(step / every)) * every)


def _state(model: nn.Module, updater: SyncFreeOptimizer) -> dict[str, Tensor]:
    """All that a checkpoint holds, by name: the tensors that training changes in place, not copies of them."""
    weights, moments = get_state_dict(model, updater.optimizer)  # of an optimizer before its first step, zeros
    state = _named("model", weights) | _named("updater", updater.state)
    for name, values in cast(dict[str, dict[str, Tensor]], moments["state"]).items():
        state |= _named(f"optimizer.{name}", values)
    return state


def _named(kind: str, tensors: Mapping[str, object]) -> dict[str, Tensor]:
    return {f"{kind}.{name}": cast(Tensor, value) for name, value in tensors.items()}


def _remove(path: Path) -> None:
    """Remove whatever is at a path; of a symbolic link, only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _move_aside(path: Path, aside: Path) -> None:
    """Rename a checkpoint that cannot be used, in place of one that was renamed before."""
    try:
        _remove(aside)
        os.replace(path, aside)
    except OSError as error:
        raise UserError(f"{path} is damaged and cannot be renamed ({first_line(error)}): remove it") from error


def _sync(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        os.fsync(descriptor)
        os.close(descriptor)
