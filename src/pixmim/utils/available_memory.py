"""How much memory there still is for this process: on the machine, in its control groups, under its own limit."""

import os
import re
from collections.abc import Iterator
from pathlib import Path


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still take, or None where the system does not say (so far, all but Linux).

    The least of three: what Linux reckons available without swapping; what each control group around the process
    leaves of its limit (containers and Slurm set such limits; files kept in memory count as free); and what is left
    of the process's own limit of addresses (`ulimit -v`).

    root  where /proc and /sys are
    """
    groups = (left for _, left in _groups(root))
    found = [_kilobytes(root / "proc/meminfo", "MemAvailable"), addresses(root), *groups]
    return min((max(0, left) for left in found if left is not None), default=None)


def total_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of memory that this process may ever take, or None where the system does not tell.

    The least of the machine's memory, the limits of the control groups around the process, and its own limit of
    addresses. Unlike free memory it is the same at every start.

    Args:
        root: The folder that holds /proc and /sys.
    """
    limits = (most for most, _ in _groups(root))
    found = [_kilobytes(root / "proc/meminfo", "MemTotal"), _most_addresses(), *limits]
    return min((most for most in found if most is not None), default=None)


def _kilobytes(meminfo: Path, name: str) -> int | None:
    match = re.search(rf"^{name}:\s+(\d+) kB", _text(meminfo), re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def addresses(root: Path = Path("/")) -> int | None:
    """Bytes of addresses that this process can still take, or None where they are not limited."""
    limit, pages = _most_addresses(), _text(root / "proc/self/statm").split()
    if limit is None or not pages:
        return None
    return limit - int(pages[0]) * os.sysconf("SC_PAGE_SIZE")


def _most_addresses() -> int | None:
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def _groups(root: Path) -> Iterator[tuple[int | None, int | None]]:
    """The limit of each control group and what it leaves, from the process's own up to the root, of version 2 and 1."""
    base = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, limit, usage, idle = base, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, usage, idle = (
                base / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                "total_inactive_file",
            )
        else:
            continue
        # In a container the path may be the host's, and not be there: then only the top is.
        group = top / path.lstrip("/")
        for folder in [group, *group.parents]:
            yield _left(folder, limit, usage, idle)
            if folder == top:
                break


def _left(folder: Path, limit: str, usage: str, idle: str) -> tuple[int | None, int | None]:
    most, used = _text(folder / limit).strip(), _text(folder / usage).strip()
    if not (most.isdigit() and used.isdigit()):  # "max", or no such file
        return None, None
    match = re.search(rf"^{idle} (\d+)", _text(folder / "memory.stat"), re.MULTILINE)
    return int(most), int(most) - int(used) + (int(match[1]) if match else 0)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
