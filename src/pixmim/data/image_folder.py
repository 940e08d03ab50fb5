"""Read images from files: all below a folder, or those that a text file or the caller names."""

import codecs
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt
from jaxtyping import Shaped

from pixmim.data.dataset import RGB, BadImage, ImageDataset, ImageSpec
from pixmim.data.decode.image import decode
from pixmim.data.decode.kinds import about_file, about_others
from pixmim.data.decode.limits import max_bytes
from pixmim.data.uri import split_root
from pixmim.transforms.crops import Array
from pixmim.utils.console import status_counter
from pixmim.utils.errors import UserError, did_you_mean
from pixmim.utils.files import read_file

MAX_LIST_BYTES, MAX_LINES = 2**30, 50_000_000
"""A text file that names images is refused if it has more."""

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".pgm", ".npy")
)


class PathList(Sequence[str]):
    """An immutable list of paths as one block of bytes: a path takes its own bytes and 5 (from 4 GiB on, 9) more.

    Args:
        paths: Paths without zero bytes, encoded as the file system does.
    """

    def __init__(self, paths: Iterable[bytes]) -> None:
        self._text = b"\0".join(chain(paths, [b""]))
        ends = np.flatnonzero(np.frombuffer(self._text, np.uint8) == 0)
        self._ends = ends.astype(np.min_scalar_type(len(self._text)))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start = int(self._ends[index - 1]) + 1 if index else 0
        return os.fsdecode(self._text[start : int(self._ends[index])])


class ImageFolder(ImageDataset):
    """Image files, in the order given.

    Args:
        spec: What the user wrote to get them.
        root: Folder that the paths start from.
        paths: Path of each image.
        form: Channels and dtype of the images.
        labels: Index into `classes` of each image (n).
        classes: Names of the classes.
        about: A note for the user on how the data are read.
    """

    def __init__(
        self,
        spec: str,
        root: Path,
        paths: Sequence[str],
        form: ImageSpec = RGB,
        labels: npt.NDArray[np.int64] | None = None,
        classes: Sequence[str] = (),
        about: str = "",
    ) -> None:
        super().__init__(spec, form, labels=labels, classes=classes, description=about)
        self._root, self._paths = "" if root == Path() else str(root), paths

    def __len__(self) -> int:
        return len(self._paths)

    def path_of(self, index: int) -> str:
        return os.path.join(self._root, self._paths[index])

    def extent(self, index: int) -> tuple[str, int, int]:
        """Return the file, first byte and number of bytes of an image; 0 bytes mean all that follow."""
        return self.path_of(index), 0, 0

    def read(self, index: int) -> bytes:
        """Return the content of a file. Raises BadImage."""
        try:
            return read_file(self.path_of(index), max_bytes())
        except (OSError, ValueError) as error:  # a name may hold what no file system takes, such as a zero byte
            raise BadImage(getattr(error, "strerror", None) or str(error)) from None

    def read_array(self, index: int) -> Shaped[Array, "h w c"]:
        return decode(self.read(index), self.image_spec)


def from_folder(folder: str | Path, form: ImageSpec = RGB) -> ImageFolder:
    """Open all images below a folder, in the byte order of their paths.

    Files are chosen by extension and decoded by content. Hidden files and folders are left out. Links are followed,
    each folder once. If every image is in a subfolder, the first-level subfolders are the classes.

    Raises:
        UserError: If there is no such folder, it cannot be read, or it holds no images.
    """
    root = Path(os.path.expanduser(folder))
    if not root.is_dir():
        raise UserError(_no_folder(root))
    try:
        found, counts, others, unreadable = _walk(root)
    except OSError as error:
        raise UserError(f"the folder {root} cannot be read: {error.strerror}") from error
    about = ""
    if unreadable:
        first = os.fsdecode(unreadable[0])
        about = f"folders that cannot be read, left out: {len(unreadable)}, such as {root / first}"
    if not found:
        content = f"{others} other files" if others else about or "nothing"
        kind = about_others(root) if others else ""
        raise UserError(
            f"no images in {root} (found {content}); known: {' '.join(sorted(EXTENSIONS))}" + f". {kind}" * bool(kind)
        )
    paths = PathList(found)
    if b"" in counts:
        files = ImageFolder(str(folder), root, paths, form, about=about)
        if len(counts) > 1:
            files.stray_file = files.path_of(next(i for i, path in enumerate(found) if b"/" not in path))
        return files
    tops = {os.fsdecode(top[:-1]): count for top, count in sorted(counts.items())}  # in the order of the paths
    classes = sorted(tops)
    number = {name: i for i, name in enumerate(classes)}
    labels = np.repeat(np.asarray([number[top] for top in tops], np.int64), list(tops.values()))
    return ImageFolder(str(folder), root, paths, form, labels, classes, about)


