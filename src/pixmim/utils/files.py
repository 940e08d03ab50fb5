"""Files: read only if they are regular and within a bound, written completely or not at all.

Every file may come from a stranger. A FIFO, a device or a file that grows while it is read would hang a command or fill
the memory; a symbolic link placed where a temporary file will be would redirect a write. The functions here refuse all
of them.
"""

import codecs
import csv
import errno
import hashlib
import io
import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from pixmim.utils.errors import UserError, shown
from pixmim.utils.process import killable

MAX_TEXT_BYTES = 64 * 2**20
"""Default bound of a text or JSON file that is read into memory."""

NAMES = "pixmim-names"
"""Error handler of text files that hold names: writes bytes that are not UTF-8 as they are in the file's name."""

_MAX_JSON_DEPTH = 64

_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading and return its descriptor. Symbolic links are followed.

    Never waits, whatever the path leads to.

    Raises:
        OSError: If the file cannot be opened, or is a FIFO, a device, a socket or a folder.
    """
    return _open(path)[0]


def read_file(path: str | os.PathLike[str], limit: int = MAX_TEXT_BYTES) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        OSError: If it is not a regular file, is larger than `limit`, or grows while it is read.
    """
    descriptor, size = _open(path)
    try:
        if size > limit:
            raise OSError(errno.EFBIG, f"{size:,} bytes are more than the {limit:,} allowed", str(path))
        parts, left = [], size + 1  # one more than there is: a file that grows shows
        while left and (part := os.read(descriptor, left)):
            parts.append(part)
            left -= len(part)
        if not left:
            raise OSError(errno.EFBIG, "it grew while it was read", str(path))
        return parts[0] if len(parts) == 1 else b"".join(parts)
    finally:
        os.close(descriptor)


def read_text(path: str | os.PathLike[str], limit: int = MAX_TEXT_BYTES) -> str:
    """Read a UTF-8 text file as `read_file` does. Invalid bytes become surrogates, as in file names."""
    return read_file(path, limit).decode("utf-8", "surrogateescape")


def read_json(path: str | os.PathLike[str], limit: int = MAX_TEXT_BYTES) -> Any:
    """Read a JSON file as `read_file` does.

    Raises:
        OSError: As `read_file`.
        UserError: If it is not JSON, or nested deeper than 64 levels.
    """
    return parse_json(read_text(path, limit), str(path))


def parse_json(text: str, source: str, unique: bool = False) -> Any:
    """Parse JSON from an untrusted `source`, which is its name in errors. With `unique`, no key may be there twice.

    Raises:
        UserError: If the text is not JSON, or nested deeper than 64 levels.
    """
    try:
        with killable():
            content = json.loads(text, object_pairs_hook=_unique if unique else None)
        _check_depth(content, _MAX_JSON_DEPTH)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{source} is not valid JSON: {reason}") from None
    return content


