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
    found = [_available(root / "proc/meminfo"), addresses(root), *_groups(root)]
    return min((max(0, left) for left in found if left is not None), default=None)


def _available(meminfo: Path) -> int | None:
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _text(meminfo), re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def addresses(root: Path = Path("/")) -> int | None:
    """Bytes of addresses that this process can still take, or None where they are not limited."""
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _text(root / "proc/self/statm").split()
    if limit == resource.RLIM_INFINITY or not pages:
        return None
    return limit - int(pages[0]) * os.sysconf("SC_PAGE_SIZE")


def _groups(root: Path) -> Iterator[int | None]:
    """What each control group with a limit leaves, from the process's own up to the root, of version 2 and 1."""
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


def _left(folder: Path, limit: str, usage: str, idle: str) -> int | None:
    most, used = _text(folder / limit).strip(), _text(folder / usage).strip()
    if not (most.isdigit() and used.isdigit()):  # "max", or no such file
        return None
    match = re.search(rf"^{idle} (\d+)", _text(folder / "memory.stat"), re.MULTILINE)
    return int(most) - int(used) + (int(match[1]) if match else 0)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
