"""Checkpoints: written to a temporary folder and renamed, so that a kill at any moment leaves a valid one."""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, cast

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict

from pixmim.training import sharded_checkpoint as files
from pixmim.training.distributed import SINGLE_PROCESS, Distributed
from pixmim.training.optim import SyncFreeOptimizer
from pixmim.training.sharded_checkpoint import DamagedError, Part
from pixmim.utils.errors import UserError, first_line
from pixmim.utils.trust import inside

T = TypeVar("T")

_NAME = re.compile(r"step-(\d{9})")


class CheckpointManager:
    """Save and load the checkpoints of a run, each a folder step-NNNNNNNNN. To save, use it in a `with` statement.

    A checkpoint contains weights, moments, counts and the number of steps done, from which any number of processes can
    resume; see `sharded_checkpoint` for its files. It contains nothing about the data, since order, crops and masks are
    functions of (seed, step), and no settings of the optimizer, which are in the run's configuration. Checksums detect
    damage. A checkpoint may be untrusted: nothing outside the parent of `folder` is read.

    The newest `keep_last` are kept, and those of steps for which `keep_if` returns True. Each rank of `world` writes
    its share of the state.
    """

    def __init__(
        self,
        folder: Path,
        keep_last: int = 2,
        keep_if: Callable[[int], bool] = lambda step: False,
        world: Distributed = SINGLE_PROCESS,
        warn: Callable[[str], None] = print,
    ) -> None:
        self._folder, self._keep_last, self._keep_if, self._world, self._warn = folder, keep_last, keep_if, world, warn
        self._writer = ThreadPoolExecutor(1, "pixmim-save")
        self._writing: Future[None] | None = None

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.shutdown(wait=True)

    def steps(self) -> list[int]:
        """Return the step numbers of the complete checkpoints, oldest first."""
        matches = (_NAME.fullmatch(path.name) for path in self._folder.glob("step-*"))
        return sorted(int(match[1]) for match in matches if match)

    def save(
        self, step: int, model: nn.Module, optimizer: SyncFreeOptimizer, *, images: int, wait: bool = False
    ) -> None:
        """Copy the state after `step` steps to host memory, and write it in the background. Collective.

        With `wait`, return when the checkpoint is on disk, or raise UserError. Otherwise the next save warns of a
        failure. `images` is the size of the dataset.
        """
        self._wait_for_writer(must_succeed=False)
        if not self._path(step).exists():
            share = files.own_share(_state(model, optimizer), self._world.rank, self._world.size)
            self._writing = self._writer.submit(self._write, step, images, share)
        if wait:
            self._wait_for_writer(must_succeed=True)

    def load(self, model: nn.Module, optimizer: SyncFreeOptimizer, *, images: int) -> int:
        """Restore the newest valid checkpoint in place. Collective: call on every rank.

        A damaged one is renamed, with a warning, and the previous one is used.

        Returns:
            The number of steps done; 0 if there is no checkpoint.

        Raises:
            UserError: If all are damaged, or one does not fit the model or a dataset of `images` images.
        """
        steps, damaged = self._world.broadcast((self._steps_inside(), any(self._folder.glob("damaged-*"))))
        state = _state(model, optimizer)
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
                _remove(aside)
                os.replace(path, aside)
            self._warn(f"warning: the checkpoint of step {step:,} is damaged ({damage}); renamed it to {aside.name}")
        if steps or damaged:  # of this start, or of one before: a scheduler may repeat the command
            raise UserError(f"no checkpoint in {self._folder} is valid. To restart, remove {self._folder}")
        return 0

    def load_model(self, model: nn.Module, step: int | None = None) -> tuple[int, int]:
        """Restore only the weights of a checkpoint in place: of a given step, or of the newest valid one.

        Returns the number of steps done, and the size of the dataset. Damaged ones cost a warning and stay, since the
        run may be in progress. Raises UserError if it does not exist, is of another model, or all are damaged.
        """
        steps = self._steps_inside()
        if not steps or step not in (None, *steps):
            raise UserError(f"no checkpoint{'' if step is None else f' of step {step:,}'} in {self._folder}")
        damage, state = list[str](), _prefixed("model", model.state_dict())
        for number in [step] if step is not None else reversed(steps):
            path = self._path(number)
            try:
                manifest = files.read_manifest(path)
                weights = {name: entry for name, entry in manifest.tensors.items() if name.startswith("model.")}
                if mismatch := files.difference(weights, state):
                    raise UserError(f"the checkpoint {path} is of another model: {mismatch}")
                files.restore(path, weights, state)
                if damage:
                    self._warn(f"warning: using the checkpoint of step {number:,}, since {damage[0]}")
                return number, manifest.images
            except DamagedError as error:
                damage.append(f"the checkpoint {path} is damaged: {first_line(error)}")
        raise UserError(damage[0])

    def _steps_inside(self) -> list[int]:
        """Return `steps()`. Raises UserError if the folder is a symbolic link out of the run."""
        inside(self._folder.parent, self._folder.name)
        return self.steps()

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{step:09d}"

    def _restore(self, step: int, state: dict[str, Tensor], images: int) -> None:
        """Restore a state in place. Raises DamagedError, after which it may be partly restored, or UserError."""
        path = self._path(step)
        manifest = files.read_manifest(path)
        if manifest.step != step:
            raise DamagedError(f"it is that of step {manifest.step:,}")
        mismatch = files.difference(manifest.tensors, state)
        if mismatch:
            raise UserError(f"the checkpoint {path} does not fit this run: {mismatch}")
        if manifest.images != images:
            raise UserError(
                f"dataset changed: this run started with {manifest.images:,} images, found {images:,}. Resuming would "
                "shuffle them differently. Restore the data or start a new run"
            )
        files.restore(path, manifest.tensors, state)
        if not all(value.isfinite() and value >= 0 for name, value in state.items() if name.startswith("updater.")):
            raise DamagedError("a count is not a number")

    def _write(self, step: int, images: int, share: Mapping[str, Part]) -> None:
        """Write a checkpoint: on every rank, in a thread and over a process group of its own."""
        final = self._path(step)
        temporary = final.with_suffix(".tmp")

        def prepare() -> None:
            if self._world.is_main:
                self._folder.mkdir(parents=True, exist_ok=True)
                for leftover in self._folder.glob("*.tmp"):  # of a save that was killed
                    _remove(leftover)
                temporary.mkdir()

        def publish() -> None:
            if self._world.is_main:
                files.write_manifest(temporary, step, images, shares)
                _sync(temporary)
                os.replace(temporary, final)
                _sync(self._folder)
                for old in self.steps()[: -self._keep_last]:
                    if not self._keep_if(old):
                        _remove(self._path(old))

        self._on_all_ranks(prepare)
        shares = self._on_all_ranks(lambda: files.write_share(temporary, share, self._world.rank))
        self._on_all_ranks(publish)

    def _on_all_ranks(self, work: Callable[[], T]) -> list[T]:
        """Do the same work on every rank and return all results. Raises OSError on all ranks if it fails on one."""
        result, failure = None, ""
        try:
            result = work()
        except OSError as error:
            failure = f"{type(error).__name__}: {first_line(error)}"
        outcomes = self._world.gather((result, failure), self._world.saving)
        for _, failure in outcomes:
            if failure:
                raise OSError(failure)
        return cast(list[T], [result for result, _ in outcomes])

    def _wait_for_writer(self, must_succeed: bool) -> None:
        if self._writing is None:
            return
        try:
            self._writing.result()
        except OSError as error:
            text = f"a checkpoint could not be written to {self._folder}: {first_line(error)}"
            if must_succeed:
                raise UserError(f"{text}. The same command resumes from the previous one") from error
            self._warn(f"warning: {text}; training continues, and the next save retries")
        finally:
            self._writing = None


def is_multiple_of(step: int, every: float) -> bool:
    """Return True if a step is a rounded multiple of `every` steps, which may be a fraction; 0 has no multiples."""
    return every > 0 and step == round(max(1, round(step / every)) * every)


def _state(model: nn.Module, optimizer: SyncFreeOptimizer) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint, by name, without copying: training changes them in place."""
    weights, moments = get_state_dict(model, optimizer.optimizer)  # moments are zeros before the first step
    state = _prefixed("model", weights) | _prefixed("updater", optimizer.state)
    for name, values in cast(dict[str, dict[str, Tensor]], moments["state"]).items():
        state |= _prefixed(f"optimizer.{name}", values)
    return state


def _prefixed(kind: str, tensors: Mapping[str, object]) -> dict[str, Tensor]:
    return {f"{kind}.{name}": cast(Tensor, value) for name, value in tensors.items()}


def _remove(path: Path) -> None:
    """Remove a file or folder; of a symbolic link, only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Make a rename in a folder survive a power failure, where the system supports it."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        os.fsync(descriptor)
        os.close(descriptor)
