"""Tar shards of small images."""

import io
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image


def picture(value: int, kind: str = "PNG") -> bytes:
    """Encode an image with color and size that identify `value`."""
    buffer = io.BytesIO()
    Image.new("RGB", (20 + value, 30), (value, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def write(path: Path, files: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            if name.endswith("/"):
                member.type = tarfile.DIRTYPE
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def shard(path: Path, values: range, labels: bool = True) -> Path:
    files = []
    for v in values:
        files.append((f"{v:04d}.png", picture(v)))
        if labels:
            files.append((f"{v:04d}.cls", f"{v % 3}\n".encode()))
    return write(path, files)


def colors(data: Any) -> list[int]:
    return [int(data.image(i)[0, 0, 0]) for i in range(len(data))]


def keys(data: Any) -> list[str]:
    return [data.path_of(i).rsplit(":", 1)[1] for i in range(len(data))]
