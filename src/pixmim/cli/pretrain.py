"""pixmim pretrain and pixmim list."""

from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Annotated, NamedTuple

import tyro
from rich.console import Console
from tyro.conf import Positional, arg

from pixmim.cli.flags import ChoiceFlags
from pixmim.config import PretrainConfig
from pixmim.config_io import defaults_for, load_config
from pixmim.recipes import RECIPES, get_recipe
from pixmim.training.trackers import TrackerName
from pixmim.utils.console import print_plain
from pixmim.utils.errors import UserError
from pixmim.utils.files import shortened
from pixmim.utils.trust import refusal, untrusted_references


class Flags(NamedTuple):
    """Parsed flags: the configuration, the run to resume (if any), whether to finish it instead, and the trackers."""

    config: PretrainConfig
    resumed: str
    finish: bool
    track: tuple[TrackerName, ...]


def read_flags(args: list[str]) -> Flags:
    """Parse the flags of `pixmim pretrain`, with defaults from a recipe or the run to resume. Raises UserError."""
    given = _values(args)
    resumed = given.get("resume", "")
    recipe = args[0] if args and not args[0].startswith("-") else ""
    if resumed and recipe:
        raise UserError(f"--resume uses the recipe of {resumed}: leave out '{recipe}'")
    if resumed and Path(given.get("out", resumed)) != Path(resumed):
        raise UserError(f"--resume writes to {resumed}: leave out --out {given['out']}")
    init = given.get("init", "")
    base, text = load_config(Path(resumed) / "config.json") if resumed else _load_recipe(recipe, init)
    base = defaults_for(base, given)

    def command(
        name: Annotated[Positional[str], arg(metavar="RECIPE")] = "",
        /,
        *,
        resume: str = "",
        finish: bool = False,
        track: tuple[TrackerName, ...] = (),
        choice: Annotated[ChoiceFlags, arg(name="")] = ChoiceFlags(),  # noqa: B008
        config: Annotated[PretrainConfig, arg(name="")] = base,
    ) -> tuple[str, bool, tuple[TrackerName, ...], ChoiceFlags, PretrainConfig]:
        """Pre-train a backbone on unlabeled images.

        Args:
            name: Name of a recipe (see `pixmim list`), or the config.json of another run.
            resume: Folder of a run to resume from its newest checkpoint; if finished, with more --epochs or --steps.
            finish: With --resume: finish the run now, with the encoder of its newest checkpoint.
            track: Trackers that receive metrics, configuration and reconstructions; each has an extra of its name.
            choice: Images of --data to choose by their names.
            config: Settings.
        """
        return name, finish, track, choice, config

    name, finish, track, choice, config = tyro.cli(command, prog="pixmim pretrain", args=args)
    config = replace(config, model=replace(config.model, options={**base.model.options, **config.model.options}))
    if name != recipe:
        raise UserError(f"write the recipe '{name}' before all flags, and leave it out with --resume")
    if finish and not resumed:
        raise UserError("--finish needs an existing run: pixmim pretrain --resume RUN --finish")
    if not resumed and not recipe:
        raise UserError("no recipe given: for your own images use pixmim-vit-small, or another one of `pixmim list`")
    if not resumed and not config.data:
        raise UserError("no data given: pass --data FOLDER, or --data shapes: for the built-in synthetic dataset")
    named = {flag: value for flag, value in config.named.items() if flag.removeprefix("--") not in given}
    untrusted = untrusted_references(text, named)
    if untrusted and not finish:
        raise UserError(f"{refusal(resumed or recipe, untrusted)}. Pass these flags, or others in their place")
    config = replace(config, data=choice.choose(config.data))
    return Flags(config, resumed, finish, track)


def pretrain(args: list[str]) -> int:
    """Train, resume or finish a run."""
    config, resumed, finish, track = read_flags(args)
    from pixmim.pretraining import pretrain as train
    from pixmim.run_folder import finish_run
    from pixmim.training.distributed import find_rank

    console = Console(quiet=not find_rank().is_main)
    if finish:
        result = finish_run(resumed)
        print_plain(console, f"finished at step {result.step:,}")
    else:
        result = train(config, resumed or None, resume=bool(resumed), track=track)
    folder = shortened(result.folder)
    if not result.finished:
        command = f"pixmim pretrain --resume {quote(str(folder))}"
        print_plain(console, f"stopped after step {result.step}; resume with: {command}")
        return 130
    print_plain(console, f"encoder: {folder / 'encoder'}\nreport:  {folder / 'report.html'}")
    return 0


def list_recipes(args: list[str]) -> int:
    """Print every recipe."""
    tyro.cli(lambda: None, prog="pixmim list", description="List the recipes, with their aims.", args=args)
    for name, recipe in RECIPES.items():
        config = recipe.build()
        length = f"{config.steps:,} steps" if config.steps is not None else f"{config.epochs:.0f} epochs"
        print(f"{name:<29}{length:>12}, batch {config.batch_size:>5,}   {recipe.aim}")
    return 0


def _load_recipe(name: str, init: str) -> tuple[PretrainConfig, str]:
    """Return the configuration of a recipe, or of a file and its text; without a name the defaults, for --help."""
    if not name:
        return PretrainConfig(), ""
    if name.endswith(".json") or Path(name).is_file():
        config, text = load_config(Path(name))
        return replace(config, out=""), text
    return get_recipe(name, init=init), ""


def _values(args: list[str]) -> dict[str, str]:
    """Return the word after each flag, by its field; of a repeated flag the last one, as tyro does."""
    values = {}
    for word, following in zip(args, [*args[1:], ""], strict=False):
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            values[name.replace("-", "_")] = value if equals else following
    return values
