"""What the commands share: whole paths of data, and plain text."""

from rich.console import Console


def absolute(data: str) -> str:
    """Whole paths instead of relative ones, so that a run finds its data from wherever it is resumed or reported on."""
    from pixmim.data.spec import absolute as whole

    return whole(data)


def say(console: Console, text: str) -> None:
    """Print plain text as it is: no wrapped paths, no colours, no markup in names."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)
