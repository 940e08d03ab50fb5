"""pixmim pretrain, and the recipes it takes."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import count
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, NamedTuple

import tyro
from rich.console import Console
from tyro.conf import Positional, arg

from pixmim.cli.flags import absolute
from pixmim.config import PretrainConfig
from pixmim.recipes import RECIPES, get_recipe
from pixmim.runfile import from_json, read_config_text
from pixmim.utils.console import printable, say
from pixmim.utils.errors import UserError, shown
from pixmim.utils.lock import alone
from pixmim.utils.trust import closed, made_here, refusal

if TYPE_CHECKING:
    from pixmim.training.distributed import World

_MAY_CHANGE = {
    *("data", "out", "device", "keep", "local_copy", "threads", "log_every", "max_bad"),
    *("accumulate", "scale", "saving", "knn", "bands"),
}
"""Fields that a resumed run may change: they do not decide what is computed, but for rounding (data: if it moved)."""


class Flags(NamedTuple):
    """What the flags ask for: the Run, the directory of the run to resume (if any), and whether to end it instead."""

    run: PretrainConfig
    resumed: str
    finish: bool


def read_flags(args: list[str]) -> Flags:
    """Read the flags, and start nothing. Raises UserError.

    They are read twice: the recipe (or the run to resume) decides the defaults of all the others.
    """
    resumed = _value_of("--resume", args)
    named = args[0] if args and not args[0].startswith("-") else ""
    if resumed and named:
        raise UserError(f"--resume goes on with the recipe of {resumed}: leave out '{named}'")
    base, config = _load(Path(resumed) / "config.json") if resumed else _base(named)
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
        run: Annotated[PretrainConfig, arg(name="")] = base,
    ) -> tuple[bool, PretrainConfig]:
        """Pre-train a backbone on unlabelled images.

        Args:
            name: A recipe's name (see `pixmim list`), or the config.json of another run.
            resume: Directory of a run, to go on with exactly where its newest checkpoint stands; of a finished one with
                more --epochs (or --steps).
            finish: With --resume: end the run now, with the encoder of its newest checkpoint.
            run: Settings.
        """
        return finish, run

    finish, run = tyro.cli(command, prog="pixmim pretrain", args=args)
    run = replace(run, model=replace(run.model, options={**base.model.options, **run.model.options}))
    if resumed:
        _same(
            run,
            base,
            _MAY_CHANGE | {"epochs", "steps"},
            lambda flag: f"{flag} cannot change when a run is resumed; begin a new run",
        )
    elif finish:
        raise UserError("--finish ends a run that is there: pixmim pretrain --resume RUN --finish")
    elif not named:
        raise UserError("which recipe? For one's own images: pixmim-vit-small. `pixmim list` shows all.")
    elif not run.data:
        raise UserError("which images? Give --data FOLDER, or --data shapes: for drawn ones.")
    typed = {flag for flag in run.named if any(word.split("=")[0] == flag for word in args)}
    strange = closed(config, {flag: value for flag, value in run.named.items() if flag not in typed})
    if strange and not finish:
        raise UserError(
            f"{refusal(resumed or named, strange)}. If it may be, add these flags, or others in their place"
        )
    return Flags(run, resumed, finish)


def pretrain(args: list[str]) -> int:
    """Train, or go on."""
    run, resumed, finish = read_flags(args)
    return _finish(Path(resumed)) if finish else _train(run, resumed)


def _finish(out: Path) -> int:
    """End a run where it is."""
    from pixmim.pretrain import end_now
    from pixmim.report import write_report

    console = Console()
    with alone(out, partial(say, console)):
        say(console, f"ended after step {end_now(out).step:,}")
        page = write_report([out], out / "report.html", None, lambda line: say(console, f"warning: {line}"))
    say(console, f"encoder: {out / 'encoder'}\nreport:  {page}")
    return 0


def _train(run: PretrainConfig, resumed: str) -> int:
    """What each process of the run does; the first one speaks."""
    from pixmim.build import with_dataset_stats
    from pixmim.evaluation.evaluate import online_knn
    from pixmim.pretrain import check_new_run
    from pixmim.pretrain import pretrain as train
    from pixmim.report import write_report
    from pixmim.training.distributed import open_world

    with open_world(run.device, run.scale.timeout) as world, ExitStack() as stack:
        console = Console(quiet=not world.first)
        try:
            out = _claim(resumed or run.out, run.recipe or "run", world, stack, console)
            run = whole_paths(run, out)
            if not (out / "config.json").exists():
                check_new_run(out)
                run, lines = with_dataset_stats(run)
                for line in lines:
                    say(console, line)
            elif not resumed:
                run = going_on(run, out)
            world.gather(None)  # all have looked before the first one writes
            outcome = train(run, out, console, online_knn(run, console), world)
            if not outcome.finished:
                say(
                    console,
                    f"stopped after step {outcome.step}; go on with: pixmim pretrain --resume {quote(str(out))}",
                )
                return 130
            if world.first:
                page = write_report([out], out / "report.html", run.data, lambda line: say(console, f"warning: {line}"))
                say(console, f"encoder: {out / 'encoder'}\nreport:  {page}")
        except UserError as error:
            if world.first_to_say(str(error)):
                raise
            return 1
    return 0


def _claim(named: str, recipe: str, world: "World", stack: ExitStack, console: Console) -> Path:
    """Lock the run's folder for as long as `stack` lasts, and return it. Collective: call on every rank.

    Without a name, it is a new one of the recipe's and the time's. Raises UserError if another process trains in it.
    """
    folder, problem = named, ""
    if world.first:
        stem = f"runs/{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
        names = (f"{stem}-{number}" if number > 1 else stem for number in count(1))
        while True:
            folder = named or next(names)
            try:
                stack.enter_context(alone(Path(folder), partial(say, console), new=not named))
            except FileExistsError:
                if not named:  # begun in the same second
                    continue
                problem = f"{folder} is a file: choose another --out"
            except (UserError, OSError) as error:
                problem = str(error)
            break
    folder, problem = world.share((folder, problem))
    if problem:
        raise UserError(problem)
    return Path(folder)


def whole_paths(run: PretrainConfig, out: Path) -> PretrainConfig:
    """The run that will be trained in `out`, its data found from everywhere."""
    knn = replace(run.knn, train=absolute(run.knn.train), test=absolute(run.knn.test))
    return replace(run, out=str(out), data=absolute(run.data), knn=knn)


def going_on(run: PretrainConfig, out: Path) -> PretrainConfig:
    """The run as the one in `out` was begun. Raises UserError for another run."""
    there, _ = _load(out / "config.json")
    run = replace(run, mean=run.mean or there.mean, std=run.std or there.std)
    advice = f"choose another --out, or go on with that one by --resume {quote(str(out))}"
    _same(run, there, _MAY_CHANGE - {"data"}, lambda flag: f"{out} holds a run with another {flag}: {advice}")
    return run


def _same(run: PretrainConfig, there: PretrainConfig, but: set[str], text: Callable[[str], str]) -> None:
    """Raise UserError, with a text about the flag, unless a run is the one that is there, but for some fields."""
    for one in fields(PretrainConfig):
        if getattr(run, one.name) != getattr(there, one.name) and one.name not in but:
            raise UserError(text(f"--{one.name.replace('_', '-')}"))


def list_recipes(args: list[str]) -> int:
    """Show every recipe."""
    tyro.cli(lambda: None, prog="pixmim list", description="Show the recipes, with what each aims at.", args=args)
    for name, recipe in RECIPES.items():
        run = recipe.build()
        length = f"{run.steps:,} steps" if run.steps is not None else f"{run.epochs:.0f} epochs"
        print(f"{name:<29}{length:>12}, batch {run.batch_size:>5,}   {recipe.aim}")
    return 0


def _base(named: str) -> tuple[PretrainConfig, str]:
    """The Run that the flags start from: a recipe's, a file's, or, for --help alone, the defaults.

    And the text of the file, if it is one's.
    """
    if not named:
        return PretrainConfig(), ""
    if named.endswith(".json") or Path(named).is_file():
        run, text = _load(Path(named))
        return replace(run, out=""), text
    return get_recipe(named), ""


def _words(value: object) -> Iterator[str]:
    """All texts in nested settings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _words(inner)


def _load(path: Path) -> tuple[PretrainConfig, str]:
    """The Run in a file, and the file's text."""
    if not path.exists():
        raise UserError(f"there is no {path}")
    text = read_config_text(path)
    run = from_json(text, path)
    odd = [word for word in _words(asdict(run)) if printable(word) != word]
    if odd and not made_here(text):  # the defaults that --help shows come from it
        raise UserError(f"{path} holds control characters: {shown(odd[0])}")
    return run, text


def _value_of(flag: str, args: list[str]) -> str:
    for i, word in enumerate(args):
        if word.startswith(flag + "="):
            return word.split("=", 1)[1]
        if word == flag and i + 1 < len(args):
            return args[i + 1]
    return ""
