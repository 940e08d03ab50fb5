"""Locks of folders: at most one process works in a run, an unfinished evaluation or an unfinished file of features.

FOLDER/lock names the host and the process that holds it. Its time is renewed every BEAT seconds. The lock of a process
that has ended, by SIGKILL or a power cut as well, is taken over:

- on the same host (the same boot, and the same namespace of process numbers), at once if no process of that number and
  starting time is there any more. While there is one, the folder is refused, however long that process has been still;
- on another host, or where the system has no /proc: after the lock's time has not changed for STILL seconds, or at once
  if it is OLD seconds behind the file system's own clock. As soon as it changes, the folder is refused.

Only time stamps that the file system gives are compared, so the hosts' clocks may differ. `flock` is not used: many
shared file systems do without, or keep it within one host.
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

NAME = "lock"

BEAT, STILL, OLD = 15.0, 90.0, 600.0
"""Seconds. STILL is longer than a beat and the minute for which NFS may show an old time."""

_MAX_BYTES = 4096


@contextmanager
def alone(folder: Path, say: Callable[[str], None] = lambda text: None, new: bool = False) -> Iterator[None]:
    """Hold the lock of a folder, which is made if need be, and then removed again if it is empty at the end.

    Args:
        folder: The folder.
        say: Called with a line if the holder of a lock there must be watched first.
        new: The folder must not exist.

    Raises:
        UserError: If another process works in the folder.
        OSError: As making the folder does, and writing in it.
    """
    path, made = folder / NAME, not folder.exists()
    folder.mkdir(parents=True, exist_ok=not new)
    mine = json.dumps(
        {"host": platform.node(), "pid": os.getpid(), "system": _system(), "started": _started(os.getpid())}
        | {"token": uuid.uuid4().hex}
    ).encode()
    while not _create(path, mine):
        _take_over(path, folder, say)
    over = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, mine, over), name="pixmim-lock", daemon=True)
    heart.start()
    try:
        yield
    finally:
        over.set()
        heart.join()
        if _read(path) == mine:
            path.unlink(missing_ok=True)
        with suppress(OSError):  # something is in it
            if made:
                folder.rmdir()


def _create(path: Path, content: bytes) -> bool:
    """Write a lock unless there is one."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, content)
    finally:
        os.close(descriptor)
    return True


def _take_over(path: Path, folder: Path, say: Callable[[str], None]) -> None:
    """Remove a lock whose holder has ended. Raises UserError if it has not."""
    content, since, told = _read(path), time.monotonic(), False
    first = _changed(path)
    if first is None:
        return
    old = _clock(folder) - first > OLD
    while True:
        holder = _parse(content)
        who = f"process {holder.get('pid')} on {shown(holder.get('host'))}"
        busy = UserError(
            f"{folder} is in use by {who}: wait until it has ended, or stop it, or choose another folder. If no such "
            f"process is there, remove {path}"
        )
        if holder.get("system") and holder["system"] == _system():
            if _alive(holder):
                raise busy
            break
        now = _changed(path)
        if now is None:
            return
        if now != first:
            raise busy
        if old or time.monotonic() - since > STILL:
            break
        if not told:
            say(f"{folder} is locked by {who}: looking for up to {STILL:.0f} s whether that is still there")
            told = True
        time.sleep(1)
        content = _read(path)
    aside = path.with_name(f"{NAME}.{uuid.uuid4().hex}.tmp")
    with suppress(FileNotFoundError):  # another one took it over
        os.rename(path, aside)
        if _read(aside) == content:
            aside.unlink()
        else:  # another one did, and has locked it since
            os.rename(aside, path)


def _beat(path: Path, mine: bytes, over: threading.Event) -> None:
    """Renew the time of a lock until `over`. If it was taken over, ask this process to end: another one writes here."""
    while not over.wait(BEAT):
        with suppress(OSError):  # a file system that is away for a moment
            content = _read(path)
            if content and content != mine:
                os.kill(os.getpid(), signal.SIGTERM)
                return
            os.utime(path)


def _read(path: Path) -> bytes:
    """Read a lock. Opening it makes NFS ask for its time as well."""
    with suppress(FileNotFoundError):
        return read_file(path, _MAX_BYTES)
    return b""


def _parse(content: bytes) -> dict[str, Any]:
    """What a lock says of its holder; nothing if it is being written, or damaged."""
    try:
        holder = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) and type(holder.get("pid")) is int else {}


def _changed(path: Path) -> float | None:
    try:
        return os.stat(path).st_mtime
    except FileNotFoundError:
        return None


def _clock(folder: Path) -> float:
    """Return the time that the file system of a folder gives to a new file."""
    probe = folder / f"{NAME}.{uuid.uuid4().hex}.tmp"
    _create(probe, b"")
    try:
        return os.stat(probe).st_mtime
    finally:
        probe.unlink()


def _system() -> str:
    """Return what tells where process numbers mean the same: this boot and namespace; empty if that is not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Return when a process of this system began, in ticks; empty if there is none, or it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return "" if state in "ZX" else fields[18]


def _alive(holder: dict[str, Any]) -> bool:
    """Return True if the holder of a lock, a process of this system, is there."""
    started = _started(holder["pid"])
    if started or Path(f"/proc/{holder['pid']}").exists():
        return started == holder.get("started")
    try:
        os.kill(holder["pid"], 0)  # /proc may hide the processes of others
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True
