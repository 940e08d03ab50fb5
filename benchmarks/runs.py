"""Named runs that are executed once: each is a process of its own that writes one JSON file, and resumes if killed."""

import argparse
import json
import math
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console

from pixmim.evaluation.context import EvalContext
from pixmim.evaluation.evaluate import measure as evaluate_all
from pixmim.evaluation.frozen_encoder import FrozenEncoder
from pixmim.utils.files import write_text_atomically


class Record:
    """The JSON file of a run: its settings, and the values measured so far.

    The folder of the data is left out of the settings, so that a run can be resumed on another machine.
    """

    def __init__(self, path: Path, settings: dict[str, Any], objects: str = "") -> None:
        self.path = path
        text = json.dumps(settings)
        settings = json.loads(text.replace(objects, "OBJECTS") if objects else text)
        self.values: dict[str, Any] = {"settings": settings, "points": {}, "finished": False}
        if path.exists():
            self.values = json.loads(path.read_text())
            if self.values["settings"] != settings:
                raise SystemExit(f"{path} has other settings than this run: choose another --out")

    def save(self, **values: Any) -> None:
        self.values |= values
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self.path, json.dumps(self.values, indent=1) + "\n")


def is_finished(name: str, out: Path) -> bool:
    path = out / f"{name}.json"
    return path.exists() and json.loads(path.read_text())["finished"]


def measure(encoder: FrozenEncoder, parts: list[tuple[str, Any]]) -> dict[str, float]:
    """Evaluate an encoder; values by evaluation and name. Features are computed once."""
    found, began = dict[str, float](), time.perf_counter()
    with TemporaryDirectory(prefix="pixmim-") as scratch:
        context = EvalContext(encoder, Path(scratch), "trained", Console(quiet=True))
        for result in evaluate_all(context, "", parts):
            for name, value in result.values.items():
                if math.isfinite(value) and not re.search("recall|category|severity", name):
                    name = re.sub("^k[0-9]+/", "", name)  # fewer images, fewer neighbors
                    found[f"{result.evaluation}/{name}"] = value
            found[f"{result.evaluation}/seconds"] = round(time.perf_counter() - began, 1)
            began = time.perf_counter()
    return found


def reset_peak_memory() -> None:
    """Forget the peak of earlier work in this process, where the system allows it (Linux)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """Return the largest resident memory of this process since `reset_peak_memory`, or since its start, in MB."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.findall(r"VmHWM:\s*([0-9]+) kB", status.read_text())[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def plus_minus(mean: float, half: float) -> str:
    """Return a difference and half of its interval as text; one that rounds to zero has no minus."""
    return f"{mean:+z.1f} ± {half:.1f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table of Markdown in lines."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def replace_generated(page: Path, begin: str, end: str, text: str) -> None:
    """Replace what is between two lines of a page."""
    before, _, rest = page.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{page} has no part between '{begin}' and '{end}'")
    write_text_atomically(page, f"{before}{begin}\n{text}\n{end}{after}")


def add_arguments(parser: argparse.ArgumentParser, scales: Mapping[str, Any]) -> None:
    """Add the arguments that `work_off` reads."""
    parser.add_argument("--objects", type=_absolute, default="", help="folder of the labeled shards")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--scale", choices=scales, default="cpu", help="sizes of the runs")
    parser.add_argument(
        "--tiny", action="store_const", const="tiny", dest="scale", help="the smallest sizes, for tests"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time; 0: in this process")
    parser.add_argument("--limit", type=int, default=None, help="stop after this many runs")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--table", action="store_true", help="write the page, and run nothing")


def _absolute(folder: str) -> str:
    return str(Path(folder).resolve()) if folder else ""


def work_off(names: Sequence[str], execute: Callable[[str], None], options: argparse.Namespace, script: str) -> int:
    """Execute the runs that are not finished, and return the exit status.

    Args:
        names: Names of the runs, in order.
        execute: Executes or resumes one of them and writes its file to `options.out`.
        options: Parsed arguments. With `run`, only that one is executed, in this process.
        script: File of the caller, which a process of its own is started from.
    """
    if options.run:
        _execute_once(options.run, execute, options.out)
        return 0
    waiting = [name for name in names if not is_finished(name, options.out)]
    print(f"{len(names) - len(waiting)} of {len(names)} runs are finished", flush=True)
    again = ["--objects", options.objects, "--out", str(options.out), "--scale", options.scale]
    again += ["--device", options.device]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // max(1, options.jobs)))}

    def start(name: str) -> bool:
        began = time.perf_counter()
        if options.jobs == 0:
            _execute_once(name, execute, options.out)
            code = 0
        else:
            command = [sys.executable, script, *again, "--run", name]
            code = subprocess.run(command, env=threads | dict(os.environ)).returncode
        seconds = time.perf_counter() - began
        outcome = "failed" if code else "finished" if is_finished(name, options.out) else "left"
        print(f"{name}: {outcome} after {seconds:.0f} s", flush=True)
        return code == 0

    if options.jobs == 0:  # signals reach the main thread only
        return 0 if all([start(name) for name in waiting[: options.limit]]) else 1
    with ThreadPoolExecutor(options.jobs) as pool:
        return 0 if all(list(pool.map(start, waiting[: options.limit]))) else 1


def _execute_once(name: str, execute: Callable[[str], None], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(out / f"{name}.lock", timeout=0):
            if is_finished(name, out):  # by another process, since this one made its list
                print(f"{name}: another process finished it", flush=True)
            else:
                execute(name)
    except Timeout:
        print(f"{name}: another process works on it", flush=True)
