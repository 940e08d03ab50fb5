"""Read files safely and write them atomically.

Any file may come from a stranger. A FIFO, a device or a file that grows while it is read would block a command or fill
the memory. A symbolic link under the name of a temporary file would redirect a write. All of them are refused.
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
"""Default maximum size of a text or JSON file that is read into memory."""

_MAX_JSON_DEPTH = 64

_ENCODE_ERRORS = "pixmim-filenames"  # writes bytes of file names that are not UTF-8 unchanged


_SAFE = sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))  # 0 where a platform lacks one
_NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | _SAFE | _NOFOLLOW
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND | _SAFE | _NOFOLLOW


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading without blocking, and return its descriptor. Symbolic links are followed.

    Raises OSError for a FIFO, a device, a socket or a folder.
    """
    _check_regular(os.stat(path), path)  # before opening: opening a device may have side effects
    descriptor = os.open(path, os.O_RDONLY | _SAFE)
    try:
        _check_regular(os.fstat(descriptor), path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@contextmanager
def readable(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError within a `with` statement into a UserError: PATH cannot be read."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{os.fspath(path)} cannot be read: {error.strerror or error}") from error


def read_file(path: str | os.PathLike[str], limit: int = MAX_TEXT_BYTES) -> bytes:
    """Read a regular file. Raises OSError if it is larger than `limit` bytes, or grows while it is read."""
    with open(open_regular(path), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise OSError(errno.EFBIG, f"{size:,} bytes exceed the limit of {limit:,}", str(path))
        chunks, remaining = [], size + 1  # one byte more, to detect growth
        while remaining and (chunk := file.read(remaining)):
            chunks.append(chunk)
            remaining -= len(chunk)
    if not remaining:
        raise OSError(errno.EFBIG, "file grew while it was read", str(path))
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def read_text(path: str | os.PathLike[str], limit: int = MAX_TEXT_BYTES) -> str:
    """Read a UTF-8 text file as `read_file` does. Invalid bytes become surrogates, as in file names."""
    return read_file(path, limit).decode("utf-8", "surrogateescape")


def read_json(path: str | os.PathLike[str], limit: int = MAX_TEXT_BYTES) -> Any:
    """Read a JSON file. Raises OSError as `read_file` and UserError as `parse_json`."""
    return parse_json(read_text(path, limit), str(path))


def parse_json(text: str, source: str, unique: bool = False) -> Any:
    """Parse untrusted JSON text, which errors call `source`.

    Raises:
        UserError: If it is not valid JSON, is nested deeper than 64 levels, or, with `unique`, repeats a key.
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
    """Write a file through `write(file)` to a temporary file, and rename it once it is complete and synced.

    Until then the previous content remains. The temporary name is random and created exclusively, so neither another
    process nor a symbolic link can occupy it.

    Raises:
        OSError: If writing fails; it names `path`. The temporary file is removed.
    """
    temporary = _temporary(path)
    try:
        with open(os.open(temporary, _CREATE, 0o666), "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and error.filename in (None, str(temporary)):  # a full disk gives no file name
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(path: Path, content: str | bytes) -> None:
    """Write text or bytes with `atomic_write`. Text is UTF-8; surrogates from file names become their raw bytes."""
    data = content.encode("utf-8", _ENCODE_ERRORS) if isinstance(content, str) else content
    atomic_write(path, lambda file: file.write(data))


def write_json(path: Path, content: object) -> None:
    """Write indented JSON atomically."""
    write_text_atomically(path, json.dumps(content, indent=2) + "\n")


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """Write rows as CSV atomically, encoded as by `write_text_atomically`."""

    def write(file: IO[bytes]) -> None:
        text = io.TextIOWrapper(file, "utf-8", _ENCODE_ERRORS, newline="")
        csv.writer(text).writerows(rows)
        text.detach()  # flushes and leaves the file open

    atomic_write(path, write)


def append(path: Path, text: str) -> None:
    """Append text to a regular file, which is created if necessary. A symbolic link is not followed.

    If that raises an OSError, the file keeps its previous content.
    """
    with open(os.open(path, _APPEND, 0o666), "ab", buffering=0) as file:
        status = os.fstat(file.fileno())
        _check_regular(status, path)
        remaining = memoryview(text.encode("utf-8", _ENCODE_ERRORS))
        try:
            while remaining:
                remaining = remaining[os.write(file.fileno(), remaining) :]
        except OSError:
            with suppress(OSError):
                os.truncate(file.fileno(), status.st_size)
            raise


def check_new(folder: Path) -> None:
    """Raise UserError unless a folder is new, or empty and not the current directory; OSError if it cannot be made."""
    if os.path.lexists(folder):
        if not folder.is_dir() or any(folder.iterdir()) or folder.samefile("."):
            raise UserError(f"{folder} already exists: choose another folder")
    else:
        check_writable(folder)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a new, empty folder to write into, and rename it to `folder` if the block succeeds; otherwise remove it.

    Raises:
        UserError: If `folder` exists and is not empty.
    """
    folder = folder.absolute()
    check_new(folder)
    temporary = _temporary(folder)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.mkdir()
    try:
        yield temporary
        check_new(folder)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def shortened(path: Path) -> Path:
    """Return an absolute path relative to the working directory, if it is inside: results and pages may be shared."""
    current = Path.cwd()
    return path.relative_to(current) if path.is_relative_to(current) else path


def check_writable(path: Path) -> None:
    """Raise an OSError now, before the work, if `path` cannot be written. Leaves no file or folder behind."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    probe = _temporary(next(folder for folder in path.absolute().parents if folder.exists()) / path.name)
    try:
        os.close(os.open(probe, _CREATE, 0o666))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    probe.unlink()


def check_output(path: Path, overwrite: bool = False, mark: bytes = b"") -> None:
    """Check, before the work, that an output file can be written and does not replace a file of the user.

    Files with `mark` near their start were written by pixmim and may be replaced without --overwrite.

    Raises:
        UserError: If another file exists at `path`.
        OSError: If `path` cannot be written.
    """
    check_writable(path)
    if overwrite or not os.path.lexists(path):
        return
    with open(open_regular(path), "rb") as file:
        head = file.read(2**16)
    if not mark:
        raise UserError(f"{path} already exists: choose another name, or add --overwrite to replace it")
    if mark not in head:
        raise UserError(f"{path} already exists, and pixmim did not write it: move it, or choose another name")


def cache_path(kind: str, key: str) -> Path:
    """Return the path, without suffix, under which data about `key` is cached. Its folder may not exist yet.

    It is in $XDG_CACHE_HOME/pixmim, or ~/.cache/pixmim, whose files may be deleted at any time.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    home = base if base.is_absolute() else Path("~/.cache").expanduser()
    return home / "pixmim" / kind / hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _temporary(path: Path) -> Path:
    """Return a random name in the folder of `path`, short enough for the limit of 255 bytes."""
    return path.with_name(f"{path.name[:40]}.{uuid.uuid4().hex}.tmp")


def _check_regular(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
        raise OSError(errno.EINVAL, f"not a regular file, but {kind}", str(path))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"duplicate key {shown(key)}")
        content[key] = value
    return content


def _check_depth(content: Any, levels: int) -> None:
    if isinstance(content, dict | list):
        if not levels:
            raise RecursionError
        for value in content.values() if isinstance(content, dict) else content:
            _check_depth(value, levels - 1)


def _encode_surrogates(error: UnicodeError) -> tuple[bytes, int]:
    """Encode surrogates that represent a byte of a file name as that byte, and others as "?"."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    codes = map(ord, error.object[error.start : error.end])
    return b"".join(bytes([code - 0xDC00]) if 0xDC80 <= code <= 0xDCFF else b"?" for code in codes), error.end


codecs.register_error(_ENCODE_ERRORS, _encode_surrogates)
