"""pixmim evaluate and pixmim report."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from tyro.conf import Positional, Suppress, arg

from pixmim.cli.flags import ModelFlags, ModelFlagsWithoutSize, absolute, checked
from pixmim.evaluation.evals import EVALS
from pixmim.evaluation.settings import EvaluateAllSettings
from pixmim.utils.console import print_plain
from pixmim.utils.errors import UserError, did_you_mean
from pixmim.utils.files import check_output, check_writable
from pixmim.utils.validation import Device


def evaluate(args: list[str]) -> int:
    """Measure an encoder, and keep the result."""
    if not args or args[0] in ("list", "-h", "--help"):
        print(_overview())
        return 0
    name, known = args[0], [*EVALS, "all", "list"]
    if name not in known:
        raise UserError(f"there is no evaluation '{name}'{did_you_mean(name, known)}\n\n{_overview()}")
    settings_type = EvaluateAllSettings if name == "all" else EVALS[name].settings
    overwrite_type = bool if name in ("finetune", "all") else Suppress[bool]
    flags_type = ModelFlagsWithoutSize if any(f.name == "size" for f in fields(settings_type)) else ModelFlags

    def command(
        models: Positional[tuple[str, ...]],
        /,
        *,
        settings: Annotated[settings_type, arg(name="")],  # type: ignore[valid-type]
        untrained: bool = False,
        overwrite: overwrite_type = False,  # type: ignore[valid-type]
        out: Path | None = None,
        device: Device = "auto",
        precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
        model_flags: Annotated[flags_type, arg(name="")] = flags_type(),  # type: ignore[valid-type]  # noqa: B008
    ) -> tuple[tuple[str, ...], Any, Path | None, dict[str, Any]]:
        """Measure an encoder, or several side by side.

        Args:
            models: Runs, finished or not, imported folders, files of weights, or timm:NAME.
            settings: Settings.
            untrained: Of runs: measure the encoders as they were before training as well, for comparison.
            overwrite: Replace a classifier that was fine-tuned with other settings; train one of the same again.
            out: Where results and the page are kept; otherwise with the run, or in evaluations/MODEL, and the page of
                several in report.html.
            device: auto, cpu, cuda, cuda:1, mps.
            precision: auto: bf16 where the device computes in it.
            model_flags: What the file does not contain.
        """
        how = {"untrained": untrained, "overwrite": overwrite, "device": device, "precision": precision}
        return models, settings, out, {**how, "known": model_flags.hints}  # type: ignore[attr-defined]

    about = str(settings_type.__doc__) + (f" Needs {EVALS[name].needs}." if name in EVALS else "")
    models, settings, out, how = tyro.cli(
        checked(command), prog=f"pixmim evaluate {name}", description=about, args=args[1:]
    )
    if not models:
        raise UserError(f"which encoder? pixmim evaluate {name} MODEL [MODEL ...]")
    from pixmim.api import with_full_paths
    from pixmim.evaluation.evaluate import evaluate_many
    from pixmim.evaluation.results import save
    from pixmim.report import DATA_MARK

    console, settings = Console(), with_full_paths(settings)
    evaluations = settings.parts() if isinstance(settings, EvaluateAllSettings) else [(name, settings)]
    homes = {model: _home(model, out, several=len(set(models)) > 1) for model in models}
    page = _page(list(homes.values()), out / "report.html" if out else None)
    check_output(page, mark=DATA_MARK)
    for home in homes.values():
        check_writable(home / "evaluations" / "results.json")
    for result, home in evaluate_many(homes, evaluations, console=console, **how):
        save(result, home)
    _show(list(homes.values()), page, console)
    return 0


def _overview() -> str:
    width = max(map(len, EVALS))
    about = {name: str(p.settings.__doc__).splitlines()[0] for name, p in EVALS.items()}
    about["all"] = str(EvaluateAllSettings.__doc__)
    what = "\n".join(f"  {name:<{width}}  {line}" for name, line in about.items())
    needs = "\n".join(f"  {name:<{width}}  {p.needs}" for name, p in EVALS.items())
    return (
        f"usage: pixmim evaluate NAME MODEL [MODEL ...] [--untrained] ...\n\n{what}\n\nWhat each needs:\n\n{needs}\n\n"
        "MODEL is a run, an imported folder, a file of weights, or timm:NAME; of several, one table is made.\n"
        "`pixmim evaluate NAME --help` explains every flag."
    )


def _home(model: str, out: Path | None, *, several: bool) -> Path:
    """Where the results of a model are kept: where it was asked for, or with a run, or else by the model's name."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", model).strip("-")
    if out is not None:
        return out / name if several else out
    folder = Path(model).expanduser()
    return folder if folder.is_dir() else Path("evaluations") / name


def _page(folders: list[Path], page: Path | None) -> Path:
    """Return where the page of these folders goes; that of a single one by default into it."""
    return page or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))


def _show(folders: list[Path], page: Path, console: Console, data: str | None = None, bands: str = "") -> None:
    """Write the page of what is in these folders, and print its table."""
    from pixmim.report import results_table, write_report

    write_report(folders, page, data, lambda line: print_plain(console, f"warning: {line}"), bands)
    console.print(results_table(folders, console.width))
    print_plain(console, f"report: {page}")


def report(args: list[str]) -> int:
    """Write the page of one run, or of several side by side."""

    def command(
        runs: Positional[tuple[Path, ...]], /, *, data: str | None = None, out: Path | None = None, bands: str = ""
    ) -> int:
        """Write one self-contained HTML page.

        Args:
            runs: Directories of runs, side by side on the page.
            data: Images to draw reconstructions of, as pretrain's --data takes them; otherwise each run's own. Those
                that a run from elsewhere names are not opened.
            out: Where to write it; otherwise RUN/report.html, or report.html for several runs.
            bands: Channels to draw as red, green and blue, counted from 1, such as 4,3,2; otherwise each run's.
        """
        if not runs:
            raise UserError("which run? pixmim report RUN [RUN ...]")
        _show(list(runs), _page(list(runs), out), Console(), None if data is None else absolute(data), bands)
        return 0

    return tyro.cli(command, prog="pixmim report", args=args)
