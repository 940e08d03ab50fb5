"""What a run says while it goes: metrics.jsonl for machines, a bar or plain lines for people."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from pixmim.disk import write_whole

DATA_BOUND = 0.1
"""Share of its time that a loop waits for data, from which on faster data would make a faster run."""


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last line that a kill cut short is left out."""
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return


def bound_by(share: float) -> str:
    """What limits a run whose loop waits for data that share of its time."""
    return f"{'data' if share > DATA_BOUND else 'compute'}-bound: waits for data {share:.0%}"


class RunLog:
    """Writes a line of metrics every `every` steps, and shows where the run stands.

    path    metrics.jsonl; lines after step `start`, of a run that was interrupted, are removed. None: no file, of a
            process that only has a share in the means
    steps   updates in the whole run
    epoch   passes over the data that one step makes
    images  images in one step
    total   sums a tensor over all processes of the run
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
    ) -> None:
        self._path, self._unwritten, self._total = path, "", total
        if path is not None:
            kept = [line for line in read_metrics(path) if line["step"] <= start] if start else []
            write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._steps, self._every, self._epoch, self._images = steps, every, epoch, images
        self._console = console
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=start, text="")
        self._sums: dict[str, Tensor] = {}
        self._count = 0
        self._began = self._since = time.perf_counter()
        self._first, self._waited, self._spoke, self._seconds = start, 0.0, 0.0, 0.0

    def __enter__(self) -> "RunLog":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()
        self._write_out()

    def due(self, step: int) -> bool:
        """Whether the step that made the count `step` closes a line; only then is the device asked for numbers."""
        return step % self._every == 0 or step == self._steps

    def add(self, step: int, **values: Tensor) -> None:
        """Take a step's scalars, on the device and unread. Values that are not finite do not count in the mean."""
        for name, value in values.items():
            number = torch.stack([value.detach().nan_to_num(0.0, 0.0, 0.0), torch.isfinite(value).float()])
            self._sums[name] = self._sums[name] + number if name in self._sums else number
        self._count += 1
        self._bar.update(self._task, completed=step)

    def line(self, step: int, waited: float, **values: float) -> None:
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
            "data_wait": min(1.0, (waited - self._waited) / seconds),
        }
        self.write(line)
        text = (
            f"loss {means.get('loss', float('nan')):.4f} · {line['images_per_s']:,.0f} images/s"
            f" · {bound_by(line['data_wait'])}"
        )
        self._bar.update(self._task, text=text)
        if not self._console.is_terminal and (now - self._spoke > 5 or step == self._steps):
            left = (now - self._began) / max(1, step - self._first) * (self._steps - step)
            self._console.print(
                f"step {step}/{self._steps} · {text} · {left / 60:.1f} min left", highlight=False, soft_wrap=True
            )
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

    def _write_out(self) -> None:
        if self._path is None or not self._unwritten:
            return
        size = 0
        try:
            with self._path.open("a") as file:
                size = file.tell()
                file.write(self._unwritten)
            self._unwritten = ""
        except OSError as error:
            with suppress(OSError):
                os.truncate(self._path, size)  # no part of a line stays
            self._console.print(f"warning: {self._path} cannot be written now: {error}", markup=False, soft_wrap=True)

    def pause(self) -> None:
        """Leave out of the rate the time since the last line, which went to something else than training."""
        self._since = time.perf_counter()
        self._count = 0
