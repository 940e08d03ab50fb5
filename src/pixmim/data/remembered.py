"""Where things that were found out about data are kept for the next time: the user's cache directory."""

import hashlib
import os
from pathlib import Path


def place(kind: str, key: str) -> Path:
    """The path, without a suffix, for what is known of `key`; the folder of its kind need not be there yet.

    It lies in $XDG_CACHE_HOME/pixmim, or ~/.cache/pixmim, and all of that may be removed at any time.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    home = base if base.is_absolute() else Path("~/.cache").expanduser()
    return home / "pixmim" / kind / hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()[:32]
