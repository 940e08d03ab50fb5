"""The command line. Each command parses its flags and calls one function; torch is imported only to do work."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence

from rich.console import Console

from pixmim import __version__
from pixmim.cli.data import advise, bench_data, cache, stats
from pixmim.cli.evaluate import coverage, evaluate, report
from pixmim.cli.pretrain import list_recipes, pretrain
from pixmim.cli.slurm import slurm
from pixmim.cli.visualize import attention, embed, reconstruct, view
from pixmim.cli.weights import export, import_
from pixmim.utils.console import print_plain
from pixmim.utils.errors import AlreadyReportedError, UserError, did_you_mean, first_line
from pixmim.utils.memory import retain_freed_memory
from pixmim.utils.process import as_process

_COMMANDS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "advise": (advise, "examine your images, and print the command that suits them"),
    "pretrain": (pretrain, "train a backbone on your own images"),
    "slurm": (slurm, "write a script for Slurm's sbatch that trains on a cluster"),
    "cache": (cache, "resize images once, for all epochs"),
    "stats": (stats, "measure mean and std, and summarize a dataset"),
    "bench-data": (bench_data, "find out what limits the data pipeline, and what to change"),
    "coverage": (coverage, "measure how much of the objects random crops keep"),
    "list": (list_recipes, "list the recipes"),
    "evaluate": (evaluate, "measure a backbone; `pixmim evaluate list` lists the evaluations"),
    "report": (report, "write a page of settings, curves, reconstructions and results of one or more runs"),
    "view": (view, "open a page of curves, reconstructions and neighbors in the browser"),
    "reconstruct": (reconstruct, "draw reconstructions of hidden patches"),
    "attention": (attention, "draw attention maps of a ViT"),
    "embed": (embed, "write the features of a dataset"),
    "import": (import_, "import published weights, or describe a file of weights"),
    "export": (export, "export a backbone to timm, Hugging Face, mmpretrain, detectron2 or ONNX"),
}
COMMANDS = {name: command for name, (command, _) in _COMMANDS.items()}

_SHARED_BY_RANKS = ("pretrain", "cache")
"""Commands whose work the processes of torchrun share."""

OVERVIEW = "\n".join(
    [
        "usage: pixmim COMMAND [...]\n",
        *(f"  {name:<13}{text}" for name, (_, text) in _COMMANDS.items()),
        "\n`pixmim COMMAND --help` explains every flag. To start: pixmim advise FOLDER",
    ]
)

_HOME = re.compile(r"^((?:--[\w.-]+=)?)~(?=/|$)")
"""A path in the home folder, or a flag with one. Shells expand only some of these."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; without `argv`, that of this process, whose signals and standard streams are then handled too.

    Returns the exit status: 0 done, 1 an error that the user can fix, 130 interrupted.
    """
    if argv is None:
        # Before torch is imported. Spinning threads take cores from those that compute: on shared cores, training was
        # up to twenty times slower (docs/performance.md).
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        retain_freed_memory()
        for library in ("PIL", "tifffile"):  # damaged images are listed in skipped.csv
            logging.getLogger(library).addHandler(logging.NullHandler())
            warnings.filterwarnings("ignore", module=library)
        return as_process(lambda: main(sys.argv[1:]))
    args = [_HOME.sub(lambda match: f"{match[1]}{os.path.expanduser('~')}", word) for word in argv]
    try:
        if not args or args[0] in ("-h", "--help"):
            print(OVERVIEW)
            return 0
        if args == ["--version"]:
            print(f"pixmim {__version__}")
            return 0
        if args[0] not in COMMANDS:
            raise UserError(f"unknown command '{args[0]}'{did_you_mean(args[0], COMMANDS)}\n\n{OVERVIEW}")
        _check_processes(args[0])
        return COMMANDS[args[0]](args[1:])
    except AlreadyReportedError:
        return 1
    except (UserError, OSError) as error:  # OSError: no space, no permission
        print_plain(Console(stderr=True), f"error: {error}")
        return 1
    except (MemoryError, RuntimeError) as error:
        if "torch" in sys.modules:  # its errors are RuntimeErrors
            from pixmim.training.find_batch_size import is_out_of_memory

            if not is_out_of_memory(error):
                raise
        elif not isinstance(error, MemoryError):
            raise
        print(
            f"error: out of memory ({first_line(error)}). Use a larger --accumulation-steps if the command has it, "
            "fewer --threads, or a smaller model or --size",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return 130


def _check_processes(command: str) -> None:
    """Raise UserError if torchrun starts several processes of a command that all do the same work."""
    processes, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "")
    if command in _SHARED_BY_RANKS or not rank or processes == "1":
        return
    if rank != "0":
        raise AlreadyReportedError
    raise UserError(f"each of the {processes} processes would do all of `pixmim {command}`: run it without torchrun")
