"""List the files of a tar by reading its headers only: old (V7), POSIX (ustar, pax) and GNU tars.

Not `tarfile`: it ends silently where a tar is truncated between two files, takes three times as long, and up to Python
3.11.9 the square of an extended header's length (6 s for 64 KiB). A test compares the two.
"""

from collections.abc import Iterator
from typing import NamedTuple

from pixmim.data.decode.kinds import HEAD_BYTES, identify
from pixmim.data.shards.local import OpenFile
from pixmim.utils.errors import UserError

BLOCK = 512

_MAX_EXTENDED_HEADER = 1 << 20  # bytes
_MAX_NAME = 1 << 15  # bytes: eight times the limit of file systems
_MAX_SIZE = 1 << 63
_MAX_ZEROS = 1 << 30  # bytes of zeros between and after members, in total

_REMEDY = "Copy or create it again, or leave it out"


class Member(NamedTuple):
    """A file in a tar: its name, the offset and number of its bytes, and whether it is a link."""

    name: str
    offset: int
    length: int
    is_link: bool = False


def iter_members(tar: OpenFile, path: str) -> Iterator[Member]:
    """Yield the regular files and links of a tar in order; concatenated tars are read as one.

    Every step moves forward, so reading ends. Folders and devices are left out.

    Raises:
        UserError: If it is compressed, truncated, damaged, mostly zeros, or not a tar; it names the byte.
    """
    size, at, zeros, ended = tar.size, 0, 0, False
    extended: dict[str, str] = {}  # from extended headers, for the member after them
    if not size:
        raise UserError(f"{path} is empty. {_REMEDY}")
    while at < size:
        block = tar.read(BLOCK, at)
        if not block.strip(b"\0"):
            after = _skip_zeros(tar, at, at + _MAX_ZEROS - zeros)
            zeros += after - at
            if zeros >= _MAX_ZEROS:
                raise UserError(f"{path} contains {zeros:,} bytes of zeros up to byte {after:,}. {_REMEDY}")
            at, ended = after, not extended
            continue
        ended = False
        try:
            if len(block) < BLOCK and at:
                break
            kind, name, length = _parse_header(block)
            is_extended = kind in b"xXL"
            if is_extended:
                content = tar.read(length, at + BLOCK) if length <= _MAX_EXTENDED_HEADER else b""
                if len(content) == length:
                    extended |= {"path": _decode(content)} if kind == b"L" else _parse_pax(content)
            elif kind not in b"gK":
                name, length = extended.get("path", name), int(extended.get("size", length))
            if len(name) > _MAX_NAME or length >= (_MAX_EXTENDED_HEADER + 1 if is_extended else _MAX_SIZE):
                raise ValueError("absurd size")
        except ValueError:
            raise UserError(_describe_damage(tar, path, at)) from None
        if kind == b"S" or ("GNU.sparse" in extended and not is_extended):
            raise UserError(f"{path}: {name} is stored as a sparse file. Pack it without --sparse")
        if kind in b"123456":
            length = 0  # links, devices and folders have no content, whatever their headers say
        start = at + BLOCK
        if start + length > size:
            raise UserError(
                f"{path} is truncated: {name} at byte {at:,} needs {length:,} bytes, but the file ends at byte "
                f"{size:,}. {_REMEDY}"
            )
        if kind in b"0\x00712" and not name.endswith("/"):
            yield Member(name, start, length, kind in b"12")
        if not is_extended and kind not in b"gK":
            extended = {}
        at = start + -(-length // BLOCK) * BLOCK
    if not ended:
        raise UserError(f"{path} is truncated at byte {size:,}: the blocks that end a tar are missing. {_REMEDY}")


def _parse_header(block: bytes) -> tuple[bytes, str, int]:
    """Return type, name and length from a header block. Raises ValueError if its checksum is wrong."""
    checksum = sum(block) - sum(block[148:156]) + 8 * ord(" ")  # the checksum's own field counts as spaces
    if len(block) < BLOCK or _parse_number(block[148:156]) != checksum:
        raise ValueError("wrong checksum")
    name = _decode(block[:100])
    if block[257:263] == b"ustar\0" and block[345]:
        name = f"{_decode(block[345:500])}/{name}"
    return block[156:157], name, _parse_number(block[124:136])


def _parse_number(field: bytes) -> int:
    """Parse an octal number, or GNU's binary one for what octal digits cannot hold."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    if digits and not digits.isdigit():
        raise ValueError("not a number")
    return int(digits or b"0", 8)


def _parse_pax(content: bytes) -> dict[str, str]:
    """Return "path", "size" and "GNU.sparse" from the lines "LENGTH KEY=VALUE" of a pax header."""
    records: dict[str, str] = {}
    at, end = 0, len(content.rstrip(b"\0"))
    while at < end:
        blank = content.find(b" ", at, at + 8)
        digits = content[at:blank] if blank >= 0 else b""
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = content[blank + 1 : at + length].partition(b"=")
        if not equals or at + length > len(content) or not value.endswith(b"\n"):
            raise ValueError("not a record")
        if key.startswith(b"GNU.sparse"):
            records["GNU.sparse"] = ""
        elif key == b"path" or (key == b"size" and value[:-1].isdigit()):
            records[_decode(key)] = _decode(value[:-1])
        at += length
    return records


def _decode(name: bytes) -> str:
    return name.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _skip_zeros(tar: OpenFile, at: int, end: int) -> int:
    """Return the first block from `at` on that is not all zeros, but at most `end` or the tar's size."""
    end = min(end, tar.size)
    while at < end:
        chunk = tar.read(1 << 16, at)
        rest = b"" if chunk == bytes(len(chunk)) else chunk.lstrip(b"\0")  # ten times as fast
        if rest:
            return at + (len(chunk) - len(rest)) // BLOCK * BLOCK
        at += len(chunk) or BLOCK
    return end


def _describe_damage(tar: OpenFile, path: str, at: int) -> str:
    if at:
        return f"{path} is damaged at byte {at:,}, where a file's header must be. {_REMEDY}"
    kind = identify(tar.read(HEAD_BYTES, 0))
    return f"{path} is not a tar" + f", but {kind}" * bool(kind)
