"""Available memory of this process, and the memory allocator's settings."""

import ctypes
import platform
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_ROOT = Path("/")  # of proc/ and sys/
_CGROUP_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Names of limit and usage, and the row of memory.stat that counts reclaimable cache, by version."""

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of malloc.h


def free_memory(root: Path = _ROOT) -> int | None:
    """Return the bytes that this process can still allocate, or None where they are unknown (all but Linux).

    The minimum of the memory available without swapping, the remainder of each enclosing control group's limit
    (containers, Slurm; cached files count as free), and the remainder of `ulimit -v`.
    """
    free = [_meminfo(root, "MemAvailable"), free_addresses(root), *(limit - used for limit, used in _cgroups(root))]
    return min((max(0, value) for value in free if value is not None), default=None)


def total_memory(root: Path = _ROOT) -> int | None:
    """Return the bytes that this process can ever allocate, or None where they are unknown.

    The minimum of the machine's memory, the limits of its control groups and `ulimit -v`. In contrast to
    `free_memory`, it is the same at every start.
    """
    total = [_meminfo(root, "MemTotal"), _address_limit(), *(limit for limit, _ in _cgroups(root))]
    return min((value for value in total if value is not None), default=None)


def free_addresses(root: Path = _ROOT) -> int | None:
    """Return the bytes of address space left under `ulimit -v`, or None if it is not limited."""
    limit, pages = _address_limit(), _read(root / "proc/self/statm").split()
    if limit is None or not pages:
        return None
    import resource

    return limit - int(pages[0]) * resource.getpagesize()


def retain_freed_memory() -> bool:
    """Make glibc keep the memory that this process frees.

    By default it returns large blocks to the kernel, and each step takes 50,000 page faults in a tiny ViT. Changes
    nothing without glibc, or if the address space is limited: retained addresses would be unavailable to new threads
    and to libraries that compile at run time.

    Returns:
        True if glibc was configured.
    """
    if platform.libc_ver()[0] != "glibc" or free_addresses() is not None:
        return False
    libc = ctypes.CDLL(None)
    settings = ((_MMAP_THRESHOLD, 2**30), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**26))
    return all(libc.mallopt(name, value) == 1 for name, value in settings)


def _meminfo(root: Path, name: str) -> int | None:
    match = re.search(rf"^{name}:\s+(\d+) kB", _read(root / "proc/meminfo"), re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _address_limit() -> int | None:
    try:
        import resource  # missing on Windows
    except ImportError:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def _cgroups(root: Path) -> Iterator[tuple[int, int]]:
    """Yield the limit and the usage of each control group with a limit, from the process's own to the root."""
    base = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, files = (base / "memory", _CGROUP_FILES[1]) if controllers else (base, _CGROUP_FILES[2])
        group = top / name.lstrip("/")  # in a container this may be the host's path: then only the top exists
        for folder in [group, *group.parents]:
            limit, used = (_read(folder / file).strip() for file in files[:2])
            if limit.isdigit() and used.isdigit():  # otherwise "max", or no such file
                cached = re.search(rf"^{files[2]} (\d+)", _read(folder / "memory.stat"), re.MULTILINE)
                yield int(limit), int(used) - (int(cached[1]) if cached else 0)
            if folder == top:
                break


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text()
    return ""


def in_gib(size: float) -> str:
    """Format a number of bytes in GiB."""
    gib = size / 2**30
    return f"{gib:,.0f}" if gib >= 10 else f"{gib:.1f}"
