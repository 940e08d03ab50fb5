"""pixmim pretrain, and the recipes it takes."""

import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from tyro.conf import Positional, arg

from pixmim.cli.terms import absolute, say
from pixmim.config import Run
from pixmim.errors import UserError
from pixmim.recipes import RECIPES, get_recipe
from pixmim.runfile import from_json

_MAY_CHANGE = {"data", "out", "device", "keep", "local_copy", "threads", "checkpoint_every", "log_every", "max_bad"}
"""Fields that a resumed run may change: they do not decide what is computed (data: if the same images moved)."""


def read_flags(args: list[str]) -> tuple[Run, str]:
    """What the flags say: the Run, and the directory of the run to resume, if any. Starts nothing. Raises UserError.

    Flags are read twice: the recipe (or the run to resume) decides the defaults of all the others.
    """
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
    if resumed:
        changed = [f.name for f in fields(Run) if getattr(run, f.name) != getattr(base, f.name)]
        for name in changed:
            if name not in _MAY_CHANGE:
                raise UserError(f"--{name.replace('_', '-')} cannot change when a run is resumed; begin a new run")
    elif not named:
        raise UserError("which recipe? For one's own images: pixmim-vit-small. `pixmim list` shows all.")
    elif not run.data:
        raise UserError("which images? Give --data FOLDER, or --data shapes: for drawn ones.")
    return run, resumed


def pretrain(args: list[str]) -> int:
    """Train, or go on."""
    run, resumed = read_flags(args)
    console = Console()
    out = Path(resumed or run.out or f"runs/{run.recipe or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}")
    if not resumed and (out / "config.json").exists():
        raise UserError(f"{out} holds a run already: go on with --resume {out}, or choose another --out")

    from pixmim.evaluate import knn_watch
    from pixmim.parts import measured
    from pixmim.pretrain import pretrain as train
    from pixmim.report import write_report

    knn = replace(run.knn, train=absolute(run.knn.train), test=absolute(run.knn.test))
    run = replace(run, out=str(out), data=absolute(run.data), knn=knn)
    if not resumed:
        run, lines = measured(run)
        for line in lines:
            say(console, line)
    watch = knn_watch(run)
    outcome = train(run, out, console, watch)
    if not outcome.finished:
        say(console, f"stopped after step {outcome.step}; go on with: pixmim pretrain --resume {out}")
        return 130
    page = write_report([out], out / "report.html")
    say(console, f"encoder: {out / 'encoder.safetensors'}\nreport:  {page}")
    return 0


def list_recipes(args: list[str]) -> int:
    """Show every recipe."""
    tyro.cli(lambda: None, prog="pixmim list", description="Show the recipes, with what each aims at.", args=args)
    for name, recipe in RECIPES.items():
        run = recipe.build()
        length = f"{run.steps:,} steps" if run.steps is not None else f"{run.epochs:.0f} epochs"
        print(f"{name:<29}{length:>12}, batch {run.batch_size:>5,}   {recipe.aim}")
    return 0


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


def _value_of(flag: str, args: list[str]) -> str:
    for i, word in enumerate(args):
        if word.startswith(flag + "="):
            return word.split("=", 1)[1]
        if word == flag and i + 1 < len(args):
            return args[i + 1]
    return ""
