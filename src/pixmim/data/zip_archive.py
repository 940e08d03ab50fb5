"""Images in a zip archive, read in place and by several threads. Nothing is ever extracted.

The table of contents is read by `zipfile`, members by their offsets. Stored and deflated members are supported.
"""

import io
import os
import posixpath
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pixmim.data.dataset import RGB, BadImage, Extent, ImageSpec
from pixmim.data.decode.limits import check_bytes
from pixmim.data.image_folder import EXTENSIONS, ImageFolder, Listing, name_filter, open_listing
from pixmim.data.shards.fsspec_io import file_version, is_url
from pixmim.data.shards.local import OpenFile, ShardStore
from pixmim.data.shards.remote import open_shards
from pixmim.data.uri import read_options
from pixmim.utils.errors import UserError, first_line, shown

_MAX_TABLE_BYTES = 2**28  # of the table of contents: two million members of common names
_MEMBER = np.dtype([("offset", "<i8"), ("length", "<i8"), ("size", "<i8"), ("method", "<i8"), ("crc", "<i8")])
_HUGE = 2**62  # fits _MEMBER, and no file
_HEADER_BYTES = 30  # of a member's own header, without its name and extra fields

Member = tuple[int, int, int, int, int]
"""Offset of the header, compressed and real number of bytes, compression method and CRC-32."""


def is_zip(name: str) -> bool:
    """Return True if a path or URL is named like a zip archive; a path must be a file."""
    if is_url(name):
        return name.split("?", 1)[0].lower().endswith(".zip")
    return name.lower().endswith(".zip") and os.path.isfile(name)


class ZipFolder(ImageFolder):
    """Images in an archive at a path or URL, which is shard 0 of a store. `members` (n) has dtype _MEMBER."""

    def __init__(self, archive: str, store: ShardStore, members: npt.NDArray[Any], *arguments: Any) -> None:
        super().__init__(*arguments)
        self._archive, self._store, self._members = archive, store, members
        self._root = f"{archive}/{self._root}".rstrip("/")
        if store.is_remote:
            self.shard_sizes = np.asarray([len(members)], np.int64)

    def prefetch(self, shards: Sequence[int]) -> None:
        self._store.prefetch(shards)

    def extents(self, index: int) -> list[Extent]:
        """Return the archive, the offset of an image's member, and the number of bytes of its file."""
        offset, _, size, *_ = self._members[index].item()
        return [(self._archive, offset, size)]

    def read(self, index: int) -> bytes:
        """Return the file of one image. Raises BadImage, and UserError if the archive has changed or is gone."""
        offset, length, size, method, crc = self._members[index].item()
        check_bytes(max(length, size))
        try:
            header = self._store.read(0, _HEADER_BYTES, offset)
            if len(header) < _HEADER_BYTES or not header.startswith(b"PK\3\4"):
                raise BadImage("damaged: its header is not where the archive's table says")
            data = self._store.read(0, length, offset + _HEADER_BYTES + sum(struct.unpack_from("<HH", header, 26)))
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from None
        if method == zipfile.ZIP_DEFLATED:
            inflate = zlib.decompressobj(-zlib.MAX_WBITS)
            try:
                data = inflate.decompress(data, size + 1)  # stops there, whatever follows
            except zlib.error as error:
                raise BadImage(f"damaged: {error}") from None
        elif method != zipfile.ZIP_STORED:
            raise BadImage(f"compressed with zip's method {method}: pack it again, stored or deflated")
        if len(data) != size:
            raise BadImage("damaged: its size differs from the archive's table")
        if zlib.crc32(data) != crc:
            raise BadImage("damaged: its checksum differs from the archive's table")
        return data


