"""Files that lie far away (http, s3, gs, hf, ...), through fsspec; what fails for a while is tried again.

How a storage is reached (keys, endpoints, anonymous access) is fsspec's matter: its own variables and files say so.
"""

import errno
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pixmim.data.shards.local import Version
from pixmim.utils.errors import UserError
from pixmim.utils.files import MAX_TEXT_BYTES

T = TypeVar("T")

PAUSES = (1, 2, 4, 8, 16, 32, 64)
"""Seconds between tries; a server has two minutes to come back."""

SECONDS = 60.0
"""Seconds that one answer about a file, or a small file itself, may take, however the server spreads its bytes."""

LONGEST = 300.0
"""Seconds after which a small file is not tried again."""

SLOWEST = 16 * 2**10
"""Bytes a second that a copy must come with on average, once `SECONDS` have passed."""

_PACKAGES = {
    "http": "'pixmim[remote]'",
    "https": "'pixmim[remote]'",
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "az": "adlfs",
    "hf": "'pixmim[hub]'",
}

_CONTENT = ("ETag", "etag", "md5Hash", "crc32c", "blob_id")
_TIME = ("LastModified", "Last-Modified", "last_modified", "mtime", "created")
"""What file systems call that which changes with a file's content."""

_FINAL = (FileNotFoundError, IsADirectoryError, PermissionError, NotImplementedError, ImportError)

_AGAIN = frozenset((408, 425, 429))  # answers of 400 to 499 that ask for patience


class NoAccessError(UserError):
    """The server refuses to hand a file out."""


def is_far(spec: str) -> bool:
    """Whether a name is a URL."""
    return re.match(r"[a-z][a-z0-9+.-]*://", spec, re.IGNORECASE) is not None


def read(url: str, limit: int = MAX_TEXT_BYTES) -> bytes | None:
    """Read a small file.

    Returns:
        Its content, or None if there is no such file.

    Raises:
        UserError: If it cannot be read, or is larger than `limit` bytes.
    """
    files, path = _files(url)

    def once() -> bytes:
        if _is_http(url):
            return _fetch(files, path, limit + 1, {}, SECONDS)[2]
        content: bytes = files.cat_file(path, start=0, end=limit + 1)
        return content

    content = _tried(url, once, LONGEST)
    if content is not None and len(content) > limit:
        raise UserError(f"{url} has more than the {limit:,} bytes allowed")
    return content


def version(url: str) -> Version | None:
    """A file's size and tag, asked for now; None if there is no such file. Raises UserError."""
    files, path = _files(url)
    info: dict[str, Any] | None = _tried(url, lambda: files.info(path, **_bounded(url)), LONGEST)
    return None if info is None else _version(url, info)


def matching(pattern: str) -> dict[str, Version | None]:
    """Return the files that a pattern with `*` or `[...]` fits, sorted; with their versions where the listing has them.

    Whatever the server lists, only files below the folder that the pattern begins with are returned.
    """
    files, path = _files(pattern)
    found: dict[str, dict[str, Any]] = (
        _tried(pattern, lambda: files.glob(path, detail=True, **_bounded(pattern, LONGEST)), LONGEST) or {}
    )
    fixed = str(files.unstrip_protocol(re.split(r"[*\[]", path, maxsplit=1)[0].rpartition("/")[0])) + "/"
    names = {str(files.unstrip_protocol(name)): info for name, info in sorted(found.items()) if info["type"] == "file"}
    names = {name: info for name, info in names.items() if name.startswith(fixed) and ".." not in name.split("/")}
    # Times are written differently in a list and for one file, so those are asked for one by one.
    told = {name for name, info in names.items() if info.get("size") and any(info.get(tag) for tag in _CONTENT)}
    return {name: _version(name, info) if name in told else None for name, info in names.items()}


def read_part(url: str, of: Version, offset: int, length: int) -> bytes | None:
    """Some bytes of a file of a known version; None if the server hands out nothing but whole files.

    Raises UserError. That the file has not changed since is not looked after.
    """
    files, path = _files(url)

    def once() -> tuple[bytes | None]:
        if _is_http(url):  # where asking for a part may begin to send the whole
            headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
            status, place, data = _fetch(files, path, length + 1, headers, SECONDS + length / SLOWEST)
            if status != 206:
                return (None,)
            if place and not place.startswith(f"bytes {offset}-"):
                raise OSError(f"another part came: {place[:100]}")
        else:
            data = files.cat_file(path, start=offset, end=offset + length)
        if len(data) != length:
            raise OSError(f"{len(data):,} of {length:,} bytes came")
        return (data,)

    found = _tried(url, once)
    if found is None:
        raise UserError(f"there is no {url} any more")
    return found[0]


