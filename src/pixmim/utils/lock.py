"""Locks of folders, also on shared file systems: one process at a time works in a run or in unfinished results.

FOLDER/lock names the host and the process that holds it; its modification time is renewed every BEAT seconds. The lock
of a process that has ended, even by SIGKILL or a power cut, is taken over:

- on the same host (same boot, same process namespace) at once, if no process with that number and start time exists.
  While it exists, the folder is refused, however long the process has been suspended;
- on another host, or where there is no /proc, once the modification time has not changed for STILL seconds, or at once
  if it is OLD seconds behind the file system's own clock. As soon as it changes, the folder is refused.

Only timestamps of the file system are compared, so the clocks of hosts may differ. `flock`, and with it the `filelock`
package, is not used: many shared file systems ignore it, or keep it within one host.
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

BEAT, STILL, OLD = 15.0, 90.0, 600.0
"""Seconds. STILL is longer than a beat plus the minute for which NFS may report an old time."""

_MAX_BYTES = 4096


@contextmanager
def locked_folder(folder: Path, say: Callable[[str], None] = lambda text: None, new: bool = False) -> Iterator[None]:
    """Hold the lock of a folder, which is created if necessary, and removed at the end if it was created and is empty.

    Args:
        folder: The folder.
        say: Called with a line of text if the holder of an existing lock must be watched first.
        new: Whether the folder must not exist.

    Raises:
        UserError: If another process works in the folder.
        OSError: If the folder cannot be created or written to.
    """
    path, created = folder / LOCK_NAME, not folder.exists()
    folder.mkdir(parents=True, exist_ok=not new)
    holder = {"host": platform.node(), "pid": os.getpid(), "system": _system(), "started": _start_time(os.getpid())}
    mine = json.dumps(holder | {"token": uuid.uuid4().hex}).encode()
    while not _create(path, mine):
        _remove_dead(path, say)
    done = threading.Event()
    heartbeat = threading.Thread(target=_renew, args=(path, mine, done), name="pixmim-lock", daemon=True)
    heartbeat.start()
    try:
        yield
    finally:
        done.set()
        heartbeat.join()
        if _read(path) == mine:
            path.unlink(missing_ok=True)
        if created:
            with suppress(OSError):  # not empty
                folder.rmdir()


def _create(path: Path, content: bytes) -> bool:
    """Create a file, or return False if it exists."""
    try:
        with path.open("xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def _remove_dead(path: Path, say: Callable[[str], None]) -> None:
    """Remove a lock whose holder has ended. Raises UserError if it has not."""
    first, start, watching = _modified(path), time.monotonic(), False
    while True:
        content = _read(path)
        now = _modified(path)
        if first is None or now is None:
            return
        holder = _parse(content)
        name = f"process {holder.get('pid')} on {shown(holder.get('host'))}"
        is_local = bool(holder.get("system")) and holder["system"] == _system()
        if now != first or (is_local and _is_alive(holder)):
            raise UserError(
                f"{path.parent} is in use by {name}: wait until it ends, stop it, or choose another folder. If there "
                f"is no such process, remove {path}"
            )
        expired = time.monotonic() - start > STILL or (not watching and _clock(path.parent) - first > OLD)
        if is_local or expired:
            break
        if not watching:
            say(f"{path.parent} is locked by {name}: checking for up to {STILL:.0f} s whether it still runs")
            watching = True
        time.sleep(1)
    aside = path.with_name(f"{LOCK_NAME}.{uuid.uuid4().hex}.tmp")
    with suppress(FileNotFoundError):  # another process removed it
        os.rename(path, aside)
        if _read(aside) == content:
            aside.unlink()
        else:  # another process removed it, and holds a new lock
            os.rename(aside, path)


def _renew(path: Path, mine: bytes, done: threading.Event) -> None:
    """Renew a lock until `done`. If it was taken over, terminate: another process writes in the folder."""
    while not done.wait(BEAT):
        with suppress(OSError):  # a file system that is unavailable for a moment
            content = _read(path)
            if content and content != mine:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            os.utime(path)


def _read(path: Path) -> bytes:
    """Read a lock, or b"" if there is none. Opening it makes NFS refresh its modification time too."""
    with suppress(FileNotFoundError):
        return read_file(path, _MAX_BYTES)
    return b""


def _parse(content: bytes) -> dict[str, Any]:
    """Return the holder of a lock; {} if the lock is being written, or damaged."""
    try:
        holder = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) and type(holder.get("pid")) is int else {}


def _modified(path: Path) -> float | None:
    try:
        return os.stat(path).st_mtime
    except FileNotFoundError:
        return None


def _clock(folder: Path) -> float:
    """Return the time that the file system of a folder gives to a new file."""
    probe = folder / f"{LOCK_NAME}.{uuid.uuid4().hex}.tmp"
    _create(probe, b"")
    try:
        return os.stat(probe).st_mtime
    finally:
        probe.unlink()


def _system() -> str:
    """Identify this boot and process namespace, in which process numbers are unique; "" without /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_time(pid: int) -> str:
    """Return when a process of this system started, in clock ticks; "" if it does not exist or has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state in "ZX" else fields[18]


def _is_alive(holder: dict[str, Any]) -> bool:
    """Return True if the holder of a lock, a process of this system, is running."""
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