def open_zip(spec: str, image_spec: ImageSpec = RGB, shard_cache_gib: float = 50.0) -> ImageFolder:
    """Open all images in a zip archive, as those of a folder: a path or URL with options as for `from_folder`.

    Folders that contain everything are left out, so an archive of `photos/` is read like that folder.

    Raises:
        UserError: If it cannot be read, is encrypted, has no images, or names that do not belong into an archive.
    """
    name, options = read_options(spec, "a zip archive", ("include", "exclude"))
    name = name if is_url(name) else os.path.expanduser(name)
    version = file_version(name)
    if version is None:
        raise UserError(f"{name} does not exist")
    store = open_shards([name], [version], shard_cache_gib)
    members, others, links = _read_table(store.open(0), name)
    common = posixpath.commonpath([posixpath.dirname(path) for path in members]) if members else ""
    start = len(common) + bool(common)
    accepts = name_filter(options.get("include", []), options.get("exclude", []))
    by_path = {os.fsencode(path[start:]): member for path, member in members.items() if accepts(path[start:])}
    paths = sorted(by_path)
    listing = Listing(paths, left_out=len(members) - len(by_path), links=links)
    for path in others:
        listing.add_other(path.removeprefix(f"{common}/"), accepts)
    entries = np.asarray([by_path[path] for path in paths], _MEMBER)
    return open_listing(
        name, listing, options, lambda *rest: ZipFolder(name, store, entries, spec, Path(common), *rest), image_spec
    )


def _read_table(file: OpenFile, name: str) -> tuple[Mapping[str, Member], list[str], int]:
    """Return the image members of an archive by path, other files, and the number of links. Raises UserError."""
    try:
        with _BoundedFile(file.duplicate()) as table, zipfile.ZipFile(table) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, OverflowError, struct.error) as error:
        raise UserError(f"{name} is not a zip archive that can be read: {first_line(error)}") from None
    images, others, links, packed, encrypted = dict[str, Member](), list[str](), 0, 0, 0
    unsafe, repeated = [], []
    for info in infos:
        name_inside = _decoded_name(info).replace("\\", "/")  # as some programs on Windows write it
        parts = [part for part in name_inside.split("/") if part not in ("", ".")]
        path = "/".join(parts)
        packed += info.compress_size
        if re.match("/|[A-Za-z]:", name_inside) or ".." in parts:
            unsafe.append(shown(name_inside))
        elif name_inside.endswith("/") or any(part.startswith(".") for part in parts):
            continue
        elif stat.S_ISLNK(info.external_attr >> 16):
            links += 1
        elif posixpath.splitext(path)[1].lower() not in EXTENSIONS:
            others.append(path)
        elif path in images:
            repeated.append(shown(path))
        else:
            encrypted += info.flag_bits & 1
            offset, size = min(info.header_offset, _HUGE), min(info.file_size, _HUGE)
            images[path] = offset, info.compress_size, size, info.compress_type, info.CRC
    problem = (
        (unsafe and f"{len(unsafe):,} of its paths lead out of it, such as {unsafe[0]}")
        or (repeated and f"it has several files of one path, such as {repeated[0]}")
        or (encrypted and f"{encrypted:,} of its {len(images):,} images are encrypted: unpack it first")
        or (packed > file.size and f"its files overlap ({packed:,} bytes in {file.size:,}): it is a zip bomb")
    )
    if problem:
        raise UserError(f"the zip archive {name} is refused: {problem}")
    return images, others, links


def _decoded_name(info: zipfile.ZipInfo) -> str:
    """Return a member's name: some programs (on a Mac) write UTF-8 without the flag for it, read as code page 437."""
    if not info.flag_bits & 0x800:
        with suppress(UnicodeError):
            return info.filename.encode("cp437").decode("utf-8")
    return info.filename


class _BoundedFile(io.FileIO):
    """File from which `zipfile` reads the table of contents, by bounded reads."""

    def read(self, size: int | None = -1) -> bytes:
        if (size or 0) > _MAX_TABLE_BYTES:
            raise ValueError(
                f"its table of contents has more than {_MAX_TABLE_BYTES >> 20} MiB. Pack it into several archives, or "
                "into tars"
            )
        return super().read(-1 if size is None else size)