def copy(url: str, to: Path, wanted: Version) -> None:
    """Copy a complete file of the version wanted.

    Raises:
        UserError: If it cannot be had, is of another version, is longer than that, or comes too slowly.
    """
    files, path = _files(url)

    def once() -> bool:
        found = version(url)
        if found is not None and not wanted.fits(found):
            raise UserError(f"{url} has changed on the server since the places in it were listed: start again")
        if wanted.size > shutil.disk_usage(to.parent).free:
            raise OSError(errno.ENOSPC, "No space left on device")
        files.get_file(
            path, str(to), callback=_watch(url, wanted.size), **_bounded(url, SECONDS + wanted.size / SLOWEST)
        )
        if to.stat().st_size != wanted.size:
            raise OSError(f"{to.stat().st_size:,} of {wanted.size:,} bytes came")
        return True

    if _tried(url, once) is None:
        raise UserError(f"there is no {url} any more")


def _files(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    protocol = url.split("://", 1)[0].lower()
    try:
        from fsspec.core import url_to_fs

        options: dict[str, Any] = {"use_listings_cache": False}  # what has changed must show
        if protocol in ("http", "https"):
            from pixmim.data.shards.http import OPTIONS

            options |= OPTIONS
        files, path = url_to_fs(url, **options)
        return files, str(path)
    except ImportError as error:
        package = _PACKAGES.get(protocol, "")
        help_ = f"pip install {package}" if package else str(error)
        raise UserError(f"{protocol}:// is read through fsspec and a package that is not installed: {help_}") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}. Known are http, https, s3, gs, az, hf and what else fsspec reads") from error


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _bounded(url: str, seconds: float | None = None) -> dict[str, float]:
    """Return the argument that bounds the time of one of fsspec's calls, where the server may be anybody's."""
    return {"timeout": seconds or SECONDS} if _is_http(url) else {}


def _fetch(files: Any, path: str, limit: int, headers: dict[str, str], seconds: float) -> tuple[int, str, bytes]:
    """Call `http.fetch` in fsspec's event loop."""
    from fsspec.asyn import sync

    from pixmim.data.shards.http import fetch

    found: tuple[int, str, bytes] = sync(files.loop, fetch, files, path, limit, headers, timeout=seconds)
    return found


def _watch(url: str, size: int) -> Any:
    """Return a callback for a copy that ends it once more bytes come than there are, or too few a second."""
    from fsspec.callbacks import Callback

    began = time.monotonic()

    class Watch(Callback):  # type: ignore[misc]
        """Counts bytes."""

        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            if self.value > size:
                raise UserError(f"{url} sends more than the {size:,} bytes that it has")
            seconds = time.monotonic() - began
            if seconds > SECONDS and self.value < (seconds - SECONDS) * SLOWEST:
                raise UserError(f"{url} comes too slowly: {self.value:,} bytes in {seconds:.0f} s")

    return Watch()


def _version(url: str, info: dict[str, Any]) -> Version:
    if info.get("size") is None:
        raise UserError(f"the server does not tell how large {url} is, so a copy could not be known to be whole")
    return Version(int(info["size"]), next((str(info[tag]) for tag in (*_CONTENT, *_TIME) if info.get(tag)), ""))


def _tried(url: str, action: Callable[[], T], longest: float = float("inf")) -> T | None:
    """Return what an action returns, tried again after growing pauses for up to `longest` seconds.

    Returns:
        None if there is no such file.

    Raises:
        UserError: If the last try fails, or another one would be of no use.
    """
    began = time.monotonic()
    for tries, pause in enumerate((*PAUSES, None), 1):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # each storage raises errors of its own
            cause: BaseException = error
            if isinstance(error, FileNotFoundError) and _is_http(url):
                cause = error.__cause__ or error  # fsspec calls any trouble over http "not found"
            if isinstance(cause, UserError):  # raised in the client, such as for a redirect
                raise UserError(str(cause)) from None
            status = getattr(cause, "status", None)
            if status in (404, 410) or (isinstance(cause, FileNotFoundError) and status is None):
                return None
            reason = f"{type(cause).__name__}: {cause}".removesuffix(": ")
            if status in (401, 403) or isinstance(cause, PermissionError):
                raise NoAccessError(f"{url} may not be read: {reason}. Are the keys of this storage set?") from error
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"no space for a copy of {url}: {cause}. Lower --local-copy, or set XDG_CACHE_HOME to a larger disk"
                ) from error
            refused = isinstance(status, int) and 400 <= status < 500 and status not in _AGAIN
            over = pause is None or time.monotonic() - began > longest
            if over or refused or isinstance(cause, _FINAL):
                often = f", tried {tries} times" if tries > 1 and not refused else ""
                raise UserError(f"{url} cannot be read{often}: {reason}") from error
            assert pause is not None
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")
