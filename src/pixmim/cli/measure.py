"""pixmim evaluate and pixmim report."""

from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console
from tyro.conf import Positional

from pixmim.cli.terms import say
from pixmim.errors import UserError


def evaluate(args: list[str]) -> int:
    """Measure a run on labelled folders, and keep the result with the run."""

    def command(
        name: Positional[Literal["knn", "linear"]],
        run: Positional[Path],
        /,
        *,
        train: str,
        test: str,
        untrained: bool = False,
        device: str = "auto",
        precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    ) -> int:
        """Measure the frozen encoder of a finished run.

        Args:
            name: knn: 20 nearest neighbours vote. linear: a probe, its settings chosen on a held-out part of train.
            run: Directory of the run.
            train: Labelled data to learn from: a folder with one subfolder for each class, hf:NAME, or shapes:.
            test: Labelled data to be measured on.
            untrained: Measure the encoder as it was before training as well, for comparison.
            device: auto, cpu, cuda, cuda:1, mps.
            precision: auto: bf16 where the device computes in it.
        """
        from pixmim.evaluate import evaluate as measure
        from pixmim.evaluate.results import save
        from pixmim.report import results_table, write_report

        console = Console()
        for before in [True, False] if untrained else [False]:
            result = measure(
                name, run, train, test, untrained=before, device=device, precision=precision, console=console
            )
            save(result, run)
        console.print(results_table([run]))
        page = write_report([run], run / "report.html")
        say(console, f"report: {page}")
        return 0

    return tyro.cli(command, prog="pixmim evaluate", args=args)


def report(args: list[str]) -> int:
    """Write the page of one run, or of several side by side."""

    def command(runs: Positional[tuple[Path, ...]], /, *, out: Path | None = None) -> int:
        """Write one self-contained HTML page.

        Args:
            runs: Directories of runs, side by side on the page.
            out: Where to write it; otherwise RUN/report.html, or report.html for several runs.
        """
        from pixmim.report import results_table, write_report

        if not runs:
            raise UserError("which run? pixmim report RUN [RUN ...]")
        page = write_report(list(runs), out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html")))
        console = Console()
        console.print(results_table(list(runs)))
        say(console, f"report: {page}")
        return 0

    return tyro.cli(command, prog="pixmim report", args=args)
