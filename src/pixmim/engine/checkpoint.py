"""The state of training on disk: written beside and renamed, so that a kill at any moment leaves a good one."""

import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from pixmim.engine.optim import Updater
from pixmim.errors import UserError

_NAME = re.compile(r"step-(\d{9})")


AUTOSAVE = 600.0
"""Seconds between checkpoints, unless steps are given."""


class Checkpoints:
    """The checkpoints of one run, the newest `keep` of them, each a folder step-NNNNNNNNN.

    A checkpoint holds weights, moments, counts and the number of steps done. Nothing about the data is in it: order,
    crops and masks are functions of (seed, step).
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self._folder, self._keep = folder, keep

    def steps(self) -> list[int]:
        """Step numbers of the complete checkpoints, oldest first."""
        found = (_NAME.fullmatch(path.name) for path in self._folder.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, updater: Updater, *, images: int
    ) -> None:
        """Write the state after `step` updates over a data set of `images`. Returns when it is safely on disk."""
        self._folder.mkdir(parents=True, exist_ok=True)
        final = self._folder / f"step-{step:09d}"
        if final.exists():
            return
        for leftover in self._folder.glob("*.tmp"):  # of a save that was killed
            shutil.rmtree(leftover)
        beside = final.with_suffix(".tmp")
        state = _state(model, optimizer, updater) | {"step": torch.tensor(step), "images": torch.tensor(images)}
        with _quiet():
            save(state, checkpoint_id=beside, no_dist=True)
        os.replace(beside, final)
        _sync(self._folder)
        for old in self.steps()[: -self._keep]:
            shutil.rmtree(self._folder / f"step-{old:09d}")

    def load(self, model: nn.Module, optimizer: torch.optim.Optimizer, updater: Updater, *, images: int) -> int:
        """Restore the newest checkpoint in place, and give the number of updates done; 0 if there is none.

        Raises UserError if it cannot be read, does not fit the model, or was made over another number of images.
        """
        if not self.steps():
            return 0
        path = self._folder / f"step-{self.steps()[-1]:09d}"
        state = _state(model, optimizer, updater) | {"step": torch.tensor(0), "images": torch.tensor(0)}
        try:
            with _quiet():
                load(state, checkpoint_id=path, no_dist=True)
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        except Exception as error:
            raise UserError(
                f"the checkpoint {path} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}); "
                "remove that folder to go on from the one before"
            ) from error
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
        state = {"model": model.state_dict()}
        with _quiet():
            load(state, checkpoint_id=self._folder / f"step-{step:09d}", no_dist=True)
        model.load_state_dict(state["model"])
        return step


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, updater: Updater) -> dict[str, Any]:
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "updater": dict(updater.state)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remark that a checkpoint is saved by one process only; that is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _sync(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        os.fsync(descriptor)
        os.close(descriptor)
