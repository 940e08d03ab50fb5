"""The runs of the page: their metrics as they grow, their models, and what those predict."""

import os
import shlex
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor, nn

from pixmim.build import build_mask_sampler, build_model
from pixmim.config import MaskConfig, ModelConfig
from pixmim.evaluation.visualize import Pixels, to_pixels
from pixmim.masking import Mask
from pixmim.models.base import MaskedModel
from pixmim.report.reconstruct import Reconstruction, draw, radial_spectrum
from pixmim.targets import LowFrequency, low_pass, resolve_radius
from pixmim.training.checkpoint import CheckpointManager
from pixmim.training.metric_logger import parse_metrics
from pixmim.transforms.crops import flip_and_normalize
from pixmim.utils.errors import UserError
from pixmim.utils.files import open_regular
from pixmim.utils.initialization import WithoutInitialization, build_on_meta
from pixmim.utils.patches import grid_of
from pixmim.utils.trust import inside
from pixmim.weights.detect import read_config
from pixmim.weights.load import build_encoder_with_weights, build_with_weights, resolve_model
from pixmim.weights.save import ENCODER_WEIGHTS

_UNITS = ("days", 86_400), ("hours", 3600), ("minutes", 60), ("seconds", 1)
_SILENT = 120  # seconds without a log line, after which a run may have been stopped
_MAX_READ = 2**24  # bytes of metrics.jsonl per request


@dataclass(frozen=True)
class Run:
    """A run, which may still be training, or imported weights.

    Attributes:
        folder: Its folder.
        name: Its name on the page.
        config: Its configuration.
        text: The text of its config.json.
    """

    folder: Path
    name: str
    config: ModelConfig
    text: str

    @staticmethod
    def open(folder: Path, name: str) -> "Run":
        """Open a run or imported weights. Raises UserError if the folder is neither."""
        found = read_config(folder) if folder.is_dir() else None
        if found is None:
            raise UserError(f"{folder} is not a run: it has no config.json")
        return Run(folder, name, *found)

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of its model."""
        model = build_on_meta(lambda: build_model(self.config), self.config.model.backbone)
        return grid_of(self.config.image_size, model.patch)

    def unfinished(self) -> str:
        """Return when a run that has not finished last logged, and how to resume it; empty for a finished one."""
        if inside(self.folder, ENCODER_WEIGHTS).is_file():
            return ""
        command = f"if it was stopped, `pixmim pretrain --resume {shlex.quote(str(self.folder))}` resumes it"
        try:
            age = max(0, time.time() - inside(self.folder, "metrics.jsonl").stat().st_mtime)
        except OSError:
            return f"nothing logged yet; {command}"
        unit, seconds = next((u for u in _UNITS if age >= 2 * u[1]), _UNITS[-1])
        return f"last logged {age / seconds:.0f} {unit} ago" + f"; {command}" * (age > _SILENT)

    def steps(self) -> list[int]:
        """Return the steps of its complete checkpoints."""
        return CheckpointManager(inside(self.folder, "checkpoints")).steps()


@dataclass(frozen=True)
class NewMetrics:
    """Records of metrics.jsonl since the previous call.

    Attributes:
        records: The new records.
        position: Where the next call starts; opaque.
        restarted: True if the file was replaced, so that all earlier records are void.
        broken: Number of lines that are no records.
    """

    records: list[dict[str, Any]]
    position: str
    restarted: bool
    broken: int


def read_new_metrics(folder: Path, position: str = "") -> NewMetrics:
    """Read what a run has written to metrics.jsonl since `position`. A last line without its end is left for later.

    Raises:
        UserError: If the file leads out of the folder.
        OSError: If it is not a regular file.
    """
    path = inside(folder, "metrics.jsonl")
    if not path.exists():
        return NewMetrics([], "", bool(position), 0)
    with open(open_regular(path), "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        identity, _, offset = position.partition(":")
        start = int(offset) if offset.isascii() and offset.isdigit() and identity == str(status.st_ino) else 0
        start = start if start <= status.st_size else 0
        file.seek(start)
        content = file.read(_MAX_READ) or b""
    complete, records, broken = content[: content.rfind(b"\n") + 1], list[dict[str, Any]](), 0
    for line in complete.splitlines():
        try:
            records.append(parse_metrics(line.decode("utf-8", "replace"), "line"))
        except UserError:
            broken += bool(line.strip())
    return NewMetrics(records, f"{status.st_ino}:{start + len(complete)}", bool(position) and start == 0, broken)


class Models:
    """The models of runs, loaded when they are first used, and reloaded when their weights have changed."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs, self._lock = list(runs), threading.Lock()
        self.notes = dict.fromkeys(range(len(runs)), "")
        """Note about the weights of each run that were loaded last, such as a damaged checkpoint."""
        self._load = lru_cache(maxsize=2 * len(runs))(self._load_uncached)
        self._load_encoder = lru_cache(maxsize=2 * len(runs))(self._load_encoder_uncached)

    def reconstruct(self, run: int, crop: Shaped[Tensor, "1 c h w"], mask: Mask) -> Reconstruction:
        """Draw what a run's newest weights predict of the hidden patches of a crop.

        Raises:
            UserError: If the run has no decoder yet, or the mask has another number of patches.
        """
        rows, columns = self._runs[run].grid
        if mask.hidden.shape[1] != rows * columns:
            raise UserError(f"{self._runs[run].name} has {rows} x {columns} patches, and the mask another number")
        with self._lock:  # one model at a time computes, on all cores
            model, step = self._load(run, self._version(run))
            return draw(model, self._runs[run].config, crop, step, mask=mask)

    @contextmanager
    def encoder(self, run: int) -> Iterator[tuple[nn.Module, int]]:
        """Yield the encoder of a run's newest weights, in evaluation mode, and their training step.

        Only one thread at a time has it, because attention is recorded in its modules.
        """
        with self._lock:
            yield self._load_encoder(run, self._version(run))

    def checkpoint(self, run: int, step: int, crops: Shaped[Tensor, "b c h w"], names: Sequence[str]) -> Reconstruction:
        """Draw what the weights of a checkpoint predict of the hidden patches of crops, each time under the same masks.

        Raises:
            UserError: If the checkpoint does not exist any more, or is damaged.
        """
        config = self._runs[run].config
        with self._lock:
            with WithoutInitialization():
                model = build_model(config)
            CheckpointManager(inside(self._runs[run].folder, "checkpoints")).load_model(model, step)
            return draw(model.eval(), config, crops, step, names)

    def _version(self, run: int) -> tuple[Any, ...]:
        """Return what changes whenever the weights of a run change."""
        folder = self._runs[run].folder
        files = [path for name in ("model.safetensors", "encoder") if (path := inside(folder, name)).exists()]
        return (*self._runs[run].steps()[-1:], *(path.stat().st_mtime_ns for path in files))

    def _load_encoder_uncached(self, run: int, version: tuple[Any, ...]) -> tuple[nn.Module, int]:
        weights = resolve_model(str(self._runs[run].folder.absolute()))
        self.notes[run] = " ".join(weights.notes)
        return build_encoder_with_weights(weights), weights.step

    def _load_uncached(self, run: int, version: tuple[Any, ...]) -> tuple[MaskedModel, int]:
        weights = resolve_model(str(self._runs[run].folder.absolute()), with_decoder=True)
        self.notes[run] = " ".join(weights.notes)
        return build_with_weights(weights), weights.step


