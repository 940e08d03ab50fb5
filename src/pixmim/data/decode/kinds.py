"""Identify files that are not images, so that an error can explain what to do."""

import os
import re
from itertools import islice
from pathlib import Path

from pixmim.utils.files import open_regular

HEAD_BYTES = 1024
"""Number of bytes at the start of a file that `identify` needs."""

_MAX_VISITED = 1000  # files in a search for one that is not hidden

_UNPACK = "unpack it first"
_FRAMES = "extract its frames first, for example: ffmpeg -i VIDEO frames/%06d.jpg"
_CONVERT = "convert it to PNG, JPEG or TIFF first"
_ARRAYS = "save its images as .npy or TIFF first"
_LIST = "pass a .txt with one path per line instead"
_TABLE = "name it FILE.csv, or pass a .txt with one path per line"
_FLOATS = "save it as a float32 TIFF first"
_DICOM = "name it FILE.dcm; without the 128 bytes before its DICM, save it again with pydicom"
_SLICES = "save its slices as .npy or TIFF first, for example with nibabel"

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"7z\xbc\xaf": "7z",
    b"Rar!": "rar",
}
_SCIENTIFIC = {b"\x89HDF": "HDF5 (or .mat, .nc)", b"MATLAB 5": "a MATLAB file", b"CDF": "NetCDF", b"SIMPLE  =": "FITS"}
_DRAWINGS = {b"8BPS": "a Photoshop file", b"\0\0\1\0": "an icon", b"%!PS": "PostScript"}
_MAGIC: tuple[tuple[int, bytes, str, str], ...] = (  # offset, bytes, kind, advice
    (0, b"version https://git-lfs", "a Git LFS pointer", "fetch the file itself: git lfs pull"),
    (0, b"/annex/objects/", "a git-annex pointer", "fetch the file itself: git annex get"),
    (128, b"DICM", "DICOM", _DICOM),
    (0, b"\x08\0\x05\0", "DICOM", _DICOM),
    *((344, magic, "a NIfTI volume", _SLICES) for magic in (b"n+1\0", b"ni1\0")),
    (0, b"PK\3\4", "a zip archive (or .npz)", "pass it as --data FILE.zip, or unpack it first"),
    *((0, magic, f"compressed ({kind})", _UNPACK) for magic, kind in _COMPRESSED.items()),
    (257, b"ustar", "a tar archive", "pass it as --data FILE.tar"),
    (0, b"%PDF", "a PDF", "render its pages first, for example: pdftoppm -png FILE page"),
    *((at, magic, "JPEG XL", _CONVERT) for at, magic in ((0, b"\xff\x0a"), (4, b"JXL "))),
    *((at, magic, "JPEG 2000", _CONVERT) for at, magic in ((4, b"jP  "), (0, b"\xffO\xffQ"))),
    *((4, b"ftyp" + brand, "HEIC", _CONVERT) for brand in (b"hei", b"hev", b"mif1", b"msf1")),
    (4, b"ftypavi", "AVIF", _CONVERT),
    (4, b"ftypcrx", "a camera's raw file", _CONVERT),
    (4, b"ftyp", "a video", _FRAMES),
    (8, b"AVI ", "a video", _FRAMES),
    *((0, magic, "a video", _FRAMES) for magic in (b"\x1aE\xdf\xa3", b"\0\0\1\xba", b"\0\0\1\xb3", b"FLV\1")),
    (0, b"OggS", "a video or sound", _FRAMES),
    (0, b"0&\xb2u\x8ef\xcf\x11", "a video", _FRAMES),
    *((0, magic, kind, _ARRAYS) for magic, kind in _SCIENTIFIC.items()),
    (0, b"v/1\1", "OpenEXR", _FLOATS),
    (0, b"#?RADIANCE", "Radiance HDR", _FLOATS),
    *((0, magic, kind, _CONVERT) for magic, kind in _DRAWINGS.items()),
    (0, b"PAR1", "a parquet table", "pass it as --data FILE.parquet"),
)

_TEXTS = (
    (re.compile(rb"\s*<(!doctype html|html)", re.IGNORECASE), "a web page", "the download failed: repeat it"),
    (re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)?<svg", re.DOTALL), "an SVG drawing", _CONVERT),
    (re.compile(rb"\s*<"), "XML", "pass the images themselves"),
    (re.compile(rb"\s*[\[{]"), "JSON", "pass the images themselves"),
    (re.compile(rb"[^\n,;\t]*[,;\t][^\n]*\n[^\n,;\t]*[,;\t]"), "a table (CSV)", _TABLE),
    (re.compile(rb""), "text", _LIST),
)

_IMAGE = re.compile(rb"\xff\xd8\xff|\x89PNG|GIF8|II[*+]\0|MM\0[*+]|BM|P[1-6]\s|RIFF....WEBP|\x93NUMPY", re.DOTALL)


def identify(head: bytes) -> str:
    """Return a file's kind and advice, "KIND: ADVICE", from its first HEAD_BYTES; "" if unknown."""
    for offset, magic, kind, advice in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return f"{kind}: {advice}"
    if head and not re.search(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]", head):
        return next(f"{kind}: {advice}" for pattern, kind, advice in _TEXTS if pattern.match(head))
    return ""


def describe_file(path: Path) -> str:
    """Return the end of a sentence about a file that was passed as a dataset, such as "is JSON: ..."."""
    try:
        descriptor = open_regular(path)
        try:
            head = os.read(descriptor, HEAD_BYTES)
        finally:
            os.close(descriptor)
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if _IMAGE.match(head):
        return "is a single image: pass its folder"
    return f"is {identify(head) or 'of an unknown kind'}"


def describe_first_file(root: Path) -> str:
    """Describe one of the files below a folder without images; "" if it is empty."""
    files = (Path(folder, name) for folder, _, names in os.walk(root) for name in names if not name.startswith("."))
    return next((f"{path} {describe_file(path)}" for path in islice(files, _MAX_VISITED)), "")
