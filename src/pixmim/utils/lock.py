"""Lock folders, also on shared file systems, so that one process at a time works in a run.

FOLDER/lock is a lease of filelock. It names the host and process that hold it, which renew it every BEAT seconds. It is
taken over if that process has ended, even by SIGKILL or a power cut: on the same host at once, from another host once
the lock has not been renewed for STILL seconds. Clocks are not compared. `flock` would not do: many shared file systems
ignore it.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import LeaseSettingsMismatch, SoftFileLease, Timeout

from pixmim.utils.errors import UserError, shown

LOCK_NAME = "lock"

BEAT, STILL = 3.0, 90.0
"""Seconds. STILL exceeds a beat plus the minute during which NFS may report a cached time."""


@contextmanager
def locked_folder(folder: Path, notify: Callable[[str], None] = lambda text: None, new: bool = False) -> Iterator[None]:
    """Hold the lock of a folder during a block. A process that loses its lock to another one is terminated.

    The folder is created if necessary. At the end it is removed again if it was created here and is empty.

    Args:
        folder: The folder.
        notify: Function that prints a line if the holder of an existing lock must be observed first.
        new: Whether the folder must not exist yet.

    Raises:
        UserError: If another process holds the lock.
        OSError: If the folder cannot be created or written to.
    """
    path, created = folder / LOCK_NAME, not folder.exists()
    folder.mkdir(parents=True, exist_ok=not new)
    lease = SoftFileLease(
        path,
        lease_duration=STILL,
        heartbeat_interval=BEAT,
        on_compromise=lambda lost: os.kill(os.getpid(), signal.SIGTERM),
        thread_local=False,
    )
    _acquire(lease, path, notify)
    try:
        yield
    finally:
        lease.release()
        if created:
            with suppress(OSError):  # not empty
                folder.rmdir()


def _acquire(lease: SoftFileLease, path: Path, notify: Callable[[str], None]) -> None:
    """Acquire a lock. Raise UserError as soon as its holder renews it, which only a running process does."""
    first, polls = _modified(path), 0

    def is_renewed() -> bool:
        nonlocal polls
        polls += 1
        if polls == 10:
            notify(f"{path.parent} is locked: checking for up to {STILL:.0f} s whether its process is running")
        return _modified(path) not in (first, None)

    try:
        lease.acquire(timeout=STILL + 30, poll_interval=0.1, cancel_check=is_renewed)
    except (Timeout, LeaseSettingsMismatch):
        holder = lease.owner
        name = f"process {holder.pid} on {shown(holder.hostname)}" if holder else "another process"
        raise UserError(
            f"{path.parent} is in use by {name}: wait until it ends, stop it, or choose another folder. If there is no "
            f"such process, remove {path}"
        ) from None


def _modified(path: Path) -> int | None:
    with suppress(FileNotFoundError):
        return os.lstat(path).st_mtime_ns
    return None
