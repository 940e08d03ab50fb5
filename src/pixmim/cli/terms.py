"""What the commands share: a folder's whole path, and plain text."""

from pathlib import Path

from rich.console import Console


def absolute(data: str) -> str:
    """A folder's whole path, so that a run finds its data from wherever it is resumed or reported on."""
    return data if not data or data.startswith("shapes:") else str(Path(data).expanduser().resolve())


def say(console: Console, text: str) -> None:
    """Print plain text as it is: no wrapped paths, no colours, no markup in names."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)
