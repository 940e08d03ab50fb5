"""Metrics of a run: metrics.jsonl, a progress bar or plain lines, and the summaries at its start and end."""

import json
import math
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from pixmim.config import PretrainConfig
from pixmim.targets import resolve_radius
from pixmim.training.distributed import Distributed
from pixmim.training.optim import Schedule
from pixmim.training.parallelize import parallel_mode
from pixmim.utils.console import print_plain, progress_bar
from pixmim.utils.errors import UserError
from pixmim.utils.files import append, parse_json, read_text, write_text_atomically

DATA_BOUND = 0.1
"""Fraction of time waiting for data above which a faster data pipeline would make a faster run."""

_MAX_BYTES = 2**28
_MAX_LINES = 1_000_000
_MAX_STEP = 2**53


def read_metrics(path: Path, warn: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """Read the lines of a metrics.jsonl that hold a step, an epoch and numbers, and skip all others.

    Args:
        path: The file, which need not exist.
        warn: Called at most once, with a summary of the skipped lines. A last line that is cut short is not reported.

    Raises:
        OSError: If it is not a regular file, or is larger than 256 MiB.
    """
    if not path.exists():
        return []
    lines = read_text(path, _MAX_BYTES).split("\n")
    good, bad = list[dict[str, Any]](), list[str]()
    for number, line in enumerate(lines[:_MAX_LINES], 1):
        try:
            if line.strip():
                good.append(parse_metrics(line, f"line {number}"))
        except UserError as error:
            if number < len(lines):
                bad.append(str(error))
    if len(lines) > _MAX_LINES:
        bad.append(f"only the first {_MAX_LINES:,} lines are read")
    if bad:
        more = f", and {len(bad) - 1:,} more" if len(bad) > 1 else ""
        warn(f"{path}: {bad[0]}{more}")
    return good


def parse_metrics(text: str, source: str) -> dict[str, Any]:
    """Parse an untrusted line of metrics. Raises UserError."""
    line = parse_json(text, source)
    if not isinstance(line, dict):
        raise UserError(f"{source} is not an object")
    step, epoch = line.get("step"), line.get("epoch")
    if type(step) is not int or not 0 <= step <= _MAX_STEP:
        raise UserError(f"{source} has no step that is a number of 0 or more")
    if epoch is None or not is_number(epoch) or not 0 <= epoch <= _MAX_STEP:
        raise UserError(f"{source} has no epoch that is a number of 0 or more")
    for name, value in line.items():
        if value is not None and not isinstance(value, float) and not is_number(value):
            raise UserError(f"{source} has a '{name[:40]}' that is not a number")
    return {name: value for name, value in line.items() if value is None or is_number(value)}


def is_number(value: object) -> bool:
    """Return True for a finite number that can be plotted."""
    return type(value) in (int, float) and abs(value) < 1e100  # type: ignore[arg-type]


def bound_by(data_wait: float) -> str:
    """Describe what limits a run that waits for data for this fraction of its time."""
    return f"{'data' if data_wait > DATA_BOUND else 'compute'}-bound: waits for data {data_wait:.0%}"


class MetricLogger:
    """Log means of metrics every `every` steps, to metrics.jsonl and the terminal.

    Lines of metrics.jsonl after step `start` are removed; its path is None on ranks other than 0. `epoch` is the number
    of epochs per step, and `images` that of images. `total` sums a tensor over the ranks; `on_write` gets each record.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        steps: int,
        start: int,
        every: int,
        epoch: float,
        images: int,
        console: Console,
        total: Callable[[Tensor], Tensor] = lambda values: values,
        on_write: Callable[[dict[str, Any]], object] | None = None,
    ) -> None:
        self._path, self._unwritten, self._total, self._on_write = path, "", total, on_write
        if path is not None:
            lines = read_metrics(path, lambda text: print_plain(console, f"warning: {text}")) if start else []
            write_text_atomically(path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= start))
        self._steps, self._every, self._epoch, self._images = steps, every, epoch, images
        self._console = console
        self._bar = progress_bar(console)
        self._task = self._bar.add_task("", total=steps, completed=start)
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._start_time = self._line_time = time.perf_counter()
        self._start, self._printed_at = start, 0.0
        self._waited = self._waited_before = 0.0  # seconds of waiting: up to now, and before this line
        self._line_seconds = self._line_waited = 0.0  # of all lines
        self._held_out = ""  # the last held-out loss

    def __enter__(self) -> "MetricLogger":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        self._flush()

    def should_log(self, step: int) -> bool:
        """Return True if a line is due after `step` steps; only then are values copied from the device."""
        return step % self._every == 0 or step == self._steps

    def update(self, step: int, waited: float, **values: Tensor) -> None:
        """Add scalars of a step, on the device, to the means. Values that are not finite are left out.

        `waited` is the number of seconds of waiting for data since the process started.
        """
        for name, value in values.items():
            number = torch.stack([value.detach().nan_to_num(0.0, 0.0, 0.0), torch.isfinite(value).float()])
            self._sums[name] = self._sums[name] + number if name in self._sums else number
        self._count, self._waited = self._count + 1, waited
        self._bar.update(self._task, completed=step)

    def log(self, step: int, **values: float) -> None:
        """Write a line with the means since the last line."""
        sums = self._total(torch.stack(list(self._sums.values()))).tolist() if self._sums else []
        means = {name: total / count for name, (total, count) in zip(self._sums, sums, strict=True) if count}
        now = time.perf_counter()
        seconds = max(now - self._line_time, 1e-9)
        waited = min(seconds, self._waited - self._waited_before)
        self._line_seconds, self._line_waited = self._line_seconds + seconds, self._line_waited + waited
        rate, wait = self._count * self._images / seconds, waited / seconds
        position = {"step": step, "epoch": round(step * self._epoch, 6)}
        self.write({**position, **means, **values, "images_per_s": rate, "data_wait_fraction": wait})
        text = f"loss {means.get('loss', float('nan')):.4f}{self._held_out} · {rate:,.0f} images/s · {bound_by(wait)}"
        self._bar.update(self._task, description=text)
        if step == self._steps or (not self._console.is_terminal and now - self._printed_at > 5):
            left = (now - self._start_time) / max(1, step - self._start) * (self._steps - step)
            print_plain(self._console, f"step {step}/{self._steps} · {text} · {left / 60:.1f} min left")
            self._printed_at = now
        self._sums, self._count, self._line_time, self._waited_before = {}, 0, now, self._waited

    @property
    def data_wait(self) -> float:
        """Fraction of the time of all lines so far that was spent waiting for data."""
        return self._line_waited / self._line_seconds if self._line_seconds else 0.0

    def write(self, record: dict[str, Any]) -> None:
        """Append the finite numbers of a record. If the disk is full, they are written with a later one."""
        record = {name: value for name, value in record.items() if math.isfinite(value)}  # no number of JSON
        if "held_out_loss" in record:
            self._held_out = f", held out {record['held_out_loss']:.4f}"
        self._unwritten += json.dumps(record) + "\n"
        self._flush()
        if self._on_write is not None and self._path is not None:
            self._on_write(dict(record))

    def _flush(self) -> None:
        if self._path is None or not self._unwritten:
            return
        try:
            append(self._path, self._unwritten)
            self._unwritten = ""
        except OSError as error:
            print_plain(self._console, f"warning: cannot write {self._path} ({error}); retrying with the next line")

    def pause(self) -> None:
        """Exclude the time since the last line from the throughput, and what of it was waiting for data."""
        self._line_time, self._count, self._waited_before = time.perf_counter(), 0, self._waited


def start_summary(
    config: PretrainConfig,
    images: int,
    schedule: Schedule,
    device: torch.device,
    precision: str,
    world: Distributed,
    parts: int,
) -> list[str]:
    """Return lines that describe a run, and warn about unusual settings. `images`: size of the dataset."""
    c, share = config, config.batch_size // world.size
    radius = resolve_radius(c.target.radius, c.image_size)
    target = f"low frequencies up to radius {radius}" if c.target.kind == "low-frequency" else "pixels"
    target += f" in {c.target.bins} bins" if c.target.distance == "cross_entropy" else ""
    alone = f" after {schedule.decoder:,} steps that train only the decoder" if schedule.decoder else ""
    drop = f", a tenth of it from step {schedule.decoder + schedule.drop:,}" if schedule.drop is not None else ""
    split = f" in {parts} parts of {'up to ' * bool(share % parts)}{-(-share // parts):,}" if parts > 1 else ""
    hardware = f"{device}, each batch{split}," if split else str(device)
    if world.size > 1:
        mode = parallel_mode(c.parallel, world)
        hardware = f"{world.size} processes on {device.type} ({mode}), each {share:,} images of a batch{split},"
    lines = [
        f"{c.model.name} on {c.model.backbone} at {c.image_size[0]}x{c.image_size[1]}, predicting {target}, "
        f"crop {c.crop.kind}",
        f"{images:,} images; {schedule.steps:,} steps of {c.batch_size:,} images = "
        f"{schedule.steps * c.batch_size / images:,.1f} epochs; "
        f"learning rate {c.lr:.3g} after {schedule.warmup:,} steps of warm-up{alone}{drop}",
        f"{hardware} in {precision}, seed {c.seed}",
    ]
    usual_lr = c.optim.base_lr * c.batch_size / 256
    recipe_steps = c.recipe_info.steps
    if schedule.steps < recipe_steps / 10:
        lines.append(
            f"warning: {schedule.steps:,} steps are less than a tenth of the {recipe_steps:,} that this "
            "recipe was made for: pass more --epochs or a smaller --batch-size"
        )
    if c.optim.lr is not None and not 0.25 < c.lr / usual_lr < 4:
        lines.append(
            f"warning: --optim.lr {c.lr:.3g} is unusual for a batch of {c.batch_size:,}: without it, the learning "
            f"rate is {usual_lr:.3g}"
        )
    ends = {"warmup-start-lr": schedule.first, "min-lr": schedule.final if schedule.drop is None else 0.0}
    lines += [
        f"warning: --optim.{name} {rate:.3g} is above the learning rate {c.lr:.3g} of a batch of {c.batch_size:,}: "
        f"pass less, such as --optim.{name} 0"
        for name, rate in ends.items()
        if rate > c.lr
    ]
    if (c.dtype != "uint8" or c.channels not in (1, 3)) and (c.mean is None or c.std is None):
        lines.append(
            "warning: mean and std are not measured, so those of photographs are used: run `pixmim stats DATA`"
        )
    if images < c.batch_size:
        lines.append(f"warning: a batch of {c.batch_size:,} contains each of the {images:,} images more than once")
    return lines


def end_summary(config: PretrainConfig, step: int, skipped: int, bad: int, images: int, data_wait: float) -> list[str]:
    """Return lines about a slow data pipeline, `skipped` of the steps, and `bad` of the images, if there are any."""
    lines = []
    if data_wait > DATA_BOUND:
        command = f"pixmim bench-data {shlex.quote(config.data)}"
        lines.append(f"the run waited for data {data_wait:.0%} of its time: `{command}` recommends what to change")
    if skipped:
        lines.append(f"{skipped} of {step} steps were skipped because their gradient was not finite")
    if bad:
        lines.append(f"{bad} of {images} images could not be read: see {config.out}/skipped.csv")
    return lines
