"""The commands. Thin: each reads its flags and calls one function. Imports torch only once there is work to do."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.markup import escape
from tyro.conf import Positional, arg

from pixmim.config import Run, from_json
from pixmim.errors import UserError, nearest
from pixmim.recipes import RECIPES, get_recipe

OVERVIEW = """usage: pixmim COMMAND [...]

  pretrain   train a backbone on your own images
  evaluate   measure it: k-NN, linear probe
  report     one page of settings, curves, reconstructions and results, for one run or several
  list       the recipes, with what each aims at

`pixmim COMMAND --help` explains every flag. First steps: pixmim pretrain pixmim-vit-tiny --data FOLDER"""

_MAY_CHANGE = {"data", "out", "device", "threads", "checkpoint_every", "log_every", "max_bad"}
"""Fields that a resumed run may change: they do not decide what is computed (data: if the same images moved)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; gives the exit status: 0 done, 1 something only the user can put right, 130 interrupted."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        if not args or args[0] in ("-h", "--help"):
            print(OVERVIEW)
            return 0
        if args[0] not in COMMANDS:
            raise UserError(f"there is no command '{args[0]}'{nearest(args[0], COMMANDS)}\n\n{OVERVIEW}")
        return COMMANDS[args[0]](args[1:])
    except (UserError, OSError) as error:  # OSError: no space, no permission; its message says where
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 130


def pretrain(args: list[str]) -> int:
    """Read the flags twice: the recipe (or the run to resume) decides the defaults of all the others."""
    resumed = _value_of("--resume", args)
    named = args[0] if args and not args[0].startswith("-") else ""
    if resumed and named:
        raise UserError(f"--resume goes on with the recipe of {resumed}: leave out '{named}'")
    base = _load(Path(resumed) / "config.json") if resumed else _base(named)
    if _value_of("--epochs", args):  # a length in epochs replaces a recipe's length in steps
        if _value_of("--steps", args):
            raise UserError("a run has a length in --epochs or in --steps, not both")
        base = replace(base, steps=None) if not resumed else base

    def command(
        name: Annotated[Positional[str], arg(metavar="RECIPE")] = "",
        /,
        *,
        resume: str = "",
        run: Annotated[Run, arg(name="")] = base,
    ) -> tuple[str, Run]:
        """Pre-train a backbone on unlabelled images.

        Args:
            name: A recipe's name (see `pixmim list`), or the config.json of another run.
            resume: Directory of an interrupted run, to go on with exactly where its newest checkpoint stands.
            run: Settings.
        """
        return resume, run

    _, run = tyro.cli(command, prog="pixmim pretrain", args=args)
    run = replace(run, model=replace(run.model, options={**base.model.options, **run.model.options}))
    console = Console()
    if resumed:
        changed = [f.name for f in fields(Run) if getattr(run, f.name) != getattr(base, f.name)]
        for name in changed:
            if name not in _MAY_CHANGE:
                raise UserError(f"--{name.replace('_', '-')} cannot change when a run is resumed; begin a new run")
        out = Path(resumed)
    else:
        if not named:
            raise UserError("which recipe? For one's own images: pixmim-vit-small. `pixmim list` shows all.")
        if not run.data:
            raise UserError("which images? Give --data FOLDER, or --data shapes: for drawn ones.")
        out = Path(run.out or f"runs/{run.recipe or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}")
        if (out / "config.json").exists():
            raise UserError(f"{out} holds a run already: go on with --resume {out}, or choose another --out")

    from pixmim.evaluate import knn_watch
    from pixmim.pretrain import pretrain as train
    from pixmim.report import write_report

    knn = replace(run.knn, train=_absolute(run.knn.train), test=_absolute(run.knn.test))
    run = replace(run, out=str(out), data=_absolute(run.data), knn=knn)
    watch = knn_watch(run)
    outcome = train(run, out, console, watch)
    if not outcome.finished:
        _say(console, f"stopped after step {outcome.step}; go on with: pixmim pretrain --resume {out}")
        return 130
    page = write_report([out], out / "report.html")
    _say(console, f"encoder: {out / 'encoder.safetensors'}\nreport:  {page}")
    return 0


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
            train: Labelled data to learn from: a folder with one subfolder for each class, or shapes:.
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
        _say(console, f"report: {page}")
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
        _say(console, f"report: {page}")
        return 0

    return tyro.cli(command, prog="pixmim report", args=args)


def list_recipes(args: list[str]) -> int:
    """Show every recipe."""
    tyro.cli(lambda: None, prog="pixmim list", description="Show the recipes, with what each aims at.", args=args)
    for name, recipe in RECIPES.items():
        run = recipe.build()
        length = f"{run.steps:,} steps" if run.steps is not None else f"{run.epochs:.0f} epochs"
        print(f"{name:<29}{length:>12}, batch {run.batch_size:>5,}   {recipe.aim}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "pretrain": pretrain,
    "evaluate": evaluate,
    "report": report,
    "list": list_recipes,
}


def _base(named: str) -> Run:
    """The Run that the flags start from: a recipe's, a file's, or, for --help alone, the defaults."""
    if not named:
        return Run()
    if named.endswith(".json") or Path(named).is_file():
        return replace(_load(Path(named)), out="")
    return get_recipe(named)


def _load(path: Path) -> Run:
    if not path.is_file():
        raise UserError(f"there is no {path}")
    return from_json(path.read_text(), path)


def _absolute(data: str) -> str:
    """A folder's whole path, so that a run finds its data from wherever it is resumed or reported on."""
    return data if not data or data.startswith("shapes:") else str(Path(data).expanduser().resolve())


def _say(console: Console, text: str) -> None:
    """Print plain text as it is: no wrapped paths, no colours, no markup in names."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def _value_of(flag: str, args: list[str]) -> str:
    for i, word in enumerate(args):
        if word.startswith(flag + "="):
            return word.split("=", 1)[1]
        if word == flag and i + 1 < len(args):
            return args[i + 1]
    return ""


if __name__ == "__main__":
    sys.exit(main())
