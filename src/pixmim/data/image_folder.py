"""Images in files: all below a folder, or those that a text file or the caller lists."""

import codecs
import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jaxtyping import Shaped

from pixmim.data.dataset import RGB, BadImage, Extent, ImageDataset, ImageSpec
from pixmim.data.decode.image import decode
from pixmim.data.decode.kinds import describe_file, describe_first_file
from pixmim.data.decode.limits import max_bytes
from pixmim.data.uri import read_options, read_root, split_options
from pixmim.transforms.crops import Array
from pixmim.utils.console import status_counter
from pixmim.utils.errors import UserError, did_you_mean
from pixmim.utils.files import read_file, readable

MAX_LIST_BYTES, MAX_LINES = 2**30, 50_000_000
"""Bounds of a text file that lists images."""

IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif", "ppm", "pgm"),
    *("jpe", "jfif", "npy", "dcm"),
)
"""Of several images in one sample of a tar, the first in this order is used."""

_BLOCK = 100_000  # paths that are separate objects while a list is made

EXTENSIONS = frozenset(f".{extension}" for extension in IMAGE_EXTENSIONS)

UNSUPPORTED_EXTENSIONS = (
    *(".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".jpf", ".tga", ".psd", ".xcf", ".svg", ".exr", ".hdr"),
    *(".dng", ".nef", ".cr2", ".cr3", ".arw", ".orf", ".raf", ".rw2", ".pef"),
    *(".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".mrc", ".fits", ".czi", ".nd2", ".lif", ".oib", ".svs", ".ndpi"),
)
"""Extensions of image formats that are not read. Such files are left out and counted."""

_BYTE_ORDER_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


class PathList(Sequence[str]):
    """An immutable list of paths in one block of memory: 5 bytes per path in addition to its own (9 above 4 GiB).

    Args:
        paths: Paths without zero bytes, encoded as the file system does. An iterator is consumed in blocks, so that
            its objects, which are three times as large, do not exist at the same time.

    Attributes:
        text: The paths, with a zero byte after each.
    """

    def __init__(self, paths: Iterable[bytes]) -> None:
        self.text, paths = bytearray(), iter(paths)
        while block := list(islice(paths, _BLOCK)):
            self.text += b"\0".join(block) + b"\0"
        ends = np.flatnonzero(np.frombuffer(self.text, np.uint8) == 0)
        self._ends = ends.astype(np.min_scalar_type(len(self.text)))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:  # an integer; only `Sequence` has slices
        index = range(len(self))[index]
        start = int(self._ends[index - 1]) + 1 if index else 0
        return os.fsdecode(bytes(self.text[start : int(self._ends[index])]))


class ImageFolder(ImageDataset):
    """Image files, in the order given. Relative paths start from `root`. Other arguments: see `ImageDataset`."""

    def __init__(
        self,
        spec: str,
        root: Path,
        paths: Sequence[str],
        image_spec: ImageSpec = RGB,
        labels: npt.NDArray[np.int64] | None = None,
        classes: Sequence[str] = (),
        description: str = "",
        left_out: str = "",
    ) -> None:
        super().__init__(spec, image_spec, labels=labels, classes=classes, description=description)
        self.left_out = left_out
        self._root, self._paths = "" if root == Path() else str(root), paths

    def __len__(self) -> int:
        return len(self._paths)

    def path_of(self, index: int) -> str:
        return os.path.join(self._root, self._paths[index])

    def extents(self, index: int) -> list[Extent]:
        """Return the file of an image."""
        return [(self.path_of(index), 0, 0)]

    def read(self, index: int) -> bytes:
        """Return the content of an image's file. Raises BadImage."""
        try:
            return read_file(self.path_of(index), max_bytes())
        except (OSError, ValueError) as error:  # ValueError: a name that no file system accepts
            raise BadImage(getattr(error, "strerror", None) or str(error)) from None

    def read_array(self, index: int) -> Shaped[Array, "h w c"]:
        return decode(self.read(index), self.image_spec)


def from_folder(folder: str | Path, image_spec: ImageSpec = RGB) -> ImageFolder:
    """Open all images below a folder, in the byte order of their paths.

    Files are chosen by extension, and by options as in `photos,include=*.jpg,exclude=*_mask.png` (see `name_filter`),
    and decoded by content. Hidden files and folders are ignored. Links are followed, and each folder is read once. If
    every image is in a subfolder, the first-level subfolders are the classes.

    Raises:
        UserError: If the folder does not exist, cannot be read, or has no such images.
    """
    name = split_options(str(folder))[0]
    root = Path(os.path.expanduser(name))
    if not root.is_dir():
        raise UserError(_describe_missing_folder(root))
    _, options = read_options(str(folder), "a folder of images", ("include", "exclude"))
    accepts = name_filter(options.get("include", []), options.get("exclude", [])) if options else None
    listing = Listing()
    listing.images = _walk(root, accepts, listing)
    try:
        return open_listing(
            str(root), listing, options, lambda *rest: ImageFolder(str(folder), root, *rest), image_spec
        )
    except OSError as error:
        raise UserError(f"the folder {root} cannot be read: {error.strerror}") from error


@dataclass
class Listing:
    """The image files below a folder, or in an archive, by relative paths in byte order.

    `images` may be an iterator; the other fields are then complete at its end.
    """

    images: Iterable[bytes] = ()
    others: int = 0  # other files
    unsupported: Counter[str] = field(default_factory=Counter)  # of these, those of UNSUPPORTED_EXTENSIONS
    left_out: int = 0  # images that patterns leave out
    links: int = 0  # ignored ones
    unreadable: list[bytes] = field(default_factory=list)  # folders

    def add_other(self, path: str, accepts: Callable[[str], bool] | None) -> None:
        """Count a file that is not read; as an image in an unsupported format if patterns accept it."""
        self.others += 1
        if path.lower().endswith(UNSUPPORTED_EXTENSIONS) and (accepts is None or accepts(path)):
            self.unsupported[next(end for end in UNSUPPORTED_EXTENSIONS if path.lower().endswith(end))] += 1


def open_listing(
    root: str,
    listing: Listing,
    options: Mapping[str, Sequence[str]],
    make: Callable[..., ImageFolder],
    image_spec: ImageSpec,
) -> ImageFolder:
    """Call `make` with a listing's paths and the arguments of `ImageFolder` after them, and return the dataset.

    Its classes are the first-level folders, if every image is in one. Raises UserError if there are no images.
    """
    counts = Counter[bytes]()  # of the first-level folders

    def counted() -> Iterator[bytes]:
        for path in listing.images:
            counts[path[: path.find(b"/") + 1]] += 1
            yield path

    paths = PathList(counted())
    patterns = ",".join(f"{key}={value}" for key, values in options.items() for value in values)
    notes = [f"{listing.left_out:,} images left out by {patterns}"] if options else []
    if listing.unsupported:
        found = ", ".join(f"{count:,} {extension}" for extension, count in listing.unsupported.most_common(5))
        notes.append(f"{listing.unsupported.total():,} images left out in formats that are not read: {found}")
    if listing.links:
        notes.append(f"{listing.links:,} links ignored")
    if listing.unreadable:
        example = os.path.join(root, os.fsdecode(listing.unreadable[0]))
        notes.append(f"folders ignored because they cannot be read: {len(listing.unreadable)}, such as {example}")
    note = "; ".join(notes)
    if not paths and listing.left_out:
        raise UserError(f"no images left in {root}: {note}")
    if not paths:
        content = f"{listing.others} other files" if listing.others else note or "nothing"
        example = f". {describe_first_file(Path(root))}" if listing.others else ""
        supported = " ".join(sorted(EXTENSIONS))
        raise UserError(f"no images in {root} (found {content}); supported: {supported}{example}".rstrip(". "))
    if b"" in counts:
        dataset = make(paths, image_spec, None, (), note, note)
        if len(counts) > 1:
            stray_file = dataset.path_of(next(i for i, path in enumerate(paths) if "/" not in path))
            dataset.label_hint += f". {stray_file} is outside the class folders: move it into one"
        return dataset
    classes = sorted(os.fsdecode(top[:-1]) for top in counts)
    label_of = {name: label for label, name in enumerate(classes)}
    labels = np.repeat([label_of[os.fsdecode(top[:-1])] for top in counts], list(counts.values()))
    return make(paths, image_spec, labels, classes, note, note)


def name_filter(include: Sequence[str], exclude: Sequence[str]) -> Callable[[str], bool]:
    """Return a function that tests the path of an image, relative to its folder.

    The path must match one of the patterns in `include`, unless there are none, and none in `exclude`: `*` is any text,
    `?` a character and `[ab]` one of several; case matters. A pattern without a slash is compared with the name of the
    file, one with a slash with the path, where `*` may contain slashes.
    """

    def matches(path: str, patterns: Sequence[str]) -> bool:
        name = path.rpartition("/")[2]
        return any(fnmatchcase(path if "/" in pattern else name, pattern) for pattern in patterns)

    return lambda path: (not include or matches(path, include)) and not matches(path, exclude)


def _walk(root: Path, accepts: Callable[[str], bool] | None, listing: Listing) -> Iterator[bytes]:
    """Yield the image files below a folder whose path is accepted, in byte order, and count the rest in `listing`.

    A folder that several links lead to is listed under its first path. A link with an image's extension counts as an
    image; checking its target would cost a `stat` for each. Raises OSError if `root` itself cannot be read.
    """
    extensions = tuple(map(os.fsencode, EXTENSIONS))
    visited: set[tuple[int, int]] = set()
    prefix, stack = os.path.join(os.fsencode(root), b""), [b""]  # the next path last; folders end with a slash
    with status_counter(f"listing {root}", "images") as add:
        while stack:
            path = stack.pop()
            if path and not path.endswith(b"/"):
                yield path
                continue
            found, others, count = list[bytes](), list[bytes](), 0
            try:
                status = os.stat(prefix + path)
                if (status.st_dev, status.st_ino) in visited:
                    continue
                visited.add((status.st_dev, status.st_ino))
                with os.scandir(prefix + path) as entries:
                    for entry in entries:
                        if entry.name.startswith(b"."):
                            continue
                        is_folder = entry.is_dir(follow_symlinks=False)
                        if not is_folder and entry.name.lower().endswith(extensions):
                            if accepts is not None and not accepts(os.fsdecode(path + entry.name)):
                                listing.left_out += 1
                                continue
                            found.append(path + entry.name)
                            count += 1
                            if not count % 4096:  # `add` is slow
                                add(4096)
                        elif is_folder or (entry.is_symlink() and os.path.isdir(entry.path)):
                            found.append(path + entry.name + b"/")
                        else:
                            others.append(path + entry.name)
            except OSError as error:
                if not path:
                    raise
                if not isinstance(error, FileNotFoundError | NotADirectoryError):  # those vanished during the walk
                    listing.unreadable.append(path.rstrip(b"/"))
                continue
            add(count % 4096)
            for other in others:
                listing.add_other(os.fsdecode(other), accepts)
            stack += sorted(found, reverse=True)


def _describe_missing_folder(root: Path) -> str:
    if root.exists():
        kinds = "a folder of images, a cache, tars, a .txt of paths or a .csv of labels"
        return f"{root} {describe_file(root)}. A dataset is {kinds}"
    parent, is_file = root.parent, root.suffix.lower() in (".txt", ".csv", ".tsv", ".parquet", ".zip")
    names = [path.name for path in parent.iterdir() if path.is_dir() != is_file] if parent.is_dir() else []
    if re.search(r"[*?\[{]", root.name):
        way = "join several by +" if is_file or "{" in root.name else f"for images, pass {parent},include={root.name}"
        return f"{root} does not exist, and as a pattern it can name tars only: {way}"
    return f"the {'file' if is_file else 'folder'} {root} does not exist{did_you_mean(root.name, names)}"


def from_paths(paths: Sequence[str | Path], image_spec: ImageSpec = RGB) -> ImageFolder:
    """Open image files, and all images below folders. Raises UserError if a path does not exist."""
    files: list[str] = []
    for path in (Path(os.path.expanduser(path)) for path in paths):
        if path.is_dir():
            folder = from_folder(path, image_spec)
            files += map(folder.path_of, range(len(folder)))
        elif path.is_file():
            files.append(str(path))
        else:
            raise UserError(f"{path} does not exist")
    others = f" and {len(paths) - 3:,} more" if len(paths) > 3 else ""  # it is part of messages
    return ImageFolder(" ".join(map(str, paths[:3])) + others, Path(), PathList(map(os.fsencode, files)), image_spec)


def from_list_file(spec: str | Path, image_spec: ImageSpec = RGB, text: bytes | None = None) -> ImageFolder:
    """Open the images that a text file lists, one path per line, relative to the file's folder.

    The paths must be below that folder, or below FOLDER if the spec is `LIST.txt,root=FOLDER`. `text` is what
    `read_utf8` returned, if the file has been read.

    Raises:
        UserError: If the file cannot be read, lists nothing, or a path is elsewhere.
    """
    name, options = read_options(str(spec), "a .txt list", ("root",))
    root = read_root(options.get("root", [""])[0], str(spec))
    file = Path(os.path.expanduser(name))
    text = read_utf8(file) if text is None else text
    paths = PathList(line for line in map(bytes.strip, io.BytesIO(text)) if line)
    if not paths:
        raise UserError(f"{file} lists no images")
    folders = [file.parent] if root is None else [file.parent, root]
    suspicious: Iterable[str] = paths
    if os.sep == "/":  # a path without a leading slash and without ".." is below the folder
        is_usual = not paths.text.startswith(b"/") and not any(sign in paths.text for sign in (b"\0/", b".."))
        tops = b"|".join(re.escape(os.fsencode(os.path.join(os.path.abspath(folder), ""))) for folder in folders)
        pattern = re.compile(rb"(?m)^(?:(?=/)(?!" + tops + rb").*|.*\.\..*)$")
        lines = b"" if is_usual else paths.text.replace(b"\0", b"\n")
        suspicious = (os.fsdecode(bytes(match[0])) for match in pattern.finditer(lines))
    check_inside(suspicious, folders, str(file), len(paths), root_remedy(name))
    dataset = ImageFolder(str(spec), file.parent, paths, image_spec)
    dataset.label_hint = "an evaluation needs a class in each line of the list, after the path: PATH, CLASS"
    return dataset


def root_remedy(name: str) -> str:
    """Return what to do about paths that lead out of the folder of a list."""
    return f"--data '{name},root=FOLDER' allows paths below FOLDER"


def is_image_name(path: str) -> bool:
    """Return True if a path ends as those of image files do."""
    return path.lower().endswith(tuple(EXTENSIONS))


def read_utf8(file: Path) -> bytes:
    """Return the content of a text file in UTF-8, or in UTF-16 with a byte-order mark, as UTF-8. Raises UserError.

    If no line ends with a line feed, as in old files from a Mac, carriage returns become line feeds.
    """
    with readable(file):
        text = read_file(file, MAX_LIST_BYTES)
    for mark, encoding in _BYTE_ORDER_MARKS:
        if text.startswith(mark):
            try:
                text = text.removeprefix(mark) if encoding == "utf-8" else text.decode(encoding).encode()
            except UnicodeError as error:
                raise UserError(f"{file} starts as UTF-16, but is not: {error}. Save it as UTF-8") from None
    if b"\n" not in text:
        text = text.replace(b"\r", b"\n")
    if text.count(b"\n") > MAX_LINES:
        raise UserError(f"{file} has more than {MAX_LINES:,} lines: make a cache or tars of the images")
    if b"\0" in text:
        raise UserError(f"{file} is not a text file: it contains a zero byte. Save it as UTF-8")
    return text


def check_inside(names: Iterable[str], folders: Sequence[Path], source: str, total: int, remedy: str) -> None:
    """Check that untrusted paths are below some folders. Relative paths start from the first folder.

    Links inside the folders are followed, as everywhere in a folder of images, so a path without `..` is not resolved.

    Raises:
        UserError: If a path is elsewhere. It has the file that lists the `total` paths, `source`, and the `remedy`.
    """
    tops = tuple(os.path.join(os.path.abspath(folder), "") for folder in folders)
    real_tops = tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)

    @lru_cache(maxsize=1024)
    def is_inside(folder: str) -> bool:
        return os.path.join(os.path.realpath(folder), "").startswith(real_tops)

    def is_allowed(name: str) -> bool:
        try:
            if b"\0" in os.fsencode(name):
                return False
        except UnicodeEncodeError:
            return False
        if ".." not in name and (name.startswith(tops) or not os.path.isabs(name)):
            return True
        path = os.path.join(tops[0], name)
        folder, file = os.path.split(path)
        return is_inside(path if file in ("", ".", "..") else folder)

    outside = [name for name in names if not is_allowed(name)]
    if outside:
        raise UserError(
            f"{len(outside):,} of the {total:,} paths in {source} lead out of {' and '.join(map(str, folders))}, such "
            f"as {outside[0]!r}: {remedy}"
        )
