"""pixmim pretrain and pixmim list."""

from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Annotated, NamedTuple

import tyro
from rich.console import Console
from tyro.conf import Positional, arg

from pixmim.config import PretrainConfig
from pixmim.config_io import load_config
from pixmim.recipes import RECIPES, get_recipe
from pixmim.training.trackers import TrackerName
from pixmim.utils.console import print_plain
from pixmim.utils.errors import UserError
from pixmim.utils.trust import refusal, untrusted_references


class Flags(NamedTuple):
    """The parsed flags: the configuration, the run to resume (if any), whether to end it instead, and the trackers."""

    config: PretrainConfig
    resumed: str
    finish: bool
    track: tuple[TrackerName, ...]


def read_flags(args: list[str]) -> Flags:
    """Parse the flags of `pixmim pretrain`. Raises UserError.

    They are parsed twice: the recipe, or the run to resume, decides the defaults of all the others.
    """
    resumed = _value_of("--resume", args)
    named = args[0] if args and not args[0].startswith("-") else ""
    if resumed and named:
        raise UserError(f"--resume continues with the recipe of {resumed}: leave out '{named}'")
    base, text = load_config(Path(resumed) / "config.json") if resumed else _base(named)
    if _value_of("--epochs", args):  # a length in epochs replaces a recipe's length in steps
        if _value_of("--steps", args):
            raise UserError("a run has a length in --epochs or in --steps, not both")
        base = replace(base, steps=None)

    def command(
        name: Annotated[Positional[str], arg(metavar="RECIPE")] = "",
        /,
        *,
        resume: str = "",
        finish: bool = False,
        track: tuple[TrackerName, ...] = (),
        config: Annotated[PretrainConfig, arg(name="")] = base,
    ) -> tuple[bool, tuple[TrackerName, ...], PretrainConfig]:
        """Pre-train a backbone on unlabeled images.

        Args:
            name: Name of a recipe (see `pixmim list`), or the config.json of another run.
            resume: Folder of a run to continue from its newest checkpoint; if finished, with more --epochs or --steps.
            finish: With --resume: end the run now, with the encoder of its newest checkpoint.
            track: Trackers that receive metrics, configuration and reconstructions; each has an extra of its name.
            config: Settings.
        """
        return finish, track, config

    finish, track, config = tyro.cli(command, prog="pixmim pretrain", args=args)
    config = replace(config, model=replace(config.model, options={**base.model.options, **config.model.options}))
    if finish and not resumed:
        raise UserError("--finish ends an existing run: pixmim pretrain --resume RUN --finish")
    if not resumed and not named:
        raise UserError("no recipe given: for your own images use pixmim-vit-small, or another one of `pixmim list`")
    if not resumed and not config.data:
        raise UserError("no data given: pass --data FOLDER, or --data shapes: for the built-in synthetic dataset")
    typed = {flag for flag in config.named if any(word.split("=")[0] == flag for word in args)}
    strange = untrusted_references(text, {flag: value for flag, value in config.named.items() if flag not in typed})
    if strange and not finish:
        raise UserError(f"{refusal(resumed or named, strange)}. Pass these flags, or others in their place, to open it")
    return Flags(config, resumed, finish, track)


def pretrain(args: list[str]) -> int:
    """Train, resume or end a run."""
    config, resumed, end, track = read_flags(args)
    from pixmim.pretraining import finish_run
    from pixmim.pretraining import pretrain as train
    from pixmim.training.distributed import rank_info

    console = Console(quiet=rank_info().rank > 0)
    if end:
        result = finish_run(resumed)
        print_plain(console, f"ended after step {result.step:,}")
    else:
        result = train(config, resumed or None, resume=bool(resumed), track=track)
    if not result.finished:
        command = f"pixmim pretrain --resume {quote(str(result.folder))}"
        print_plain(console, f"stopped after step {result.step}; resume with: {command}")
        return 130
    print_plain(console, f"encoder: {result.folder / 'encoder'}\nreport:  {result.folder / 'report.html'}")
    return 0


def list_recipes(args: list[str]) -> int:
    """Print every recipe."""
    tyro.cli(lambda: None, prog="pixmim list", description="List the recipes, with what each aims at.", args=args)
    for name, recipe in RECIPES.items():
        config = recipe.build()
        length = f"{config.steps:,} steps" if config.steps is not None else f"{config.epochs:.0f} epochs"
        print(f"{name:<29}{length:>12}, batch {config.batch_size:>5,}   {recipe.aim}")
    return 0


def _base(named: str) -> tuple[PretrainConfig, str]:
    """Return the configuration that the flags change, and the text of its file; the defaults for --help alone."""
    if not named:
        return PretrainConfig(), ""
    if named.endswith(".json") or Path(named).is_file():
        config, text = load_config(Path(named))
        return replace(config, out=""), text
    return get_recipe(named), ""


def _value_of(flag: str, args: list[str]) -> str:
    for i, word in enumerate(args):
        if word.startswith(flag + "="):
            return word.split("=", 1)[1]
        if word == flag and i + 1 < len(args):
            return args[i + 1]
    return ""
