"""Picture files: those below a folder, searched through all its subfolders, or those that were named."""

import codecs
import os
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from jaxtyping import Shaped

from pixmim.data.dataset import COLOUR, BadImage, Form, Source
from pixmim.data.decode.image import decode
from pixmim.data.decode.kinds import about_file, about_others
from pixmim.data.decode.limits import max_bytes
from pixmim.data.folders.listing import list_pictures
from pixmim.data.folders.paths import Paths
from pixmim.data.uri import split_root
from pixmim.transforms.crops import Array
from pixmim.utils.errors import UserError, nearest
from pixmim.utils.files import read_file

MAX_LIST_BYTES, MAX_LINES = 2**30, 50_000_000
"""A text file that names images is refused if it has more."""

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
        about: str = "",
    ) -> None:
        super().__init__(spec, form, labels=labels, classes=classes, about=about)
        self._root, self._paths = "" if root == Path() else str(root), paths

    def __len__(self) -> int:
        return len(self._paths)

    def locate(self, index: int) -> str:
        return os.path.join(self._root, self._paths[index])

    def extent(self, index: int) -> tuple[str, int, int]:
        """Where an image's bytes lie: file, first byte, number of bytes (0: all that follow)."""
        return self.locate(index), 0, 0

    def read(self, index: int) -> bytes:
        """What is in a file. Raises BadImage."""
        try:
            return read_file(self.locate(index), max_bytes())
        except (OSError, ValueError) as error:  # a name may hold what no file system takes, such as a zero byte
            raise BadImage(getattr(error, "strerror", None) or str(error)) from None

    def array(self, index: int) -> Shaped[Array, "h w c"]:
        return decode(self.read(index), self.form)


def below(folder: str | Path, form: Form = COLOUR) -> Files:
    """All pictures below a folder, in the order of their paths.

    Files are chosen by extension and decoded by content; hidden files and folders are left out; links are followed,
    each folder once. If every picture lies in a subfolder, the first-level subfolders are its classes. What a large
    folder holds is kept for next time (`listing.py`). Raises UserError if there is no such folder, it cannot be read,
    or there is no picture in it.
    """
    root = Path(os.path.expanduser(folder))
    if not root.is_dir():
        raise UserError(_no_folder(root))
    try:
        listing = list_pictures(root, EXTENSIONS)
    except OSError as error:
        raise UserError(f"the folder {root} cannot be read: {error.strerror}") from error
    paths, closed = listing.paths, listing.closed
    about = f"folders that cannot be read, left out: {len(closed)}, such as {root / closed[0]}" if closed else ""
    if not paths:
        found = f"{listing.others} other files" if listing.others else about or "nothing"
        kind = about_others(root) if listing.others else ""
        raise UserError(
            f"no pictures in {root} (found {found}); known: {' '.join(sorted(EXTENSIONS))}" + f". {kind}" * bool(kind)
        )
    runs = list(paths.runs())
    tops = [inside.split("/", 1)[0] for inside, _ in runs]
    if "" in tops:
        files = Files(str(folder), root, paths, form, about=about)
        if len(set(tops)) > 1:
            files.stray = files.locate(sum(count for _, count in runs[: tops.index("")]))
        return files
    classes = sorted(set(tops))
    number = {name: i for i, name in enumerate(classes)}
    labels = np.repeat(np.asarray([number[top] for top in tops], np.int64), [count for _, count in runs])
    return Files(str(folder), root, paths, form, labels, classes, about)


def named(paths: Sequence[str | Path], form: Form = COLOUR) -> Files:
    """The pictures named, and all below the folders named. Raises UserError for what is not there."""
    found: list[str] = []
    for path in (Path(os.path.expanduser(path)) for path in paths):
        if path.is_dir():
            files = below(path, form)
            found += map(files.locate, range(len(files)))
        elif path.is_file():
            found.append(str(path))
        else:
            raise UserError(f"there is no {path}")
    return Files(" ".join(map(str, paths)), Path(), Paths.of(found), form)


def listed(spec: str | Path, form: Form = COLOUR) -> Files:
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
    paths = Paths.from_lines(lines)
    if not paths:
        raise UserError(f"{text} names no pictures")
    folders = [text.parent] if root is None else [text.parent, root]
    tops = b"|".join(re.escape(os.fsencode(os.path.join(os.path.abspath(folder), ""))) for folder in folders)
    odd = re.compile(rb"(?m)^(?:(?=/)(?!" + tops + rb").*|.*\.\..*)$")  # all other lines plainly stay below a folder
    names: Iterable[str] = paths
    if os.sep == "/":
        names = (os.fsdecode(match[0].removesuffix(b"\r")) for match in odd.finditer(lines))
    check_inside(names, folders, str(text), len(paths), f"--data '{path},root=FOLDER' allows those below a folder")
    return Files(str(spec), text.parent, paths, form)


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
    def below(folder: str) -> bool:
        return os.path.join(os.path.realpath(folder), "").startswith(real)

    def inside(path: str) -> bool:
        folder, file = os.path.split(path)
        return below(path if file in ("", ".", "..") else folder)

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
    return f"there is no folder {root}{nearest(root.name, siblings)}"
