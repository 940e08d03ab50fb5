"""Picture files: those below a folder, searched through all its subfolders, or those that were named."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Shaped
from torch import Tensor

from pixmim.data.decode import decode
from pixmim.data.limits import check_bytes
from pixmim.data.source import COLOUR, BadImage, Form, Source, of_places
from pixmim.errors import UserError, nearest

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm", ".npy")
)


class Files(Source):
    """Picture files at `root` / path, in the order given; `labels` are indices into `classes`."""

    def __init__(
        self,
        spec: str,
        root: Path,
        paths: Sequence[str],
        form: Form = COLOUR,
        labels: npt.NDArray[np.int64] | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        self._spec, self._root, self._paths, self._form = spec, root, paths, form
        self._labels, self._classes = labels, list(classes)

    @property
    def spec(self) -> str:
        return self._spec

    @property
    def form(self) -> Form:
        return self._form

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        return self._labels

    @property
    def classes(self) -> list[str]:
        return self._classes

    @property
    def about(self) -> str:
        return ""

    @property
    def sizes(self) -> npt.NDArray[np.int64] | None:
        return None

    @property
    def pieces(self) -> npt.NDArray[np.int64] | None:
        return None

    def soon(self, pieces: Sequence[int]) -> None:
        pass

    def __len__(self) -> int:
        return len(self._paths)

    def locate(self, index: int) -> str:
        return str(self._root / self._paths[index])

    def fingerprint(self) -> str:
        return of_places(self)

    def read(self, index: int) -> bytes:
        """What is in a file. Raises BadImage."""
        try:
            with open(self._root / self._paths[index], "rb") as file:
                check_bytes(os.fstat(file.fileno()).st_size)
                return file.read()
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from None

    def image(self, index: int) -> Shaped[Tensor, "c h w"]:
        pixels = decode(self.read(index), self._form)
        writable = pixels if pixels.flags.writeable else pixels.copy()
        return torch.from_numpy(writable).permute(2, 0, 1)  # a view in channels-last memory, fast to resize


def below(folder: str | Path, form: Form = COLOUR) -> Files:
    """All pictures below a folder, in the order of their paths.

    Files are chosen by extension and decoded by content; hidden files and folders are left out; links are followed,
    each folder once. If every picture lies in a subfolder, the first-level subfolders are its classes. Raises
    UserError if there is no such folder or no picture in it.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(_no_folder(root))
    paths, others = _list_pictures(root)
    if not paths:
        found = f"{others} other files" if others else "nothing"
        raise UserError(f"no pictures in {root} (found {found}); known: {' '.join(sorted(EXTENSIONS))}")
    tops = [path.split(os.sep, 1)[0] for path in paths if os.sep in path]
    if len(tops) < len(paths):
        return Files(str(folder), root, paths, form)
    classes = sorted(set(tops))
    number = {name: i for i, name in enumerate(classes)}
    labels = np.asarray([number[top] for top in tops], np.int64)
    return Files(str(folder), root, paths, form, labels, classes)


def named(paths: Sequence[str | Path], form: Form = COLOUR) -> Files:
    """The pictures named, and all below the folders named. Raises UserError for what is not there."""
    found: list[str] = []
    for path in (Path(path).expanduser() for path in paths):
        if path.is_dir():
            files = below(path, form)
            found += [files.locate(i) for i in range(len(files))]
        elif path.is_file():
            found.append(str(path))
        else:
            raise UserError(f"there is no {path}")
    return Files(" ".join(map(str, paths)), Path(), found, form)


def listed(path: str | Path, form: Form = COLOUR) -> Files:
    """The pictures that a text file names, one in a line, from the text file's folder on. Raises UserError."""
    text = Path(path).expanduser()
    try:
        names = [line for line in text.read_text("utf-8", "surrogateescape").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"{text} cannot be read: {error.strerror}") from error
    if not names:
        raise UserError(f"{text} names no pictures")
    return Files(str(path), text.parent, names, form)


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
        return f"{root} is a file; --data takes a folder of images, a cache, or a .txt that names images"
    siblings = [path.name for path in root.parent.iterdir() if path.is_dir()] if root.parent.is_dir() else []
    return f"there is no folder {root}{nearest(root.name, siblings)}"
