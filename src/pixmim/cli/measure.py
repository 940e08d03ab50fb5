"""pixmim evaluate and pixmim report."""

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from tyro.conf import Positional, arg

from pixmim.cli.terms import absolute, say
from pixmim.errors import UserError, nearest
from pixmim.protocols import DATA, PROTOCOLS, All


def evaluate(args: list[str]) -> int:
    """Measure an encoder, and keep the result."""
    if not args or args[0] in ("list", "-h", "--help"):
        print(_overview())
        return 0
    name, known = args[0], [*PROTOCOLS, "all", "list"]
    if name not in known:
        raise UserError(f"there is no evaluation '{name}'{nearest(name, known)}\n\n{_overview()}")
    settings_type = All if name == "all" else PROTOCOLS[name].settings

    def command(
        model: Positional[str],
        /,
        *,
        settings: Annotated[settings_type, arg(name="")],  # type: ignore[valid-type]
        untrained: bool = False,
        out: Path | None = None,
        device: str = "auto",
        precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    ) -> tuple[str, Any, bool, Path, str, Literal["auto", "bf16", "fp16", "fp32"]]:
        """Measure an encoder.

        Args:
            model: A finished run, an imported folder, a file of weights, or timm:NAME.
            settings: Settings.
            untrained: Of a run: measure the encoder as it was before training as well, for comparison.
            out: Where results are kept; otherwise with the run, or in evaluations/MODEL.
            device: auto, cpu, cuda, cuda:1, mps.
            precision: auto: bf16 where the device computes in it.
        """
        return model, settings, untrained, out or _home(model), device, precision

    about = str(settings_type.__doc__) + (f" Needs {PROTOCOLS[name].needs}." if name in PROTOCOLS else "")
    model, settings, untrained, out, device, precision = tyro.cli(
        command, prog=f"pixmim evaluate {name}", description=about, args=args[1:]
    )
    from pixmim.evaluate import evaluate as measure
    from pixmim.evaluate.results import save
    from pixmim.report import results_table, write_report

    console, settings = Console(), _with_whole_paths(settings)
    evaluations = settings.parts() if isinstance(settings, All) else [(name, settings)]
    for before in [True, False] if untrained else [False]:
        for result in measure(
            model, evaluations, out, untrained=before, device=device, precision=precision, console=console
        ):
            save(result, out)
    console.print(results_table([out]))
    say(console, f"report: {write_report([out], out / 'report.html')}")
    return 0


def _overview() -> str:
    width = max(map(len, PROTOCOLS))
    about = {name: str(p.settings.__doc__).splitlines()[0] for name, p in PROTOCOLS.items()}
    about["all"] = str(All.__doc__)
    what = "\n".join(f"  {name:<{width}}  {line}" for name, line in about.items())
    needs = "\n".join(f"  {name:<{width}}  {p.needs}" for name, p in PROTOCOLS.items())
    return (
        f"usage: pixmim evaluate NAME MODEL [...]\n\n{what}\n\nWhat each needs:\n\n{needs}\n\n"
        "MODEL is a run, an imported folder, a file of weights, or timm:NAME.\n"
        "`pixmim evaluate NAME --help` explains every flag."
    )


def _home(model: str) -> Path:
    """Where the results of a model are kept: with a run or an imported folder, or else by its name."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    return Path("evaluations") / re.sub(r"[^A-Za-z0-9.]+", "-", model).strip("-")


def _with_whole_paths(settings: Any) -> Any:
    """The settings with whole paths in place of those of data, so that results tell what they were measured on."""
    data = [f.name for f in fields(settings) if f.name in DATA]
    return replace(settings, **{name: absolute(getattr(settings, name)) for name in data})


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
