"""Memory that is freed and asked for again costs no page faults once it is kept."""

import platform
import subprocess
import sys

import pytest

from pixmim import cli
from pixmim.utils.allocator import retain_freed_memory

FAULTS = """
import resource
import torch
from pixmim.utils.allocator import retain_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(2**26, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
assert retain_freed_memory()
faults(), faults()  # until the heap has found its size
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True)
    by_default, kept = map(int, done.stdout.split())
    assert kept <= by_default / 10, "ten times 64 MiB are 163,840 pages of 4 KiB"


LIMITED = """
import resource
from pixmim.utils.allocator import retain_freed_memory
resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))
assert not retain_freed_memory()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_where_addresses_are_limited_they_are_not_kept() -> None:
    subprocess.run([sys.executable, "-c", LIMITED], check=True)


def test_a_command_retains_memory_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(cli, "retain_freed_memory", lambda: calls.append(True))
    monkeypatch.setattr(cli, "as_process", lambda command: command())
    monkeypatch.setattr("sys.argv", ["pixmim", "--version"])
    assert cli.main() == 0 and calls == [True]


def test_elsewhere_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not retain_freed_memory()
