"""Minimal PNG and TIFF files with arbitrary headers."""

import struct


def tiff(
    pages: list[dict[int, tuple[int, list[int]]]], *, order: str = "<", big: bool = False, loop: int = -1
) -> bytes:
    """Make a TIFF with these tags (type and values each) and 16x16 zeros after its header.

    `loop` is the page to which the last page's offset points; -1 is the end.
    """
    offset, count, entry = ("Q", "Q", "HHQ") if big else ("I", "H", "HHI")
    inside = 8 if big else 4
    start = 16 if big else 8
    body = bytearray(2 * 256)
    starts = []
    for tags in pages:
        values = []
        for code, (kind, numbers) in sorted(tags.items()):
            packed = struct.pack(f"{order}{len(numbers)}{ {1: 'B', 2: 'B', 3: 'H', 4: 'I', 16: 'Q'}[kind] }", *numbers)
            if len(packed) > inside:
                at = start + len(body)
                body += packed
                packed = struct.pack(order + offset, at)
            values.append(struct.pack(order + entry, code, kind, len(numbers)) + packed.ljust(inside, b"\0"))
        starts.append(start + len(body))
        body += struct.pack(order + count, len(values)) + b"".join(values) + struct.pack(order + offset, 0)
    for i, end in enumerate(starts[1:] + ([starts[loop]] if loop >= 0 else [])):
        tags = pages[i]
        at = starts[i] - start + struct.calcsize(order + count) + len(tags) * (20 if big else 12)
        body[at : at + inside] = struct.pack(order + offset, end)
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if big else 42)
    return head + (struct.pack(order + "HH", 8, 0) if big else b"") + struct.pack(order + offset, starts[0]) + body


def plain(**changes: tuple[int, list[int]]) -> dict[int, tuple[int, list[int]]]:
    """Make the tags of a page of 16x16 gray 16-bit zeros; keywords such as t259 replace them."""
    tags = {256: (3, [16]), 257: (3, [16]), 258: (3, [16]), 259: (3, [1]), 262: (3, [1]), 273: (4, [16]),
            277: (3, [1]), 278: (3, [16]), 279: (4, [496])}  # fmt: skip
    tags[279] = (4, [512])
    tags[273] = (4, [8])
    return tags | {int(name[1:]): value for name, value in changes.items()}
