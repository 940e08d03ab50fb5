"""Files that lie far away (http, s3, gs, hf, ...), through fsspec; what fails for a while is tried again.

How a storage is reached (keys, endpoints, anonymous access) is fsspec's matter: its own variables and files say so.
"""

import errno
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pixmim.data.shelf import Version
from pixmim.errors import UserError

T = TypeVar("T")

PAUSES = (1, 2, 4, 8, 16, 32, 64)
"""Seconds between tries; a server has two minutes to come back."""

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


def read(url: str) -> bytes | None:
    """All of a small file; None if there is none. Raises UserError."""
    files, path = _files(url)
    content: bytes | None = _tried(url, lambda: files.cat_file(path))
    return content


def version(url: str) -> Version | None:
    """A file's size and tag, asked for now; None if there is no such file. Raises UserError."""
    files, path = _files(url)
    info: dict[str, Any] | None = _tried(url, lambda: files.info(path))
    return None if info is None else _version(url, info)


def matching(pattern: str) -> dict[str, Version | None]:
    """The files that a pattern with `*` or `[...]` fits, sorted; with their versions where the listing tells them."""
    files, path = _files(pattern)
    found: dict[str, dict[str, Any]] = _tried(pattern, lambda: files.glob(path, detail=True)) or {}
    names = {str(files.unstrip_protocol(name)): info for name, info in sorted(found.items()) if info["type"] == "file"}
    # Times are written differently in a list and for one file, so those are asked for one by one.
    told = {name for name, info in names.items() if info.get("size") and any(info.get(tag) for tag in _CONTENT)}
    return {name: _version(name, info) if name in told else None for name, info in names.items()}


def read_part(url: str, of: Version, offset: int, length: int) -> bytes | None:
    """Some bytes of a file of a known version; None if the server hands out nothing but whole files.

    Raises UserError. That the file has not changed since is not looked after.
    """
    files, path = _files(url)

    def once() -> tuple[bytes | None]:
        if url.lower().startswith("http"):  # where asking for a part may begin to send the whole, which this notices
            with files.open(path, "rb", cache_type="none", size=of.size) as file:
                file.seek(offset)
                try:
                    data = file.read(length)
                except ValueError:
                    return (None,)
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
    """Copy a file whole. Raises UserError if it cannot be had, or is of another version than wanted."""
    files, path = _files(url)

    def once() -> bool:
        found = version(url)
        if found is not None and not wanted.fits(found):
            raise UserError(f"{url} has changed on the server since the places in it were listed: start again")
        files.get_file(path, str(to))
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
            from aiohttp import ClientTimeout

            # No bound on the whole of a large file, but on silence. Compressed on the way, a file has no known size.
            patience = ClientTimeout(total=None, sock_connect=30, sock_read=60)
            options |= {"client_kwargs": {"timeout": patience, "trust_env": True}}
            options |= {"headers": {"Accept-Encoding": "identity"}}
        files, path = url_to_fs(url, **options)
        return files, str(path)
    except ImportError as error:
        package = _PACKAGES.get(protocol, "")
        help_ = f"pip install {package}" if package else str(error)
        raise UserError(f"{protocol}:// is read through fsspec and a package that is not installed: {help_}") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}. Known are http, https, s3, gs, az, hf and what else fsspec reads") from error


def _version(url: str, info: dict[str, Any]) -> Version:
    if info.get("size") is None:
        raise UserError(f"the server does not tell how large {url} is, so a copy could not be known to be whole")
    return Version(int(info["size"]), next((str(info[tag]) for tag in (*_CONTENT, *_TIME) if info.get(tag)), ""))


def _tried(url: str, action: Callable[[], T]) -> T | None:
    """What an action gives, tried again after growing pauses; None if there is no such file. Raises UserError."""
    for pause in (*PAUSES, None):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # each storage raises errors of its own
            cause: BaseException = error
            if isinstance(error, FileNotFoundError) and url.lower().startswith("http"):
                cause = error.__cause__ or error  # fsspec calls any trouble over http "not found"
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
            if pause is None or refused or isinstance(cause, _FINAL):
                tries = "" if refused else f", tried {len(PAUSES) + 1} times"
                raise UserError(f"{url} cannot be read{tries}: {reason}") from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")