def random_mask(run: Run, kind: str, ratio: float, block_size: int, seed: int) -> Mask:
    """Draw a mask for one image.

    Args:
        run: Gives the grid of patches, and with `kind` "as-trained" everything else.
        kind: "random", "blocks", or "as-trained".
        ratio: Hidden fraction.
        block_size: Side of a block in pixels, a multiple of the patches.
        seed: Equal seeds give equal masks.

    Raises:
        UserError: If the values do not fit the patches.
    """
    config = run.config
    if kind == "random":
        config = replace(config, mask=MaskConfig("random", ratio))
    elif kind == "blocks":
        config = replace(config, mask=MaskConfig("blocks", ratio, block_size))
    elif kind != "as-trained":
        raise UserError(f"there is no mask '{kind[:20]}'")
    patch = config.image_size[0] // run.grid[0]
    return build_mask_sampler(config, patch)(step=-1 - seed, rows=[0])


def painted_mask(hidden: Sequence[bool]) -> Mask:
    """Return the mask of one image from its hidden patches, row by row. Raises UserError for all or none."""
    try:
        return Mask.from_hidden(torch.tensor([hidden], dtype=torch.bool))
    except ValueError:
        raise UserError("hide at least one patch, and leave at least one visible") from None


@dataclass(frozen=True)
class LowPassed:
    """The parts of an image that a low-pass keeps and removes.

    Attributes:
        kept: uint8 pixels (h w c).
        removed: uint8 pixels (h w c), around gray.
        share: Fraction of the variance that is kept.
        spectrum: Mean power at each radius, from 0.
    """

    kept: Pixels
    removed: Pixels
    share: float
    spectrum: list[float]


def target_radius(config: ModelConfig) -> float:
    """Return the radius of a run's target along the shorter side, in bins; 0 if the target is unknown."""
    radius = resolve_radius(config.target.radius, config.image_size) if config.target is not None else 0.0
    return min(radius) if isinstance(radius, tuple) else radius


def low_passed(config: ModelConfig, crop: Shaped[Tensor, "1 c h w"], radius: float) -> LowPassed:
    """Split an image by the low-pass of PixMIM. Radius in bins of the shorter side's frequency.

    The cut-off has the same cycles per pixel in both directions. At the radius of the run's own target, it is that
    target, which may be the paper's code.
    """
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in config.normalization)
    x = flip_and_normalize(crop, None, mean.flatten(), std.flatten())
    target = config.target
    if target is not None and target.kind == "low-frequency" and radius == target_radius(config):
        kept = LowFrequency(target.radius, target.variant, *config.normalization)(x)
    else:
        vertical, horizontal = (radius * side / min(config.image_size) for side in config.image_size)
        kept = low_pass(x, radius if vertical == horizontal or not radius else (vertical, horizontal))
    variance = float(x.var(dim=(2, 3)).mean())
    share = float(kept.var(dim=(2, 3)).mean()) / variance if variance > 0 else 1.0
    shown = to_pixels({"image": x * std + mean, "kept": kept * std + mean}, config)
    removed, span = ((x - kept) * std)[0, list(config.drawn)].permute(1, 2, 0), 1.0
    if config.dtype != "uint8" or config.channels not in (1, 3):  # stretched: relative to the range of the image
        span = float((x * std).amax() - (x * std).amin()) or 1.0
    pixels = np.asarray((128 + removed * (255 / span)).round().clip(0, 255), np.uint8)
    return LowPassed(shown["kept"][0], pixels, share, radial_spectrum(x).tolist())
