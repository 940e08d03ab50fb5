"""Files near or far: what differs between this machine's file system and a URL, in one place."""

import errno
import stat
from collections.abc import Sequence
from glob import glob
from pathlib import Path

from pixmim.data.shards import fsspec_io as remote
from pixmim.data.shards.local import Near, Shelf, Version
from pixmim.data.shards.remote import Far
from pixmim.utils.errors import UserError
from pixmim.utils.files import MAX_TEXT_BYTES, read_file


def read(name: str, limit: int = MAX_TEXT_BYTES) -> bytes | None:
    """Read a small file.

    Returns:
        Its content, or None if there is no such file.

    Raises:
        UserError: If it cannot be read, is not a regular file, or is larger than `limit` bytes.
    """
    if remote.is_far(name):
        return remote.read(name, limit)
    try:
        return read_file(name, limit)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):  # the last one: a pattern
            return None
        raise UserError(f"{name} cannot be read: {error.strerror}") from error


def version(name: str) -> Version | None:
    """Return a file's size and tag, or None if there is no such file.

    Raises:
        UserError: If the server cannot be asked, or it is not a regular file.
    """
    if remote.is_far(name):
        return remote.version(name)
    try:
        status = Path(name).stat()
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{name} is not a regular file")
    return Version(status.st_size, str(status.st_mtime_ns))


def matching(pattern: str) -> dict[str, Version | None]:
    """The files that a pattern with `*` or `[...]` fits, sorted; with their versions where that costs nothing."""
    if remote.is_far(pattern):
        return remote.matching(pattern)
    return dict.fromkeys(sorted(name for name in glob(pattern) if Path(name).is_file()))


def shelf(names: Sequence[str], versions: Sequence[Version], local_copy: float) -> Shelf:
    """Tars, all near or all far; of far ones at most `local_copy` GiB are copied. Raises UserError for a mixture."""
    far = sum(map(remote.is_far, names))
    if far not in (0, len(names)):
        raise UserError(f"{far} of {len(names)} shards are far away, and the others are not: name them apart")
    return Far(names, versions, local_copy) if far else Near(names, versions)
