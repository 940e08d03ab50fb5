"""The commands. Thin: each reads its flags and calls one function. Imports torch only once there is work to do."""

import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence

from rich.console import Console

from pixmim import __version__
from pixmim.cli.data import cache, stats
from pixmim.cli.evaluate import coverage, evaluate, report
from pixmim.cli.pretrain import list_recipes, pretrain
from pixmim.cli.slurm import slurm
from pixmim.cli.throughput import bench_data
from pixmim.cli.visualize import attention, embed, reconstruct
from pixmim.cli.weights import export, import_
from pixmim.utils.allocator import retain_freed_memory
from pixmim.utils.console import print_plain
from pixmim.utils.errors import AlreadyReportedError, UserError, did_you_mean, first_line
from pixmim.utils.process import as_process

OVERVIEW = """usage: pixmim COMMAND [...]

  pretrain     train a backbone on your own images
  slurm        write a script that trains on a cluster, for Slurm's sbatch
  cache        resize pictures once, for all epochs to come
  stats        measure mean and std, and say what a data set holds
  bench-data   what limits the way of your images to the network, and what to change
  list         the recipes, with what each aims at
  evaluate     measure it; `pixmim evaluate list` shows how
  coverage     how much of the objects random crops keep
  report       one page of settings, curves, reconstructions and results, for one run or several
  reconstruct  draw what a model predicts of hidden patches
  attention    draw where a ViT looks
  embed        write the features of a data set
  import       take over weights that others published, and say what is in a file
  export       hand a backbone to timm, Hugging Face, mmpretrain, detectron2 or ONNX

`pixmim COMMAND --help` explains every flag. First steps: pixmim pretrain pixmim-vit-tiny --data FOLDER"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0 done, 1 something only the user can put right, 130 interrupted.

    Without arguments, the command is the process's own: signals and standard streams are made its own as well.
    """
    if argv is None:
        # Before torch is imported. Threads that wait spinning take the cores from those that compute: on shared cores,
        # training was up to twenty times slower (docs/performance.md).
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        retain_freed_memory()
        for library in ("PIL", "tifffile"):  # damaged images belong in skipped.csv, not on the terminal
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
            raise UserError(f"there is no command '{args[0]}'{did_you_mean(args[0], COMMANDS)}\n\n{OVERVIEW}")
        return COMMANDS[args[0]](args[1:])
    except AlreadyReportedError:
        return 1
    except (UserError, OSError) as error:  # OSError: no space, no permission; its message says where
        print_plain(Console(stderr=True), f"error: {error}")
        return 1
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        text = (
            f"error: out of memory ({first_line(error)}). Use a larger --accumulation-steps where the command has it, "
            "fewer --threads, or a smaller model or --size"
        )
        print(text, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _out_of_memory(error: MemoryError | RuntimeError) -> bool:
    if "torch" not in sys.modules:  # whose errors are RuntimeErrors
        return isinstance(error, MemoryError)
    from pixmim.training.find_batch_size import is_out_of_memory

    return is_out_of_memory(error)


_HOME = re.compile(r"^((?:--[\w.-]+=)?)~(?=/|$)")
"""A word that is, or a flag whose value is, a path below the home folder. Shells expand only some of these."""

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "pretrain": pretrain,
    "slurm": slurm,
    "cache": cache,
    "stats": stats,
    "bench-data": bench_data,
    "coverage": coverage,
    "list": list_recipes,
    "evaluate": evaluate,
    "report": report,
    "reconstruct": reconstruct,
    "attention": attention,
    "embed": embed,
    "import": import_,
    "export": export,
}
