"""Memory that is freed and asked for again costs no page faults once it is kept."""

import platform
import subprocess
import sys

import pytest

from pixmim.training import precision as device
from pixmim.training.find_batch_size import keep_memory

FAULTS = """
import resource
import torch
from pixmim.training.find_batch_size import keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(2**26, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
assert keep_memory()
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
from pixmim.training.find_batch_size import keep_memory
resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40))
assert not keep_memory()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_where_addresses_are_limited_they_are_not_kept() -> None:
    subprocess.run([sys.executable, "-c", LIMITED], check=True)


def test_who_computes_on_a_cpu_keeps_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(device, "keep_memory", lambda: asked.append(True))
    device.choose_device("cpu")
    assert asked


def test_elsewhere_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not keep_memory()
