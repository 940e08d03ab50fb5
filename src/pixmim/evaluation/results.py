"""Results of evaluations, and their JSON files."""

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

from pixmim.utils.console import csv_cell, utf8
from pixmim.utils.files import atomic_write, write_csv, write_json
from pixmim.utils.trust import inside


@dataclass(frozen=True)
class Result:
    """Values of one evaluation of one encoder, and what is needed to repeat it."""

    evaluation: str
    model: str
    encoder: str  # "trained" or "untrained"
    step: int  # training step of the weights
    settings: dict[str, Any]
    values: dict[str, float]  # values by name
    config: dict[str, Any]  # configuration that builds the encoder, with its training if that is known
    device: str
    precision: str
    versions: dict[str, str]
    data_digest: str = ""  # of the images' names with their labels, masks or boxes, which may change in the same place
    # Images by caption. In the JSON, names of PNG files in the same folder by caption.
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    # Path, class, group and part of each image, with a header, if labeled data were split. In the JSON, the name of a
    # CSV file in the same folder.
    split: list[list[str]] = field(default_factory=list)

    @property
    def split_file(self) -> str:
        """Name of the CSV file of `split`; empty without one."""
        return f"split-{sha256(repr(self.split).encode()).hexdigest()[:10]}.csv" if self.split else ""


def save(result: Result, folder: Path) -> Path:
    """Write a result to the folder's `evaluations/`; return the JSON file, which has null for values not finite."""
    path = result_file(folder, result.evaluation, result.encoder, result.settings, ".json")
    names, folder = {}, path.parent
    for caption, image in result.pictures.items():
        words = re.sub(r"[^a-z0-9]+", "-", caption.lower()).strip("-")[:40]
        names[caption] = f"{path.stem}-{words}.png"
        atomic_write(folder / names[caption], partial(image.save, format="PNG"))
    content = asdict(replace(result, pictures={}, split=[])) | {"pictures": names, "split": result.split_file}
    if result.split:
        write_csv(folder / result.split_file, (map(csv_cell, map(utf8, row)) for row in result.split))
    content["values"] = {key: value if value - value == 0 else None for key, value in result.values.items()}
    write_json(path, content)
    return path


def result_file(folder: Path, evaluation: str, encoder: str, settings: dict[str, Any], suffix: str) -> Path:
    """Return the file of an evaluation with these settings in the folder's `evaluations/`, which is created."""
    folder = inside(folder, "evaluations")
    folder.mkdir(parents=True, exist_ok=True)
    key = sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:10]
    return folder / f"{evaluation}-{encoder}-{key}{suffix}"


def versions() -> dict[str, str]:
    """Return the versions of pixmim, torch, timm and Python, and the commit if pixmim runs from a checkout."""
    checkout = Path(__file__).parents[3]
    found = {name: version(name) for name in ("pixmim", "torch", "timm")} | {"python": platform.python_version()}
    if not (checkout / ".git").exists():  # git would search parent folders and obey the configuration of any repository
        return found
    # Without the lock of the index, which a git that is killed at the time limit would leave behind.
    git = ["git", "--no-optional-locks", "-C", str(checkout), "describe", "--always", "--dirty"]
    with suppress(OSError, subprocess.SubprocessError):
        found["commit"] = subprocess.run(git, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    return found
