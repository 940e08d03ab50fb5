"""What a run folder from elsewhere may touch: files inside itself, and no data that it names.

A run's config.json names paths and URLs. They are opened without asking only if this user made the run on this machine:
the hash of each configuration written here is kept in the user's cache directory. A stranger's configuration with the
same hash is the same text, so it names nothing that this user did not name before.
"""

import hashlib
from contextlib import suppress
from pathlib import Path

from pixmim.disk import cache_path, write_whole
from pixmim.errors import UserError


def remember_run(config: str) -> None:
    """Remember that this configuration (the text of a config.json) was written here, by this user."""
    marker = _marker(config)
    with suppress(OSError):  # without a cache directory, the person names the data again
        marker.parent.mkdir(parents=True, exist_ok=True)
        write_whole(marker, "")


def made_here(config: str) -> bool:
    """Return True if this user wrote this configuration on this machine."""
    return _marker(config).is_file()


def inside(folder: Path, name: str) -> Path:
    """Return the path of the file `name` of an untrusted folder.

    Raises:
        UserError: If the name, or a symbolic link on the way, leads out of the folder.
    """
    path = folder / name
    try:
        within = "\0" not in name and path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # a loop of links
        within = False
    if not within:
        raise UserError(f"'{name}' leads out of {folder}: a folder's files must be inside it")
    return path


def _marker(config: str) -> Path:
    return cache_path("runs", hashlib.sha256(config.encode("utf-8", "surrogateescape")).hexdigest())
