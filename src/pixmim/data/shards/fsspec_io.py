"""Files at a path or a URL (http, s3, gs, hf, ...), read with bounds on size and time, and with retries.

URLs are read through fsspec: credentials, endpoints and anonymous access are set in its own environment variables and
configuration files.
"""

import errno
import re
import shutil
import stat
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any, TypeVar

from pixmim.data.shards.local import FileVersion
from pixmim.utils.errors import UserError
from pixmim.utils.files import MAX_TEXT_BYTES, read_file

T = TypeVar("T")

BACKOFF_SECONDS = (1, 2, 4, 8, 16, 32, 64)
"""Pauses between attempts; a server has two minutes to come back."""

REQUEST_SECONDS = 60.0
"""Bound of one request for a small file or for facts about a file, however slowly the server sends."""

RETRY_SECONDS = 300.0
"""Such a request is not repeated after this time."""

MIN_BYTES_PER_SECOND = 16 * 2**10
"""Average rate below which a download is abandoned, once `REQUEST_SECONDS` have passed."""

# What fsspec's file systems call the properties that change with a file's content.
_CONTENT_TAGS = ("ETag", "etag", "md5Hash", "crc32c", "blob_id")
_TIME_TAGS = ("LastModified", "Last-Modified", "last_modified", "mtime", "created")

_PERMANENT_ERRORS = (FileNotFoundError, IsADirectoryError, PermissionError, NotImplementedError, ImportError)
_RETRY_STATUS = frozenset((408, 425, 429))


class NoAccessError(UserError):
    """The server denies access to a file."""


def is_url(name: str) -> bool:
    """Return True if a name is a URL."""
    return re.match(r"[a-z][a-z0-9+.-]*://", name, re.IGNORECASE) is not None


def read_small_file(name: str, limit: int = MAX_TEXT_BYTES) -> bytes | None:
    """Return the content of a file, or None if it does not exist.

    Raises:
        UserError: If it cannot be read, is not a regular file, or is larger than `limit` bytes.
    """
    if not is_url(name):
        try:
            return read_file(name, limit)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):  # the last one: a long pattern
                return None
            raise UserError(f"{name} cannot be read: {error.strerror}") from error
    filesystem, path = _filesystem(name)

    def read_once() -> bytes:
        if _is_http(name):
            return _http_get(filesystem, path, limit + 1, {}, REQUEST_SECONDS)[2]
        content: bytes = filesystem.cat_file(path, start=0, end=limit + 1)
        return content

    content = with_retries(name, read_once, RETRY_SECONDS)
    if content is not None and len(content) > limit:
        raise UserError(f"{name} is larger than the {limit:,} bytes allowed")
    return content


def file_version(name: str) -> FileVersion | None:
    """Return the version of a file, or None if it does not exist. Raises UserError if it is not a regular file."""
    if not is_url(name):
        try:
            status = Path(name).stat()
        except OSError:
            return None
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{name} is not a regular file")
        return FileVersion(status.st_size, str(status.st_mtime_ns))
    filesystem, path = _filesystem(name)
    info: dict[str, Any] | None = with_retries(name, lambda: filesystem.info(path, **_time_limit(name)), RETRY_SECONDS)
    return None if info is None else _version_from(name, info)


