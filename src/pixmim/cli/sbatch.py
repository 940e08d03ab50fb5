"""A job for Slurm, as the text of a script for sbatch."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pixmim.utils.errors import UserError
from pixmim.utils.validation import Count, Integer, NonNegative, Positive, Settings


@dataclass(frozen=True)
class Job(Settings):
    """What is asked of Slurm."""

    nodes: Count = 1
    """Machines."""
    gpus: Count = 1
    """GPUs of each machine; each gets a process of its own."""
    cpus: Count = 8
    """Cores for each GPU; they read and decode images."""
    hours: Positive = 24.0
    """Time limit. A run that needs longer stops in time, and is queued again."""
    mem: str = ""
    """Memory of each machine, such as 400G; 0: all of it. Otherwise the cluster's default."""
    partition: str = ""
    """Slurm's --partition."""
    account: str = ""
    """Slurm's --account."""
    qos: str = ""
    """Slurm's --qos."""
    name: str = ""
    """Name of the job; otherwise the recipe's."""
    signal: Annotated[int, Integer(1, 65_535)] = 300
    """Seconds before the time limit at which the run is told to finish its step, save and stop."""
    restarts: NonNegative = 100
    """Times the job may be started again; the run needs at most this many times --hours, and one more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.signal >= self.hours * 3600:
            raise UserError(f"--signal {self.signal} seconds before the end leaves nothing of --hours {self.hours:g}")

    @property
    def tasks(self) -> int:
        """Processes, one for each GPU."""
        return self.nodes * self.gpus


def script(job: Job, name: str, command: list[str], run: Path, folder: Path, file: Path) -> str:
    """The text for sbatch. Raises UserError for a name or path that Slurm would not take as it is.

    name     the job's name
    command  what each process executes, word by word
    run      the run's folder, absolute; the job's output goes there
    folder   where the command is executed, absolute: what its relative paths begin at
    file     where the text will be, absolute; only for what it says to a person
    """
    asked = {"partition": job.partition, "account": job.account, "qos": job.qos, "mem": job.mem}
    return _SCRIPT.format(
        job=job,
        tasks=job.tasks,
        name=_quoted(name),
        folder=_quoted(str(folder)),
        output=_quoted(str(run).replace("%", "%%") + "/slurm-%j.out"),
        time=_clock(job.hours),
        asked="".join(f"#SBATCH --{flag}={_quoted(value)}\n" for flag, value in asked.items() if value),
        again=shlex.quote(f"sbatch {shlex.quote(str(file))}"),
        command=" \\\n    ".join(_lines(command)),
    )


_SCRIPT = """\
#!/bin/bash
# Written by `pixmim slurm`. Submit it with sbatch; flags given to sbatch itself replace those below.

#SBATCH --job-name={name}
#SBATCH --chdir={folder}
# The same file whenever the job starts again: what it says is added at the end.
#SBATCH --output={output}
#SBATCH --open-mode=append
#
# {tasks} processes, one for each GPU. Slurm starts them; there is no torchrun between, which USR1 would end.
#SBATCH --nodes={job.nodes}
#SBATCH --ntasks-per-node={job.gpus}
#SBATCH --gres=gpu:{job.gpus}
#SBATCH --cpus-per-task={job.cpus}
{asked}#
# USR1 reaches the processes {job.signal} s before the limit: they finish the step, save, and exit with 130.
#SBATCH --time={time}
#SBATCH --signal=USR1@{job.signal}
# After a preemption (which sends TERM first) or the failure of a machine, Slurm queues the job again by itself.
#SBATCH --requeue

set -eu

# Where the processes find each other: at the first machine, at a port made of the job's number.
machines=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${{machines%%$'\\n'*}}
export MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

# Slurm tells this script to end (TERM) if the job is cancelled or preempted, and not when its time is over.
told=
trap 'told=yes' TERM

# The run goes on where the newest checkpoint in its folder stands, so this command is the same each time.
# kill-on-bad-exit=0: a process that has stopped in time, with 130, does not take the others along.
# wait: once one has ended or is lost, the others get ten minutes to end by themselves.
# cpus-per-task: srun does not take it from above.
status=0
srun --label --kill-on-bad-exit=0 --wait=600 --cpus-per-task="$SLURM_CPUS_PER_TASK" \\
    {command} || status=$?

# 0: complete. 130: stopped in time. All else is a mistake, which another start would only repeat.
if [ "$status" -ne 130 ] || [ -n "$told" ]; then
    exit "$status"
fi
if [ "${{SLURM_RESTART_COUNT:-0}}" -ge {job.restarts} ]; then
    echo "stopped: the job has been started again {job.restarts} times. To go on:" {again} >&2
    exit 130
fi
scontrol requeue "$SLURM_JOB_ID"
"""


def _lines(command: list[str]) -> list[str]:
    """The words, quoted for a shell: what comes before the first flag, then each flag with its values, a line each."""
    lines: list[str] = []
    for word in command:
        quoted = shlex.quote(word)
        if not lines or word.startswith("--"):
            lines.append(quoted)
        else:
            lines[-1] += f" {quoted}"
    return lines


def _quoted(value: str) -> str:
    """A value behind #SBATCH --flag=, where blanks and # end a word that is not quoted."""
    if not value.isprintable() or "\\" in value:
        raise UserError(f"Slurm cannot be told {value!r}: it holds a backslash, or characters that do not print")
    return value if shlex.quote(value) == value else '"' + value.replace('"', '\\"') + '"'


def _clock(hours: float) -> str:
    """Hours as HH:MM:SS."""
    seconds = round(hours * 3600)
    return f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
