"""What a file is that is not an image, and what to do about it: said in place of "unknown format"."""

import os
import re
from itertools import islice
from pathlib import Path

from pixmim.utils.files import open_regular

HEAD = 1024
"""Bytes at a file's beginning that tell."""

_UNPACK = "unpack it first"
_FRAMES = "take its frames out, such as by: ffmpeg -i VIDEO frames/%06d.jpg"
_CONVERT = "convert it to PNG, JPEG or TIFF first"
_ARRAYS = "save its images as .npy or TIFF first"

_MAGIC: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"version https://git-lfs", "a Git LFS pointer", "fetch the file itself: git lfs pull"),
    (0, b"/annex/objects/", "a git-annex pointer", "fetch the file itself: git annex get"),
    (128, b"DICM", "DICOM", "save its pixels as .npy or 16-bit TIFF first, such as by pydicom's pixel_array"),
    (0, b"\x08\0\x05\0", "DICOM", "save its pixels as .npy or 16-bit TIFF first, such as by pydicom's pixel_array"),
    (344, b"n+1\0", "a NIfTI volume", "save its slices as .npy or TIFF first, such as by nibabel"),
    (344, b"ni1\0", "a NIfTI header", "save its slices as .npy or TIFF first, such as by nibabel"),
    (0, b"PK\3\4", "a zip archive (or .npz)", _UNPACK),
    (0, b"\x1f\x8b", "compressed (gzip)", _UNPACK),
    (0, b"BZh", "compressed (bzip2)", _UNPACK),
    (0, b"\xfd7zXZ", "compressed (xz)", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "compressed (zstd)", _UNPACK),
    (0, b"\x04\x22\x4d\x18", "compressed (lz4)", _UNPACK),
    (0, b"7z\xbc\xaf", "a 7z archive", _UNPACK),
    (0, b"Rar!", "a rar archive", _UNPACK),
    (257, b"ustar", "a tar archive", "give it as --data FILE.tar"),
    (0, b"%PDF", "a PDF", "draw its pages first, such as by: pdftoppm -png FILE page"),
    (0, b"\xff\x0a", "JPEG XL", _CONVERT),
    (4, b"JXL ", "JPEG XL", _CONVERT),
    (4, b"jP  ", "JPEG 2000", _CONVERT),
    (0, b"\xffO\xffQ", "JPEG 2000", _CONVERT),
    *((4, b"ftyp" + brand, "HEIC", _CONVERT) for brand in (b"hei", b"hev", b"mif1", b"msf1")),
    (4, b"ftypavi", "AVIF", _CONVERT),
    (4, b"ftypcrx", "a camera's raw file", _CONVERT),
    (4, b"ftyp", "a video", _FRAMES),
    (8, b"AVI ", "a video", _FRAMES),
    (0, b"\x1aE\xdf\xa3", "a video", _FRAMES),
    (0, b"\0\0\1\xba", "a video", _FRAMES),
    (0, b"\0\0\1\xb3", "a video", _FRAMES),
    (0, b"FLV\1", "a video", _FRAMES),
    (0, b"OggS", "a video or sound", _FRAMES),
    (0, b"0&\xb2u\x8ef\xcf\x11", "a video", _FRAMES),
    (0, b"\x89HDF", "HDF5 (or .mat, .nc)", _ARRAYS),
    (0, b"MATLAB 5", "a MATLAB file", _ARRAYS),
    (0, b"CDF", "NetCDF", _ARRAYS),
    (0, b"SIMPLE  =", "FITS", _ARRAYS),
    (0, b"v/1\1", "OpenEXR", "save it as TIFF of float32 first"),
    (0, b"#?RADIANCE", "Radiance HDR", "save it as TIFF of float32 first"),
    (0, b"8BPS", "a Photoshop file", _CONVERT),
    (0, b"\0\0\1\0", "an icon", _CONVERT),
    (0, b"%!PS", "PostScript", _CONVERT),
    (0, b"PAR1", "a parquet table", "give it as --data FILE.parquet"),
)

_TEXTS = (
    (re.compile(rb"\s*<(!doctype html|html)", re.IGNORECASE), "a web page", "the download has failed: repeat it"),
    (re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<svg", re.DOTALL), "an SVG drawing", _CONVERT),
    (re.compile(rb"\s*<"), "XML", "give the images themselves"),
    (re.compile(rb"\s*[\[{]"), "JSON", "give the images themselves"),
    (
        re.compile(rb"[^\n,;\t]*[,;\t][^\n]*\n[^\n,;\t]*[,;\t]"),
        "a table (CSV)",
        "images are listed in a .txt, a path in each line",
    ),
    (re.compile(rb""), "text", "images are listed in a .txt, a path in each line"),
)

_PICTURE = re.compile(rb"\xff\xd8\xff|\x89PNG|GIF8|II[*+]\0|MM\0[*+]|BM|P[1-6]\s|RIFF....WEBP|\x93NUMPY", re.DOTALL)


def about(head: bytes) -> str:
    """Say what a file is, by its beginning, and what to do about it; empty where that is not known."""
    for at, magic, kind, advice in _MAGIC:
        if head[at : at + len(magic)] == magic:
            return f"{kind}: {advice}"
    if head and not re.search(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]", head):
        return next(f"{kind}: {advice}" for pattern, kind, advice in _TEXTS if pattern.match(head))
    return ""


def about_file(path: Path) -> str:
    """Say what a file is that was given as data, in words that follow its name."""
    try:
        descriptor = open_regular(path)
        try:
            head = os.read(descriptor, HEAD)
        finally:
            os.close(descriptor)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if _PICTURE.match(head):
        return "is one image: give the folder that it is in"
    kind = about(head)
    return f"is {kind}" if kind else "is a file of a kind that is not known here"


def about_others(root: Path, most: int = 1000) -> str:
    """Say what one of the files below a folder is, where none is an image by its name; empty if there is none."""
    files = (Path(folder, name) for folder, _, names in os.walk(root) for name in names if not name.startswith("."))
    for path in islice(files, most):
        return f"{path} {about_file(path)}"
    return ""
