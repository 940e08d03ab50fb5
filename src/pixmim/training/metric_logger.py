"""What a run says while it goes: metrics.jsonl for machines, a bar or plain lines for people."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from pixmim.utils.console import print_plain
from pixmim.utils.errors import UserError
from pixmim.utils.files import append, parse_json, read_text, write_text_atomically

DATA_BOUND = 0.1
"""Share of its time that a loop waits for data, from which on faster data would make a faster run."""


_MAX_BYTES = 2**28
_MAX_LINES = 1_000_000
_MAX_STEP = 2**53


def read_metrics(path: Path, warn: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """Read the lines of a metrics.jsonl that hold a step, an epoch and numbers; other lines are left out.

    Args:
        path: The file, which need not exist.
        warn: Called at most once, with what was left out. A last line that a kill cut short is not worth a warning.

    Raises:
        OSError: If there is something that is not a regular file, or is larger than 256 MiB.
    """
    if not path.exists():
        return []
    lines = read_text(path, _MAX_BYTES).split("\n")
    good, bad = list[dict[str, Any]](), list[str]()
    for number, line in enumerate(lines[:_MAX_LINES], 1):
        try:
            if line.strip():
                good.append(_metrics(line, f"line {number}"))
        except UserError as error:
            if number < len(lines):
                bad.append(str(error))
    if len(lines) > _MAX_LINES:
        bad.append(f"only the first {_MAX_LINES:,} lines are read")
    if bad:
        more = f", and {len(bad) - 1:,} more" if len(bad) > 1 else ""
        warn(f"{path}: {bad[0]}{more}")
    return good


def _metrics(text: str, source: str) -> dict[str, Any]:
    """One line of metrics. Raises UserError."""
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
    return line


def is_number(value: object) -> bool:
    """Return True for a finite number that a figure can show."""
    return type(value) in (int, float) and abs(value) < 1e100  # type: ignore[arg-type]


def bound_by(share: float) -> str:
    """What limits a run whose loop waits for data that share of its time."""
    return f"{'data' if share > DATA_BOUND else 'compute'}-bound: waits for data {share:.0%}"


class MetricLogger:
    """Writes a line of metrics every `every` steps, and shows where the run stands.

    path    metrics.jsonl; lines after step `start`, of a run that was interrupted, are removed. None: no file, of a
            process that only has a share in the means
    steps   updates in the whole run
    epoch   passes over the data that one step makes
    images  images in one step
    total   sums a tensor over all processes of the run
    on_write  called with each line that is written, where there is a file
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
        on_write: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self._path, self._unwritten, self._total = path, "", total
        self._on_write = on_write
        if path is not None:
            lines = read_metrics(path, lambda text: print_plain(console, f"warning: {text}")) if start else []
            write_text_atomically(path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= start))
        self._steps, self._every, self._epoch, self._images = steps, every, epoch, images
        self._console = console
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}", markup=False),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=start, text="")
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._began = self._since = time.perf_counter()
        self._first, self._waited, self._spoke, self._seconds = start, 0.0, 0.0, 0.0

    def __enter__(self) -> "MetricLogger":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()
        self._write_out()

    def should_log(self, step: int) -> bool:
        """Whether the step that made the count `step` closes a line; only then is the device asked for numbers."""
        return step % self._every == 0 or step == self._steps

    def update(self, step: int, **values: Tensor) -> None:
        """Take a step's scalars, on the device and unread. Values that are not finite do not count in the mean."""
        for name, value in values.items():
            number = torch.stack([value.detach().nan_to_num(0.0, 0.0, 0.0), torch.isfinite(value).float()])
            self._sums[name] = self._sums[name] + number if name in self._sums else number
        self._count += 1
        self._bar.update(self._task, completed=step)

    def log(self, step: int, waited: float, **values: float) -> None:
        """Write the means since the last line. `waited`: seconds spent waiting for data since the run began."""
        sums = self._total(torch.stack(list(self._sums.values()))).tolist() if self._sums else []
        means = {
            n: total / count if count else float("nan") for n, (total, count) in zip(self._sums, sums, strict=True)
        }
        now = time.perf_counter()
        seconds = max(now - self._since, 1e-9)
        self._seconds += seconds
        line = {
            "step": step,
            "epoch": round(step * self._epoch, 6),
            **means,
            **values,
            "images_per_s": self._count * self._images / seconds,
            "data_wait_fraction": min(1.0, (waited - self._waited) / seconds),
        }
        self.write(line)
        text = (
            f"loss {means.get('loss', float('nan')):.4f} · {line['images_per_s']:,.0f} images/s"
            f" · {bound_by(line['data_wait_fraction'])}"
        )
        self._bar.update(self._task, text=text)
        if not self._console.is_terminal and (now - self._spoke > 5 or step == self._steps):
            left = (now - self._began) / max(1, step - self._first) * (self._steps - step)
            print_plain(self._console, f"step {step}/{self._steps} · {text} · {left / 60:.1f} min left")
            self._spoke = now
        self._sums, self._count, self._since, self._waited = {}, 0, now, waited

    @property
    def data_wait(self) -> float:
        """Share of the time of all lines so far that the loop waited for data."""
        return min(1.0, self._waited / self._seconds) if self._seconds else 0.0

    def write(self, line: dict[str, Any]) -> None:
        """Append a line as it is; on a full disk, as soon as there is space again."""
        self._unwritten += json.dumps(line) + "\n"
        self._write_out()
        if self._on_write is not None and self._path is not None:
            self._on_write(dict(line))

    def _write_out(self) -> None:
        if self._path is None or not self._unwritten:
            return
        try:
            append(self._path, self._unwritten)
            self._unwritten = ""
        except OSError as error:
            print_plain(self._console, f"warning: {self._path} cannot be written now: {error}")

    def pause(self) -> None:
        """Leave out of the rate the time since the last line, which went to something else than training."""
        self._since = time.perf_counter()
        self._count = 0
