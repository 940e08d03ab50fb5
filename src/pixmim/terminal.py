"""What is said to a person at a terminal."""

from rich.console import Console


def say(console: Console, text: str) -> None:
    """Print plain text as it is: no wrapped paths, no colours, no markup in names."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)
