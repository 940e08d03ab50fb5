"""Where the files lie in a tar, found by hopping from header to header; their contents are not read.

Old (V7), POSIX (ustar, pax) and GNU tars. Python's tarfile knows them too, but stops in silence where a tar is cut off
between two files, and takes three times as long; a test holds one against the other.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

from pixmim.data.shards.local import Descriptor
from pixmim.utils.errors import UserError

BLOCK = 512

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}

_LONGEST_HEADER = 1 << 20  # bytes of an extended header, which may hold more than a name
_LONGEST_NAME = 1 << 15  # bytes: eight times what file systems take
_MOST_BYTES = 1 << 63  # no file is longer
_MOST_ZEROS = 1 << 30  # bytes of zeros between and after members, in all


class Member(NamedTuple):
    """A regular file in a tar: its name, and the place and number of its bytes."""

    name: str
    offset: int
    length: int


def members(tar: Descriptor, where: str, link: Callable[[str], object] = lambda name: None) -> Iterator[Member]:
    """Yield the regular files of a tar in order, `where` being its name in messages.

    Links, folders and devices are left out; `link` is called with the name of each link. Tars that were joined, one
    after another, are read as one. Each step moves forward in the file, so reading ends. A file that is mostly zeros is
    refused: it may be sparse, and of any size.

    Raises:
        UserError: If it is compressed, cut off, damaged or not a tar, with the byte where that shows.
    """
    size, at, ended, zeros = tar.size, 0, False, 0
    if not size:
        raise UserError(f"{where} is empty. {_REMEDY}")
    said: dict[str, str] = {}  # by extended headers, of the member after them
    while at < size:
        block = tar.read(BLOCK, at)
        if not block.strip(b"\0"):
            after = _after_zeros(tar, at, at + _MOST_ZEROS - zeros)
            zeros += after - at
            if zeros >= _MOST_ZEROS:
                raise UserError(f"{where} holds {zeros:,} bytes of zeros up to byte {after:,}. {_REMEDY}")
            at, ended = after, not said
            continue
        ended = False
        try:
            if len(block) < BLOCK and at:
                break
            kind, name, length = _header(block)
            if kind in b"xXL":
                if length > _LONGEST_HEADER:
                    raise ValueError("an absurd length")
                content = tar.read(length, at + BLOCK)
                if len(content) < length:
                    break
                said |= {"path": _text(content)} if kind == b"L" else _pax(content)
            elif kind not in b"gK":
                name, length = said.get("path", name), int(said.get("size", length))
                if len(name) > _LONGEST_NAME or length >= _MOST_BYTES:
                    raise ValueError("an absurd name or length")
                if kind == b"S" or "GNU.sparse" in said:
                    raise UserError(f"{where}: {name} is stored as a sparse file; pack it without --sparse")
                if kind in b"123456":
                    length = 0  # links, devices and folders have none, whatever their headers say
        except ValueError:
            raise UserError(_unreadable(tar, where, at)) from None
        after = at + BLOCK + -(-length // BLOCK) * BLOCK
        if at + BLOCK + length > size:
            raise UserError(
                f"{where} is cut off: {name or 'what'} at byte {at:,} takes {length:,} bytes, and the file ends at "
                f"byte {size:,}. {_REMEDY}"
            )
        if kind in b"0\x007" and not name.endswith("/"):
            yield Member(name, at + BLOCK, length)
        if kind in b"12":
            link(name)
        if kind not in b"xXLgK":
            said = {}
        at = after
    if not ended:
        raise UserError(f"{where} is cut off at byte {size:,}: the blocks that end a tar are missing. {_REMEDY}")


_REMEDY = "Copy or make it again, or leave it out."


def _header(block: bytes) -> tuple[bytes, str, int]:
    """Type, name and length in a header block. Raises ValueError if its check sum is another."""
    if (
        len(block) < BLOCK or _number(block[148:156]) != sum(block) - sum(block[148:156]) + 8 * 32
    ):  # the sum's own place counts as spaces
        raise ValueError("another check sum")
    name = _text(block[:100])
    if block[257:263] == b"ustar\0" and block[345]:
        name = f"{_text(block[345:500])}/{name}"
    return block[156:157], name, _number(block[124:136])


def _number(field: bytes) -> int:
    """An octal number, or GNU's binary one for what octal digits cannot hold."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if digits and not digits.isdigit():
        raise ValueError("no number")
    return int(digits or b"0", 8)


def _pax(content: bytes) -> dict[str, str]:
    """The path, size and signs of sparse storage in the records "LENGTH KEY=VALUE\\n" of a pax header."""
    found: dict[str, str] = {}
    at, end = 0, len(content.rstrip(b"\0"))
    while at < end:
        blank = content.find(b" ", at, at + 8)
        digits = content[at:blank] if blank >= 0 else b""
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = content[blank + 1 : at + length].partition(b"=")
        if not equals or at + length > len(content) or not value.endswith(b"\n"):
            raise ValueError("no record")
        if key.startswith(b"GNU.sparse"):
            found["GNU.sparse"] = ""
        elif key == b"path" or (key == b"size" and value[:-1].isdigit()):
            found[_text(key)] = _text(value[:-1])
        at += length
    return found


def _text(name: bytes) -> str:
    return name.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _after_zeros(tar: Descriptor, at: int, end: int) -> int:
    """The first block from `at` on that is not all zeros, or `end` or the tar's size if that comes first."""
    end = min(end, tar.size)
    while at < end:
        piece = tar.read(1 << 16, at)
        rest = piece.lstrip(b"\0")
        if rest:
            return at + (len(piece) - len(rest)) // BLOCK * BLOCK
        at += len(piece) or BLOCK
    return end


def _unreadable(tar: Descriptor, where: str, at: int) -> str:
    if at:
        return f"{where} is damaged at byte {at:,}, where a file's header must be. {_REMEDY}"
    start = tar.read(8, 0)
    for magic, kind in _COMPRESSED.items():
        if start.startswith(magic):
            return (
                f"{where} is compressed ({kind}): one image alone can only be read from a plain tar. Unpack it first."
            )
    return f"{where} is no tar file"
