"""What is refused before memory is taken for it: bombs, mistakes, and pictures of no use."""

from pixmim.data.source import BadImage

MAX_PIXELS = 120_000_000
"""A picture that claims more pixels is refused before it is decoded: a decompression bomb, or a mistake."""

MAX_ASPECT = 100
"""A picture longer than this many times its width is refused: resizing its short edge would fill the memory."""

MAX_BYTES = 2**30
"""A file of more bytes is refused before it is read, and an array of more before it is made."""


def check_size(width: int, height: int) -> None:
    """Raises BadImage for a picture of no pixels, too many, or too long a shape."""
    if min(width, height) < 1:
        raise BadImage(f"{width}x{height} pixels: there is nothing in it")
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}x{height} pixels are more than the {MAX_PIXELS:,} allowed")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage(f"{width}x{height} pixels: more than {MAX_ASPECT} times as long as wide")


def check_bytes(count: int) -> None:
    """Raises BadImage for a file or an array of too many bytes."""
    if count > MAX_BYTES:
        raise BadImage(f"{count / 2**30:.1f} GiB are more than the {MAX_BYTES / 2**30:.0f} allowed: cut it into tiles")