def _walk(root: Path) -> tuple[list[bytes], Counter[bytes], int, list[bytes]]:
    """Find the image files below a folder.

    A folder that several links lead to is read under the path that comes first in alphabetical order. A link with the
    extension of an image counts as an image without a look at its target, which would cost a `stat` for each.

    Returns:
        Paths relative to `root` in the order of their bytes, the number of images of each first-level folder (with a
        slash; empty for `root` itself), the number of other files, and the folders that cannot be read.

    Raises:
        OSError: If `root` itself cannot be read.
    """
    extensions = tuple(map(os.fsencode, EXTENSIONS))
    images: list[bytes] = []
    counts: Counter[bytes] = Counter()
    unreadable: list[bytes] = []
    seen: set[tuple[int, int]] = set()
    others, top, stack = 0, os.path.join(os.fsencode(root), b""), [b""]
    with status_counter(f"listing {root}", "images") as add:
        while stack:
            folder = stack.pop()
            names: list[bytes] = []
            subfolders: list[bytes] = []
            rest = 0
            try:
                status = os.stat(top + folder)
                if (status.st_dev, status.st_ino) in seen:  # a link back up, or to a folder met before
                    continue
                seen.add((status.st_dev, status.st_ino))
                with os.scandir(top + folder) as entries:
                    for entry in entries:
                        name = entry.name
                        if name.startswith(b"."):
                            continue
                        is_folder = entry.is_dir(follow_symlinks=False)
                        if not is_folder and name.lower().endswith(extensions):
                            names.append(folder + name)
                            if not len(names) % 4096:  # `add` looks at the clock
                                add(4096)
                        elif is_folder or (entry.is_symlink() and os.path.isdir(entry.path)):
                            subfolders.append(folder + name)
                        else:
                            rest += 1
            except OSError as error:
                if not folder:
                    raise
                if not isinstance(error, FileNotFoundError | NotADirectoryError):  # these vanished meanwhile
                    unreadable.append(folder)
                continue
            add(len(names) % 4096)
            if names:
                images += sorted(names)  # runs, which make the sort below fast
                counts[folder[: folder.find(b"/") + 1]] += len(names)
            others += rest
            stack += [path + b"/" for path in sorted(subfolders, reverse=True)]
    images.sort()
    return images, counts, others, unreadable


def from_paths(paths: Sequence[str | Path], form: ImageSpec = RGB) -> ImageFolder:
    """Open the images named, and all below the folders named. Raises UserError for a path that does not exist."""
    found: list[str] = []
    for path in (Path(os.path.expanduser(path)) for path in paths):
        if path.is_dir():
            files = from_folder(path, form)
            found += map(files.path_of, range(len(files)))
        elif path.is_file():
            found.append(str(path))
        else:
            raise UserError(f"there is no {path}")
    return ImageFolder(" ".join(map(str, paths)), Path(), PathList(map(os.fsencode, found)), form)