def find_matching(pattern: str) -> dict[str, FileVersion | None]:
    """Find the files that match a glob pattern, sorted, with their versions where a server's listing has them.

    Raises UserError if a folder of a server cannot be listed, rather than leave its files out.
    """
    if not is_url(pattern):
        return dict.fromkeys(sorted(name for name in glob(pattern) if Path(name).is_file()))
    filesystem, path = _filesystem(pattern)
    top = re.split(r"[*\[]", path, maxsplit=1)[0].rpartition("/")[0]
    levels = path[len(top) + 1 :].split("/")
    found: dict[str, dict[str, Any]] = {top: {}}
    for depth, level in enumerate(levels, 1):
        kind = "file" if depth == len(levels) else "directory"
        entries = [entry for folder in found for entry in _list_folder(filesystem, pattern, folder).items()]
        found = {
            name: info for name, info in entries if info["type"] == kind and fnmatchcase(name.rpartition("/")[2], level)
        }
    files: dict[str, FileVersion | None] = {}
    for name, info in sorted(found.items()):
        url = str(filesystem.unstrip_protocol(name))
        # A time has another format in a listing than for one file, so those versions are requested one by one.
        complete = info.get("size") and any(info.get(tag) for tag in _CONTENT_TAGS)
        files[url] = _version_from(url, info) if complete else None
    return files


def _list_folder(filesystem: Any, pattern: str, folder: str) -> dict[str, dict[str, Any]]:
    """Return what fsspec knows of the entries of a folder, by name; empty if it does not exist. Raises UserError.

    fsspec's own `glob` leaves out a folder whose listing fails.
    """
    path, limit = f"{folder}/" if _is_http(pattern) else folder, _time_limit(pattern, RETRY_SECONDS)
    url = str(filesystem.unstrip_protocol(path))
    listing = with_retries(url, lambda: filesystem.ls(path, detail=True, **limit), RETRY_SECONDS) or []
    entries = {str(info["name"]).rstrip("/"): info for info in listing}
    # A server may list what is elsewhere.
    return {n: info for n, info in entries.items() if n.rpartition("/")[0] == folder and not n.endswith(("/.", "/.."))}


def read_range(url: str, offset: int, length: int) -> bytes | None:
    """Return a part of a remote file, whose version the caller verifies; None if the server sends only complete files.

    Raises:
        UserError: If the file cannot be read or no longer exists.
    """
    filesystem, path = _filesystem(url)

    def read_once() -> tuple[bytes | None]:
        if _is_http(url):  # fsspec would read all that a server without ranges sends
            headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
            limit = REQUEST_SECONDS + length / MIN_BYTES_PER_SECOND
            status, content_range, data = _http_get(filesystem, path, length + 1, headers, limit)
            if status != 206:
                return (None,)
            if content_range and not content_range.startswith(f"bytes {offset}-"):
                raise OSError(f"another range was sent: {content_range[:100]}")
        else:
            data = filesystem.cat_file(path, start=offset, end=offset + length)
        if len(data) != length:
            raise OSError(f"received {len(data):,} of {length:,} bytes")
        return (data,)

    result = with_retries(url, read_once)
    if result is None:
        raise UserError(f"{url} no longer exists")
    return result[0]


def download(url: str, to: Path, expected: FileVersion) -> None:
    """Download a complete file of the expected version. Raises UserError, also if the server is too slow."""
    from fsspec.callbacks import Callback

    filesystem, path = _filesystem(url)

    def download_once() -> bool:
        current = file_version(url)
        if current is not None and not expected.matches(current):
            raise UserError(f"{url} changed on the server since it was indexed: restart the command")
        if expected.size > shutil.disk_usage(to.parent).free:
            raise OSError(errno.ENOSPC, "No space left on device")
        limit = REQUEST_SECONDS + expected.size / MIN_BYTES_PER_SECOND
        callback = Callback(hooks={"check": partial(_check_download, url, expected.size, time.monotonic())})
        filesystem.get_file(path, str(to), callback=callback, **_time_limit(url, limit))
        if to.stat().st_size != expected.size:
            raise OSError(f"received {to.stat().st_size:,} of {expected.size:,} bytes")
        return True

    if with_retries(url, download_once) is None:
        raise UserError(f"{url} no longer exists")