def atomic_write(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file through `write(file)` under a temporary name and move it into place once it is complete.

    Until then the previous content stays. The temporary name is random and must not exist: neither another process nor
    a symbolic link can stand there.

    Raises:
        OSError: As writing does; it names `path`. No temporary file is left behind.
    """
    temporary = _temporary(path)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(temporary, flags, 0o666), "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and error.filename in (None, str(temporary)):  # a full disk names no file at all
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` as `atomic_write` does; text as UTF-8, with the bytes that surrogates stand for in file names."""
    data = content.encode("utf-8", NAMES) if isinstance(content, str) else content
    atomic_write(path, lambda file: file.write(data))


def write_json(path: Path, content: object) -> None:
    """Write indented JSON atomically."""
    write_text_atomically(path, json.dumps(content, indent=2) + "\n")


def check_new(folder: Path) -> None:
    """Raise UserError unless a folder is absent, or empty and not the one that the process is in.

    Raises OSError if it cannot be made.
    """
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir()) or folder.samefile(".")):
        raise UserError(f"{folder} is there already: choose another folder")
    if not os.path.lexists(folder):
        check_writable(folder)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Give a new, empty folder to write into, which becomes `folder` once the block is left without an error.

    `folder` must not exist, or be empty. The temporary folder is beside it, under a random name that must not exist.

    Raises:
        OSError: As writing does. Nothing is left behind.
        UserError: If something is in `folder` already.
    """
    folder = folder.absolute()
    check_new(folder)
    beside = _temporary(folder)
    beside.parent.mkdir(parents=True, exist_ok=True)
    beside.mkdir()
    try:
        yield beside
        check_new(folder)
        os.rename(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """Write rows as CSV, as `write_text_atomically` does with their text."""

    def write(file: IO[bytes]) -> None:
        text = io.TextIOWrapper(file, "utf-8", NAMES, newline="")
        csv.writer(text).writerows(rows)
        text.detach()  # flushes, and leaves the file open

    atomic_write(path, write)


def append(path: Path, text: str) -> None:
    """Add text at the end of a regular file, made if need be. A symbolic link in its place is not followed.

    Raises:
        OSError: As writing does, or if `path` is a link or not a regular file. No part of the text is added.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        status = os.fstat(descriptor)
        _check_regular(status, path)
        left = memoryview(text.encode("utf-8", NAMES))
        try:
            while left:
                left = left[os.write(descriptor, left) :]
        except OSError:
            with suppress(OSError):
                os.truncate(descriptor, status.st_size)
            raise
    finally:
        os.close(descriptor)


def check_writable(path: Path) -> None:
    """Raise an OSError now, before the work, if writing `path` later cannot work. Makes no folder and no file."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    probe = _temporary(next(folder for folder in path.absolute().parents if folder.exists()) / path.name)
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    probe.unlink()


def check_output(path: Path, overwrite: bool = False, mark: bytes = b"") -> None:
    """Check, before the work, that a file which the user named can be written, and takes no other file's place.

    Args:
        path: The file to be written.
        overwrite: Whether the user has said that what is there may go (--overwrite).
        mark: What the beginning of a file holds that pixmim itself made and may renew.

    Raises:
        UserError: If another file is there.
        OSError: As `check_writable`.
    """
    check_writable(path)
    if overwrite or not os.path.lexists(path):
        return
    descriptor = open_regular(path)
    try:
        head = os.read(descriptor, 2**16)
    finally:
        os.close(descriptor)
    if not mark:
        raise UserError(f"{path} is there already: choose another name, or add --overwrite to replace it")
    if mark not in head:
        raise UserError(f"{path} is there already, and pixmim did not write it: move it, or choose another name")


def cache_path(kind: str, key: str) -> Path:
    """Return where a fact about `key` is cached, without a suffix; its folder may not exist yet.

    Below $XDG_CACHE_HOME/pixmim, or ~/.cache/pixmim. All of that may be removed at any time.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    home = base if base.is_absolute() else Path("~/.cache").expanduser()
    return home / "pixmim" / kind / hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _temporary(path: Path) -> Path:
    """Return a random name beside `path`; no name of a file is longer than 255 bytes."""
    return path.with_name(f"{path.name[:40]}.{uuid.uuid4().hex}.tmp")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} is there twice")
        found[key] = value
    return found


def _open(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Open a regular file for reading; return its descriptor and its size."""
    _check_regular(os.stat(path), path)  # opening a device may already have an effect
    descriptor = os.open(path, _FLAGS)
    try:
        status = os.fstat(descriptor)
        _check_regular(status, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor, status.st_size


def _check_regular(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise OSError(errno.EINVAL, f"not a regular file, but {kind}", str(path))


def _check_depth(content: Any, left: int) -> None:
    if isinstance(content, dict | list):
        if not left:
            raise RecursionError
        for value in content.values() if isinstance(content, dict) else content:
            _check_depth(value, left - 1)


def _name_bytes(error: UnicodeError) -> tuple[bytes, int]:
    """Encode surrogates: those that stand for a byte of a file's name as that byte, all others as "?"."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    codes = map(ord, error.object[error.start : error.end])
    return b"".join(bytes([code - 0xDC00]) if 0xDC80 <= code <= 0xDCFF else b"?" for code in codes), error.end


codecs.register_error(NAMES, _name_bytes)
