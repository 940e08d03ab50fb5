"""How much memory there is, as Linux tells it in its files."""

import subprocess
import sys
from pathlib import Path

import pytest

from pixmim.utils.available_memory import free_memory, total_memory

GIB = 2**30


def _system(root: Path, files: dict[str, object]) -> Path:
    for name, text in ({"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable:   {8 * GIB // 1024} kB\n"} | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


TWO = {"proc/self/cgroup": "0::/slurm/job"}
ONE = {"proc/self/cgroup": "3:cpuset:/x\n4:memory,hugetlb:/slurm/job\n0::/"}


@pytest.mark.parametrize(
    ("files", "gib"),
    [
        ({}, 8),
        ({**TWO, "sys/fs/cgroup/slurm/job/memory.max": "max", "sys/fs/cgroup/slurm/job/memory.current": GIB}, 8),
        ({**TWO, "sys/fs/cgroup/slurm/job/memory.max": 3 * GIB, "sys/fs/cgroup/slurm/job/memory.current": GIB}, 2),
        ({**TWO, "sys/fs/cgroup/slurm/memory.max": 3 * GIB, "sys/fs/cgroup/slurm/memory.current": 2 * GIB}, 1),  # above
        ({**TWO, "sys/fs/cgroup/memory.max": 3 * GIB, "sys/fs/cgroup/memory.current": 0}, 3),  # a container's own
        (
            {
                **TWO,
                "sys/fs/cgroup/slurm/job/memory.max": 3 * GIB,
                "sys/fs/cgroup/slurm/job/memory.current": 3 * GIB,
                "sys/fs/cgroup/slurm/job/memory.stat": f"file 5\ninactive_file {GIB}\nactive_file 7",
            },
            1,
        ),
        ({**TWO, "sys/fs/cgroup/slurm/job/memory.max": GIB, "sys/fs/cgroup/slurm/job/memory.current": 2 * GIB}, 0),
        (
            {
                **ONE,
                "sys/fs/cgroup/memory/slurm/job/memory.limit_in_bytes": 4 * GIB,
                "sys/fs/cgroup/memory/slurm/job/memory.usage_in_bytes": 2 * GIB,
                "sys/fs/cgroup/memory/slurm/job/memory.stat": f"inactive_file 5\ntotal_inactive_file {GIB}",
            },
            3,
        ),
        (
            {
                **ONE,
                "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,  # version 1's way to say: none
                "sys/fs/cgroup/memory/memory.usage_in_bytes": GIB,
            },
            8,
        ),
    ],
)
def test_the_tightest_limit_counts(files: dict[str, object], gib: int, tmp_path: Path) -> None:
    assert free_memory(_system(tmp_path, files)) == gib * GIB


def test_all_memory_is_the_machines_or_the_least_limit(tmp_path: Path) -> None:
    machine = {"proc/meminfo": f"MemTotal: {9 * GIB // 1024} kB\nMemAvailable: 5 kB\n"}
    assert total_memory(_system(tmp_path / "one", machine)) == 9 * GIB
    limit = {"sys/fs/cgroup/slurm/memory.max": 3 * GIB, "sys/fs/cgroup/slurm/memory.current": 2 * GIB}
    assert total_memory(_system(tmp_path / "two", machine | TWO | limit)) == 3 * GIB
    assert total_memory(tmp_path / "none") is None


def test_unknown_is_not_a_number(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's files")
def test_a_limit_of_the_process_counts() -> None:
    """A limit of 100 MB above what is taken leaves no more, and no less than a little."""
    code = (
        "import os, resource\nfrom pixmim.utils.available_memory import free_memory\n"
        "taken = int(open('/proc/self/statm').read().split()[0]) * os.sysconf('SC_PAGE_SIZE')\n"
        "resource.setrlimit(resource.RLIMIT_AS, (taken + 100_000_000,) * 2)\nprint(free_memory())"
    )
    told = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 50_000_000 < told <= 100_000_000
