"""Restrict what a run folder from elsewhere can open: only files inside it, and no data that its config names.

A run's config.json names paths and URLs. They are opened without confirmation only if this user created the run on this
machine: the hash of each config written here is stored in the user's cache directory. A stranger's config with the same
hash has the same text, so it names only what this user named before.
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


def trust_config(config: str) -> None:
    """Record that this user wrote a config, given as the text of config.json, on this machine."""
    marker = _marker(config)
    with suppress(OSError):  # without a cache directory, the user names the data again
        marker.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(marker, "")


def is_trusted(config: str) -> bool:
    """Return True if this user wrote this config on this machine."""
    return _marker(config).is_file()


def untrusted_references(config: str, references: Mapping[str, str]) -> dict[str, str]:
    """Return the references of a config's text that may not be opened, by flag; empty if the config is trusted.

    The references are the data and weights that it names, by flag, without those that the user typed.
    """
    external = {flag: value for flag, value in references.items() if value and not _is_synthetic(value)}
    return external if external and not is_trusted(config) else {}


def refusal(folder: str | Path, references: Mapping[str, str]) -> str:
    """Return a sentence that names the references of a folder's config that are not opened, as flags."""
    flags = " ".join(f"{flag} {shlex.quote(value)}" for flag, value in references.items())
    return f"{folder} was not made by you on this machine, so what its config names is not opened: {flags}"


def inside(folder: Path, name: str) -> Path:
    """Return the path of a file in an untrusted folder. Raises UserError if its name, or a link, leads out of it."""
    path = folder / name
    root = os.path.realpath(folder)  # Path.resolve raises if links form a loop
    try:
        target = os.path.realpath(path)
    except ValueError:  # a null byte
        target = ""
    if os.path.islink(target) or not Path(target).is_relative_to(root):  # still a link: a loop
        raise UserError(f"'{name}' leads out of {folder}: a folder's files must be inside it")
    return path


def _is_synthetic(data: str) -> bool:
    """Return True if every part of `shapes:count=9+shapes:count=3*2` is computed."""
    return all(re.fullmatch(r"shapes:[a-z0-9=,]*(\*[0-9]{1,3})?", part) for part in data.split("+"))


def _marker(config: str) -> Path:
    return cache_path("runs", hashlib.sha256(config.encode("utf-8", "surrogateescape")).hexdigest())