def with_retries(url: str, action: Callable[[], T], max_seconds: float = float("inf")) -> T | None:
    """Return the result of `action`, repeated with growing pauses for up to `max_seconds` while it may succeed.

    Returns None if the file does not exist.

    Raises:
        NoAccessError: If the server denies access.
        UserError: If the last attempt fails, or a repetition cannot help.
    """
    start = time.monotonic()
    for attempt, pause in enumerate((*BACKOFF_SECONDS, None), 1):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # each storage has exceptions of its own
            cause: BaseException = error
            if isinstance(error, FileNotFoundError) and _is_http(url):
                cause = error.__cause__ or error  # fsspec reports every HTTP error as "not found"
            if isinstance(cause, UserError):  # from the HTTP client, such as for a redirect
                raise UserError(str(cause)) from None
            status = getattr(cause, "status", None)
            if status in (404, 410) or (isinstance(cause, FileNotFoundError) and status is None):
                return None
            reason = f"{type(cause).__name__}: {cause}".removesuffix(": ")
            if status in (401, 403) or isinstance(cause, PermissionError):
                raise NoAccessError(
                    f"access to {url} denied: {reason}. Set or renew the credentials of this storage; if the URL is "
                    "signed, resume a run with --resume RUN --data URL"
                ) from error
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"no space to cache {url}: {cause}. Lower --shard-cache-gib, or set XDG_CACHE_HOME to a larger disk"
                ) from error
            refused = isinstance(status, int) and 400 <= status < 500 and status not in _RETRY_STATUS
            expired = pause is None or time.monotonic() - start > max_seconds
            if expired or refused or isinstance(cause, _PERMANENT_ERRORS):
                attempts = f" after {attempt} attempts" if attempt > 1 else ""
                raise UserError(f"{url} cannot be read{attempts}: {reason}") from error
            assert pause is not None
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the path in it."""
    protocol = url.split("://", 1)[0].lower()
    try:
        from fsspec.core import url_to_fs

        options: dict[str, Any] = {"use_listings_cache": False}  # changes on the server must show
        if _is_http(url):
            from pixmim.data.shards.http import OPTIONS

            options |= OPTIONS
        filesystem, path = url_to_fs(url, **options)
        return filesystem, str(path)
    except ImportError as error:
        help_ = "pip install 'pixmim[remote]'" if _is_http(url) or error.name == "fsspec" else str(error)
        raise UserError(f"{protocol}:// URLs need a package that is not installed: {help_}") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}. Use http, https, s3, gs, az, hf or another protocol of fsspec") from error


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _time_limit(url: str, seconds: float | None = None) -> dict[str, float]:
    """Return the argument that bounds one of fsspec's calls over HTTP, where the server may be anybody's."""
    return {"timeout": seconds or REQUEST_SECONDS} if _is_http(url) else {}


def _http_get(
    filesystem: Any, path: str, limit: int, headers: dict[str, str], seconds: float
) -> tuple[int, str, bytes]:
    """Call `http.get` in fsspec's event loop."""
    from fsspec.asyn import sync

    from pixmim.data.shards.http import get

    response: tuple[int, str, bytes] = sync(filesystem.loop, get, filesystem, path, limit, headers, timeout=seconds)
    return response


def _check_download(url: str, expected: int, start: float, size: int | None, value: int) -> None:
    """Abort a download since `start` if it has more bytes (`value`) than expected, or too few a second."""
    if value > expected:
        raise UserError(f"{url} sends more than the {expected:,} bytes expected")
    seconds = time.monotonic() - start
    if seconds > REQUEST_SECONDS and value < (seconds - REQUEST_SECONDS) * MIN_BYTES_PER_SECOND:
        raise UserError(f"{url} is too slow: {value:,} bytes in {seconds:.0f} s")


def _version_from(url: str, info: dict[str, Any]) -> FileVersion:
    if info.get("size") is None:
        raise UserError(f"the server does not report the size of {url}, so a complete download cannot be recognized")
    tag = next((str(info[name]) for name in (*_CONTENT_TAGS, *_TIME_TAGS) if info.get(name)), "")
    return FileVersion(int(info["size"]), tag)