def from_list_file(spec: str | Path, form: ImageSpec = RGB) -> ImageFolder:
    """Open the images that a text file names, one in a line, from the text file's folder on.

    They are below that folder, or below FOLDER if the spec is `LIST.txt,root=FOLDER`.

    Raises:
        UserError: If it cannot be read, names no image, or names one elsewhere.
    """
    path, root = split_root(str(spec))
    text = Path(os.path.expanduser(path))
    try:
        lines = read_file(text, MAX_LIST_BYTES)
    except OSError as error:
        raise UserError(f"{text} cannot be read: {error.strerror}") from error
    for mark, coding in ((codecs.BOM_UTF8, ""), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")):
        if lines.startswith(mark):
            try:
                lines = lines.decode(coding).encode() if coding else lines.removeprefix(mark)
            except UnicodeError as error:
                raise UserError(f"{text} begins as UTF-16 and is not: {error}") from None
    if lines.count(b"\n") > MAX_LINES:
        raise UserError(f"{text} has more than {MAX_LINES:,} lines: put the images into a cache or into tars")
    if b"\0" in lines:
        raise UserError(f"{text} is not a text file: it holds a zero byte. Save it as UTF-8")
    lines = _trimmed(lines, text.parent)
    paths = PathList(line for line in lines.replace(b"\r\n", b"\n").split(b"\n") if line.strip())
    if not paths:
        raise UserError(f"{text} names no images")
    folders = [text.parent] if root is None else [text.parent, root]
    tops = b"|".join(re.escape(os.fsencode(os.path.join(os.path.abspath(folder), ""))) for folder in folders)
    odd = re.compile(rb"(?m)^(?:(?=/)(?!" + tops + rb").*|.*\.\..*)$")  # all other lines plainly stay below a folder
    names: Iterable[str] = paths
    if os.sep == "/":
        names = (os.fsdecode(match[0].removesuffix(b"\r")) for match in odd.finditer(lines))
    check_inside(names, folders, str(text), len(paths), f"--data '{path},root=FOLDER' allows those below a folder")
    return ImageFolder(str(spec), text.parent, paths, form)


def _trimmed(lines: bytes, folder: Path) -> bytes:
    """Leave out blanks at the ends of lines, but of names that are there with them."""
    if not re.search(rb"(?m)^[ \t]|[ \t]\r?$", lines):
        return lines
    return b"\n".join(
        line if (bare := line.strip(b" \t\r")) == line or (bare and _is_there(folder, line)) else bare
        for line in lines.split(b"\n")
    )


def _is_there(folder: Path, line: bytes) -> bool:
    try:
        return os.path.exists(os.path.join(os.fsencode(folder), line.removesuffix(b"\r")))
    except ValueError:
        return False


def check_inside(names: Iterable[str], folders: Sequence[Path], source: str, total: int, way_out: str) -> None:
    """Check that names of files, written by anybody, stay below folders; the first is where relative names begin.

    As everywhere in a folder of images, links inside it are followed, so a name without `..` is taken as it is written.

    Raises:
        UserError: If any leads out, with the first one, how many of the `total` do, and the `way_out`.
    """
    tops = tuple(os.path.join(os.path.abspath(folder), "") for folder in folders)
    real = tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)

    @lru_cache(maxsize=1024)
    def from_folder(folder: str) -> bool:
        return os.path.join(os.path.realpath(folder), "").startswith(real)

    def inside(path: str) -> bool:
        folder, file = os.path.split(path)
        return from_folder(path if file in ("", ".", "..") else folder)

    count, first = 0, ""
    for name in names:
        plain = ".." not in name and (name.startswith(tops) or not os.path.isabs(name))
        if not _is_name(name) or not (plain or inside(os.path.join(tops[0], name))):
            count, first = count + 1, first or name
    if count:
        raise UserError(
            f"{count:,} of the {total:,} paths in {source} lead out of {' and '.join(map(str, folders))}, such as "
            f"{first!r}: {way_out}"
        )


def _is_name(name: str) -> bool:
    """Return True if a file can have this name."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def _no_folder(root: Path) -> str:
    if root.exists():
        return f"{root} {about_file(root)}. Data are a folder of images, a cache, tars, or a .txt that names images"
    siblings = [path.name for path in root.parent.iterdir() if path.is_dir()] if root.parent.is_dir() else []
    return f"there is no folder {root}{did_you_mean(root.name, siblings)}"
