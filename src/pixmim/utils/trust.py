"""What a run folder from elsewhere may touch: files inside itself, and no data that it names.

A run's config.json names paths and URLs. They are opened without asking only if this user made the run on this machine:
the hash of each configuration written here is kept in the user's cache directory. A stranger's configuration with the
same hash is the same text, so it names nothing that this user did not name before.
"""

import hashlib
import os
import re
import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pixmim.utils.errors import UserError
from pixmim.utils.files import cache_path, write_text_atomically


def remember_run(config: str) -> None:
    """Remember that this configuration (the text of a config.json) was written here, by this user."""
    marker = _marker(config)
    with suppress(OSError):  # without a cache directory, the person names the data again
        marker.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(marker, "")


def made_here(config: str) -> bool:
    """Return True if this user wrote this configuration on this machine."""
    return _marker(config).is_file()


def closed(config: str, named: Mapping[str, str]) -> dict[str, str]:
    """Return what a configuration names and may not be opened, by flag; empty if this user wrote it here.

    Args:
        config: The text of a config.json.
        named: The data and weights that it names, by flag (`Run.named`), without those that the person has typed.
    """
    strange = {flag: value for flag, value in named.items() if value and not _is_drawn(value)}
    return strange if strange and not made_here(config) else {}


def refusal(folder: str | Path, names: Mapping[str, str]) -> str:
    """Return the sentence that says why what a configuration names is not opened."""
    listed = " ".join(f"{flag} {shlex.quote(value)}" for flag, value in names.items())
    return f"{folder} was not made by you on this machine, so what it names is not opened: {listed}"


def inside(folder: Path, name: str) -> Path:
    """Return the path of the file `name` of an untrusted folder.

    Raises:
        UserError: If the name, or a symbolic link on the way, leads out of the folder.
    """
    path = folder / name
    root = os.path.realpath(folder)  # Path.resolve raises over links that form a loop
    try:
        real = os.path.realpath(path)
    except ValueError:  # a zero byte, or what no name of a file can be
        real = ""
    if os.path.islink(real) or not Path(real).is_relative_to(root):  # still a link: a loop
        raise UserError(f"'{name}' leads out of {folder}: a folder's files must be inside it")
    return path


def _is_drawn(data: str) -> bool:
    """Return True if data are computed: every part of `shapes:count=9+shapes:count=3*2` is."""
    return all(re.fullmatch(r"shapes:[a-z0-9=,]*(\*[0-9]{1,3})?", part) for part in data.split("+"))


def _marker(config: str) -> Path:
    return cache_path("runs", hashlib.sha256(config.encode("utf-8", "surrogateescape")).hexdigest())
