"""pixmim slurm: a script for a cluster's queue, every mistake in it found before it waits there."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from tyro.conf import arg

from pixmim.cli.pretrain import read_flags
from pixmim.cli.sbatch import Job, script
from pixmim.config import PretrainConfig
from pixmim.utils.console import print_plain
from pixmim.utils.errors import UserError
from pixmim.utils.files import check_output, write_text_atomically


def slurm(args: list[str]) -> int:
    """Write a script for sbatch."""

    def command(
        *, job: Annotated[Job, arg(name="")], script: Path | None = None, overwrite: bool = False
    ) -> tuple[Job, Path | None, bool]:
        """Write a script for Slurm's sbatch that trains on any number of GPUs, and goes on after each interruption.

        usage: pixmim slurm RECIPE --data FOLDER [flags of `pixmim pretrain`] [flags below]

        What stands here and not below is for `pixmim pretrain`, and is checked now: a mistake would otherwise show
        once the job has waited in the queue. The script says what each of its lines is for; change it as you like.

        Args:
            job: What is asked of Slurm.
            script: Where to write it; otherwise slurm.sh in the run's folder.
            overwrite: Replace a script that is there.
        """
        return job, script, overwrite

    (job, file, overwrite), words = tyro.cli(command, prog="pixmim slurm", args=args, return_unknown_args=True)
    run, resumed, finish, _ = read_flags(words)
    if resumed or finish:
        raise UserError(
            f"leave out --resume: with --out {shlex.quote(resumed)} the script goes on with that run by itself"
        )
    run.check_divisible(job.tasks, "GPUs")
    name = job.name or run.recipe or "run"
    if not run.out:
        words += ["--out", f"runs/{name}"]
    if not run.threads:
        words += ["--threads", str(job.cpus)]
    out = Path(run.out or f"runs/{name}")
    there = (out / "config.json").exists()
    if there:
        from pixmim.run_folder import check_same_run, with_full_paths

        check_same_run(with_full_paths(run, out), out)
    _build(run)
    file = file or out / "slurm.sh"
    check_output(file, overwrite)

    process = [sys.executable, "-m", "pixmim.cli", "pretrain", *words]
    text = script(job, name, process, out.absolute(), Path.cwd(), file.absolute())
    out.mkdir(parents=True, exist_ok=True)  # Slurm makes no folder for a job's output
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(file, text)
    console = Console()
    share = f"{run.batch_size // job.tasks:,} of the {run.batch_size:,} images"
    print_plain(console, f"{job.tasks} processes, one for each GPU; each computes {share}")
    for path in _absent(run):
        print_plain(console, f"there is no {path} here: the job's machines must have it")
    if there:
        print_plain(console, f"{out} holds a run: the job goes on with it")
    print_plain(console, f"wrote {file}; submit it with: sbatch {shlex.quote(str(file))}")
    return 0


def _build(config: PretrainConfig) -> None:
    """Build what the settings say, without memory for the weights, so that what cannot be built is known now."""
    from pixmim.build import build_crop, build_loss, build_mask_sampler, build_model, sketch

    patch = sketch(lambda: build_model(config), config.model.backbone).patch
    build_mask_sampler(config, patch)
    build_crop(config)
    build_loss(config)


def _absent(config: PretrainConfig) -> list[str]:
    """Paths in the settings that are not on this machine."""
    from pixmim.data.uri import is_there, read_parts

    parts = [
        part.source for data in (config.data, config.knn.train, config.knn.test) if data for part in read_parts(data)
    ]
    absent = [source for source in parts if not is_there(source)]
    if config.init and not config.init.startswith("timm:") and not Path(config.init).expanduser().exists():
        absent.append(config.init)
    return absent
