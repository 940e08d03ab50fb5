"""The one contract of evaluations: a function of (context, settings) yields named values; they end here, in JSON."""

import json
import platform
import re
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image

from pixmim.utils.files import atomic_write, write_text_atomically
from pixmim.utils.trust import inside


@dataclass(frozen=True)
class Result:
    """Values of one evaluation of one encoder, what it drew, and what it takes to repeat it."""

    evaluation: str
    model: str
    encoder: str
    """"trained" or "untrained"."""
    step: int
    settings: dict[str, Any]
    values: dict[str, float]
    config: dict[str, Any]
    """The Run that builds the encoder, and trained it if it is pixmim's."""
    device: str
    precision: str
    versions: dict[str, str]
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    """Pictures by caption; in the JSON, names of PNG files beside it by caption."""


def save(result: Result, folder: Path) -> Path:
    """Write a result into a folder's `evaluations/`, in place of an older one of the same settings.

    Numbers that are not finite become null.
    """
    folder = inside(folder, "evaluations")
    folder.mkdir(parents=True, exist_ok=True)
    key = sha256(json.dumps(result.settings, sort_keys=True, default=str).encode()).hexdigest()[:10]
    path = folder / f"{result.evaluation}-{result.encoder}-{key}.json"
    names = {}
    for caption, picture in result.pictures.items():
        words = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:40]
        names[caption] = f"{path.stem}-{words}.png"
        atomic_write(folder / names[caption], partial(picture.save, format="PNG"))
    content = asdict(replace(result, pictures={})) | {"pictures": names}
    content["values"] = {key: value if value - value == 0 else None for key, value in result.values.items()}
    write_text_atomically(path, json.dumps(content, indent=2) + "\n")
    return path


def versions() -> dict[str, str]:
    """Versions of what computes, and the commit if pixmim runs from a checkout."""
    checkout = Path(__file__).parents[3]
    found = {name: version(name) for name in ("pixmim", "torch", "timm")} | {"python": platform.python_version()}
    git = ["git", "--no-optional-locks", "-C", str(checkout), "describe", "--always", "--dirty"]
    if not (checkout / ".git").exists():  # git would look further up, and obey what a stranger's repository configures
        return found
    with suppress(OSError, subprocess.SubprocessError):
        found["commit"] = subprocess.run(git, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    return found
