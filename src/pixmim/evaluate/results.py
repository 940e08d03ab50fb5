"""The one contract of evaluations: a function of (encoder's features, settings) yields named values; they end here."""

import json
import os
import platform
import re
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path


@dataclass(frozen=True)
class Result:
    """Values of one evaluation of one encoder, and what it takes to repeat it."""

    evaluation: str
    encoder: str
    """"trained" or "untrained"."""
    step: int
    train: str
    test: str
    values: dict[str, float]
    versions: dict[str, str]


def save(result: Result, folder: Path) -> Path:
    """Write a result into the run's `evaluations/`; the same evaluation on the same data replaces the one before."""
    folder = folder / "evaluations"
    folder.mkdir(exist_ok=True)
    data = re.sub(r"[^A-Za-z0-9]+", "-", result.test).strip("-")[-60:]
    path = folder / f"{result.evaluation}-{result.encoder}-{data}.json"
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(asdict(result), indent=2) + "\n")
    os.replace(beside, path)
    return path


def versions() -> dict[str, str]:
    """Versions of what computes, and the commit if pixmim runs from a checkout."""
    here = Path(__file__).parent
    found = {name: version(name) for name in ("pixmim", "torch", "timm")} | {"python": platform.python_version()}
    git = ["git", "-C", str(here), "describe", "--always", "--dirty"]
    with suppress(OSError, subprocess.SubprocessError):
        found["commit"] = subprocess.run(git, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    return found
