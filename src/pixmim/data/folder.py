"""A folder of images, searched through all its subfolders; the first subfolder names the class."""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import UInt8
from torch import Tensor

from pixmim.data.decode import decode
from pixmim.data.source import BadImage, Source
from pixmim.errors import UserError, nearest

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm")
)


class Folder(Source):
    """All pictures below a folder, in the order of their paths.

    Files are chosen by extension and decoded by content; hidden files and folders are left out; links are followed,
    each folder once. If every picture lies in a subfolder, the first-level subfolders are its classes. Raises
    UserError if there is no such folder or no picture in it.
    """

    def __init__(self, root: str | Path, channels: int = 3) -> None:
        self.root = Path(root).expanduser()
        self._spec = str(root)
        self._channels = channels
        if not self.root.is_dir():
            raise UserError(_no_folder(self.root))
        self._paths, others = _list_pictures(self.root)
        if not self._paths:
            found = f"{others} other files" if others else "nothing"
            raise UserError(f"no pictures in {self.root} (found {found}); known: {' '.join(sorted(EXTENSIONS))}")
        tops = [path.split(os.sep, 1)[0] if os.sep in path else None for path in self._paths]
        self._classes: list[str] = []
        self._labels: npt.NDArray[np.int64] | None = None
        if None not in tops:
            self._classes = sorted({top for top in tops if top is not None})
            number = {name: i for i, name in enumerate(self._classes)}
            self._labels = np.asarray([number[top] for top in tops if top is not None], np.int64)

    @property
    def spec(self) -> str:
        return self._spec

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        return self._labels

    @property
    def classes(self) -> list[str]:
        return self._classes

    def __len__(self) -> int:
        return len(self._paths)

    def locate(self, index: int) -> str:
        return str(self.root / self._paths[index])

    def image(self, index: int) -> UInt8[Tensor, "c h w"]:
        try:
            data = (self.root / self._paths[index]).read_bytes()
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from None
        pixels = decode(data, self._channels)
        writable = pixels if pixels.flags.writeable else pixels.copy()
        return torch.from_numpy(writable).permute(2, 0, 1)  # a view in channels-last memory, fast to resize


def _list_pictures(root: Path) -> tuple[list[str], int]:
    """Paths relative to `root` of all pictures, sorted, and the number of other files."""
    pictures: list[str] = []
    others = 0
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back up
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        relative = os.path.relpath(folder, root)
        for name in names:
            if name.startswith("."):
                continue
            if os.path.splitext(name)[1].lower() in EXTENSIONS:
                pictures.append(name if relative == "." else os.path.join(relative, name))
            else:
                others += 1
    return sorted(pictures), others


def _no_folder(root: Path) -> str:
    if root.exists():
        return f"{root} is a file; --data takes a folder of images"
    siblings = [path.name for path in root.parent.iterdir() if path.is_dir()] if root.parent.is_dir() else []
    return f"there is no folder {root}{nearest(root.name, siblings)}"
