"""Available memory as Linux reports it, and glibc's allocator settings."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

from pixmim import cli
from pixmim.utils.memory import free_memory, retain_freed_memory, total_memory

GIB = 2**30
V2 = {"proc/self/cgroup": "0::/slurm/job"}
V1 = {"proc/self/cgroup": "3:cpuset:/x\n4:memory,hugetlb:/slurm/job\n0::/"}
JOB_V2, JOB_V1 = "sys/fs/cgroup/slurm/job/memory", "sys/fs/cgroup/memory/slurm/job/memory"


def fake_system(root: Path, files: dict[str, object]) -> Path:
    meminfo = f"MemTotal: 99 kB\nMemAvailable:   {8 * GIB // 1024} kB\n"
    for name, text in ({"proc/meminfo": meminfo} | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    ("files", "gib"),
    [
        ({}, 8),
        ({**V2, f"{JOB_V2}.max": "max", f"{JOB_V2}.current": GIB}, 8),
        ({**V2, f"{JOB_V2}.max": 3 * GIB, f"{JOB_V2}.current": GIB}, 2),
        ({**V2, "sys/fs/cgroup/slurm/memory.max": 3 * GIB, "sys/fs/cgroup/slurm/memory.current": 2 * GIB}, 1),  # parent
        ({**V2, "sys/fs/cgroup/memory.max": 3 * GIB, "sys/fs/cgroup/memory.current": 0}, 3),  # inside a container
        (
            {
                **V2,
                f"{JOB_V2}.max": 3 * GIB,
                f"{JOB_V2}.current": 3 * GIB,
                f"{JOB_V2}.stat": f"file 5\ninactive_file {GIB}\nactive_file 7",
            },
            1,
        ),
        ({**V2, f"{JOB_V2}.max": GIB, f"{JOB_V2}.current": 2 * GIB}, 0),
        (
            {
                **V1,
                f"{JOB_V1}.limit_in_bytes": 4 * GIB,
                f"{JOB_V1}.usage_in_bytes": 2 * GIB,
                f"{JOB_V1}.stat": f"inactive_file 5\ntotal_inactive_file {GIB}",
            },
            3,
        ),
        (
            {
                **V1,
                "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,  # unlimited in version 1
                "sys/fs/cgroup/memory/memory.usage_in_bytes": GIB,
            },
            8,
        ),
    ],
)
def test_free_memory_is_the_tightest_limit(files: dict[str, object], gib: int, tmp_path: Path) -> None:
    assert free_memory(fake_system(tmp_path, files)) == gib * GIB


def test_total_memory_is_the_machines_or_the_tightest_limit(tmp_path: Path) -> None:
    machine = {"proc/meminfo": f"MemTotal: {9 * GIB // 1024} kB\nMemAvailable: 5 kB\n"}
    assert total_memory(fake_system(tmp_path / "one", machine)) == 9 * GIB
    limit = {"sys/fs/cgroup/slurm/memory.max": 3 * GIB, "sys/fs/cgroup/slurm/memory.current": 2 * GIB}
    assert total_memory(fake_system(tmp_path / "two", machine | V2 | limit)) == 3 * GIB


def test_without_linux_files_memory_is_unknown(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None and total_memory(tmp_path) is None


LIMITED = """
import os, resource
from pixmim.utils.memory import free_memory, retain_freed_memory
used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000,) * 2)
print(free_memory())
assert not retain_freed_memory()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_limit_of_the_address_space_counts_and_disables_retaining() -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED], check=True, capture_output=True, text=True)
    assert 50_000_000 < int(done.stdout) <= 100_000_000


FAULTS = """
import mmap, resource
from pixmim.utils.memory import retain_freed_memory

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        bytearray(2**24)[::mmap.PAGESIZE] = bytes(2**24 // mmap.PAGESIZE)  # touches each page
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(page_faults())
assert retain_freed_memory()
page_faults(), page_faults()  # until the heap has its final size
print(page_faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's allocator")
def test_retained_memory_is_reused_without_page_faults() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True)
    before, after = map(int, done.stdout.split())
    assert after <= before / 10, "ten times 16 MiB are 40,960 pages of 4 KiB"


def test_a_command_retains_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(cli, "retain_freed_memory", lambda: calls.append(True))
    monkeypatch.setattr(cli, "as_process", lambda command: command())
    monkeypatch.setattr("sys.argv", ["pixmim", "--version"])
    assert cli.main() == 0 and calls == [True]


def test_without_glibc_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not retain_freed_memory()
