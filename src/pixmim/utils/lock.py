"""Lock folders, also on shared file systems, so that one process at a time works in a run.

FOLDER/lock names the host and process that hold it. Its modification time is renewed every BEAT seconds. A lock is
taken over if its process has ended, even by SIGKILL or a power cut:

- On the same host (same boot, same process namespace): at once, if no process with that number and start time exists.
  A suspended process keeps its lock.
- On another host, or without /proc: once the modification time has not changed for STILL seconds.

Timestamps are only compared for equality, so the clocks of hosts may differ. `flock`, and thus `filelock`, is ignored
by many shared file systems, or local to one host.
"""

import json
import os
import platform
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pixmim.utils.errors import UserError, shown
from pixmim.utils.files import read_file

LOCK_NAME = "lock"

BEAT, STILL = 15.0, 90.0
"""Seconds. STILL exceeds a beat plus the minute during which NFS may report a cached time."""

_MAX_BYTES = 4096


@contextmanager
def locked_folder(folder: Path, say: Callable[[str], None] = lambda text: None, new: bool = False) -> Iterator[None]:
    """Hold the lock of a folder during a block.

    The folder is created if necessary. At the end it is removed again if it was created here and is empty.

    Args:
        folder: The folder.
        say: Function that prints a line if the holder of an existing lock must be observed first.
        new: Whether the folder must not exist yet.

    Raises:
        UserError: If another process holds the lock.
        OSError: If the folder cannot be created or written to.
    """
    path, created = folder / LOCK_NAME, not folder.exists()
    folder.mkdir(parents=True, exist_ok=not new)
    holder = {"host": platform.node(), "pid": os.getpid(), "system": _system(), "started": _start_time(os.getpid())}
    content = json.dumps(holder | {"token": uuid.uuid4().hex}).encode()
    while not _create(path, content):
        _remove_stale(path, say)
    done = threading.Event()
    heartbeat = threading.Thread(target=_renew, args=(path, content, done), name="pixmim-lock", daemon=True)
    heartbeat.start()
    try:
        yield
    finally:
        done.set()
        heartbeat.join()
        if _read(path) == content:
            path.unlink(missing_ok=True)
        if created:
            with suppress(OSError):  # not empty
                folder.rmdir()


def _create(path: Path, content: bytes) -> bool:
    """Create a file. Return False if it exists."""
    try:
        with path.open("xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def _remove_stale(path: Path, say: Callable[[str], None]) -> None:
    """Remove a lock whose process has ended; raise UserError if it is running."""
    first, start, waiting = _modified(path), time.monotonic(), False
    while True:
        content, modified = _read(path), _modified(path)
        if first is None or modified is None:  # released meanwhile
            return
        holder = _parse(content)
        name = f"process {holder.get('pid')} on {shown(holder.get('host'))}"
        is_local = bool(holder.get("system")) and holder["system"] == _system()
        if modified != first or (is_local and _is_alive(holder)):
            raise UserError(
                f"{path.parent} is in use by {name}: wait until it ends, stop it, or choose another folder. If there "
                f"is no such process, remove {path}"
            )
        if is_local or time.monotonic() - start > STILL:
            break
        if not waiting:
            say(f"{path.parent} is locked by {name}: checking for up to {STILL:.0f} s whether it is running")
            waiting = True
        time.sleep(1)
    moved = path.with_name(f"{LOCK_NAME}.{uuid.uuid4().hex}.tmp")
    with suppress(FileNotFoundError):  # removed by another process
        os.rename(path, moved)
        if _read(moved) == content:
            moved.unlink()
        else:  # another process removed the stale lock and holds a new one: put it back
            os.rename(moved, path)


def _renew(path: Path, content: bytes, done: threading.Event) -> None:
    """Renew a lock until `done`. Terminate this process if another one has taken over the lock."""
    while not done.wait(BEAT):
        with suppress(OSError):  # the file system may be unavailable for a moment
            current = _read(path)
            if current and current != content:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            os.utime(path)


def _read(path: Path) -> bytes:
    """Read a lock, or return b"" if there is none. Opening it makes NFS refresh its modification time too."""
    with suppress(FileNotFoundError):
        return read_file(path, _MAX_BYTES)
    return b""


def _parse(content: bytes) -> dict[str, Any]:
    """Return the holder of a lock; {} if the lock is incomplete or damaged."""
    try:
        holder = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) and type(holder.get("pid")) is int else {}


def _modified(path: Path) -> float | None:
    with suppress(FileNotFoundError):
        return os.stat(path).st_mtime
    return None


def _system() -> str:
    """Identify this boot and process namespace, in which process numbers are unique; "" without /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_time(pid: int) -> str:
    """Return the start time of a local process in clock ticks; "" if it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state in "ZX" else fields[18]


def _is_alive(holder: dict[str, Any]) -> bool:
    """Return True if the process that holds a lock, on this system, is running."""
    started = _start_time(holder["pid"])
    if started or Path(f"/proc/{holder['pid']}").exists():
        return started == holder.get("started")
    try:
        os.kill(holder["pid"], 0)  # /proc may hide the processes of other users
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True
