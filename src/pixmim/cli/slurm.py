"""pixmim slurm: write and check a script for Slurm's sbatch."""

import shlex
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from tyro.conf import arg

from pixmim.cli.pretrain import read_flags
from pixmim.config import PretrainConfig
from pixmim.utils.console import print_plain
from pixmim.utils.errors import UserError
from pixmim.utils.files import check_output, write_text_atomically
from pixmim.utils.validation import Count, Integer, NonNegative, Positive, Settings


@dataclass(frozen=True)
class Job(Settings):
    """Resources to request from Slurm."""

    nodes: Count = 1
    """Machines."""
    gpus: Count = 1
    """GPUs per machine; each gets one process."""
    cpus: Count = 8
    """CPU cores per GPU; they read and decode images."""
    hours: Positive = 24.0
    """Time limit. A longer run stops in time and is queued again."""
    mem: str = ""
    """Memory per machine, such as 400G; 0: all of it. Otherwise the cluster's default."""
    partition: str = ""
    """Slurm's --partition."""
    account: str = ""
    """Slurm's --account."""
    qos: str = ""
    """Slurm's --qos."""
    name: str = ""
    """Name of the job; otherwise the recipe's."""
    signal: Annotated[int, Integer(1, 65_535)] = 300
    """Seconds before the time limit at which the run finishes its step, saves and stops."""
    restarts: NonNegative = 100
    """Largest number of restarts of the job."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.signal >= self.hours * 3600:
            raise UserError(f"--signal {self.signal} (seconds) must be less than --hours {self.hours:g}")

    @property
    def tasks(self) -> int:
        """Number of processes, one per GPU."""
        return self.nodes * self.gpus


def slurm(args: list[str]) -> int:
    """Write a script for sbatch."""

    def command(
        *, job: Annotated[Job, arg(name="")], script: Path | None = None, overwrite: bool = False
    ) -> tuple[Job, Path | None, bool]:
        """Write a script for Slurm's sbatch that trains on any number of GPUs and resumes after each interruption.

        usage: pixmim slurm RECIPE --data FOLDER [flags of `pixmim pretrain`] [flags below]

        All flags that are not listed below are those of `pixmim pretrain`. They are checked now, so that no mistake
        shows only after the job has waited in the queue. The script explains each of its lines; edit it as you like.

        Args:
            job: Resources to request from Slurm.
            script: Path of the script; otherwise slurm.sh in the run's folder.
            overwrite: Replace an existing script.
        """
        return job, script, overwrite

    (job, file, overwrite), words = tyro.cli(command, prog="pixmim slurm", args=args, return_unknown_args=True)
    config, resumed, *_ = read_flags(words)
    if resumed:
        raise UserError(f"leave out --resume: with --out {shlex.quote(resumed)}, the script resumes that run")
    config.check_divisible(job.tasks, "GPUs")
    name = job.name or config.recipe or "run"
    out = Path(config.out or f"runs/{name}")
    if not config.out:
        words += ["--out", str(out)]
    if not config.threads:
        words += ["--threads", str(job.cpus)]
    from pixmim.run_folder import check_outside_data, check_same_run, with_full_paths

    exists = (out / "config.json").exists()
    if exists:
        check_same_run(with_full_paths(config, out), out)
    else:
        check_outside_data(out, config.data)
    from pixmim.build import build_model
    from pixmim.stages import build_stages
    from pixmim.utils.initialization import build_on_meta

    build_stages(config, build_on_meta(lambda: build_model(config), config.model.backbone), steps=1)
    file = file or out / "slurm.sh"
    check_output(file, overwrite)

    process = [sys.executable, "-m", "pixmim.cli", "pretrain", *words]
    text = sbatch_script(job, name, process, out.absolute(), Path.cwd(), file.absolute())
    out.mkdir(parents=True, exist_ok=True)  # Slurm creates no folder for the output of a job
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(file, text)
    console = Console()
    share = f"{config.batch_size // job.tasks:,} of the {config.batch_size:,} images"
    print_plain(console, f"{job.tasks} processes, one per GPU; each computes {share}")
    for path in _missing_paths(config):
        line = f"warning: {path} does not exist on this machine: make sure that the compute nodes can read it"
        print_plain(console, line)
    if exists:
        print_plain(console, f"{out} contains a run: the job resumes it")
    print_plain(console, f"wrote {file}; submit it with: sbatch {shlex.quote(str(file))}")
    return 0


def _missing_paths(config: PretrainConfig) -> list[str]:
    """Return the paths of data and weights that do not exist on this machine."""
    from pixmim.data.uri import is_there, read_parts

    specs = [spec for spec in (config.data, config.knn.train, config.knn.test) if spec]
    missing = [part.source for spec in specs for part in read_parts(spec) if not is_there(part.source)]
    if config.init and not config.init.startswith(("timm:", "hf:")) and not Path(config.init).expanduser().exists():
        missing.append(config.init)
    return missing


def sbatch_script(job: Job, name: str, command: list[str], run: Path, folder: Path, file: Path) -> str:
    """Return the text of a script for sbatch.

    Each process executes the words of `command`. The output of the job is written to `run`, and `folder` is its working
    directory; `file` is the path of the script. All three are absolute. Raises UserError for a name or path that Slurm
    would change.
    """
    options = {"partition": job.partition, "account": job.account, "qos": job.qos, "mem": job.mem}
    seconds = round(job.hours * 3600)
    lines: list[str] = []  # of the command: the program, then each flag with its values
    for word in map(shlex.quote, command):
        if not lines or word.startswith("--"):
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return (
        files("pixmim.cli")
        .joinpath("slurm.sh.txt")
        .read_text("utf-8")
        .format(
            job=job,
            name=_quote(name),
            folder=_quote(str(folder)),
            output=_quote(str(run).replace("%", "%%") + "/slurm-%j.out"),
            time=f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}",
            options="".join(f"#SBATCH --{flag}={_quote(value)}\n" for flag, value in options.items() if value),
            submit=shlex.quote(f"sbatch {shlex.quote(str(file))}"),
            command=" \\\n    ".join(lines),
        )
    )


def _quote(value: str) -> str:
    """Quote a value of an #SBATCH line, in which blanks and # end an unquoted word."""
    if not value.isprintable() or "\\" in value:
        raise UserError(f"{value!r} contains a backslash or unprintable characters, which Slurm changes: rename it")
    return value if shlex.quote(value) == value else '"' + value.replace('"', '\\"') + '"'
