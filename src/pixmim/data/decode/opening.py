"""Open image files with Pillow: only of the formats that are promised, and only once their claims were checked."""

import io

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from pixmim.data.dataset import BadImage
from pixmim.data.decode import ifd, jpeg, sizes
from pixmim.data.decode.kinds import HEAD, about
from pixmim.data.decode.limits import VARIABLE, check_size, max_pixels

_PLUGINS = (  # imported, so that Pillow need not look for them among all the others
    BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, PpmImagePlugin, TiffImagePlugin, WebPImagePlugin,
)  # fmt: skip

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM")
"""Every format that an image may have. Nothing else is ever opened, whatever a file is called or begins with."""


def open_image(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """Open an image file as `Image.open` does: only its header is read, the caller loads the pixels.

    The format is decided by content, among `formats`. Decode pixels under `timing.limited`.

    Args:
        data: The file's content.
        formats: Some of FORMATS.

    Raises:
        BadImage: If it has none of these formats, is damaged, or claims more than is allowed.
    """
    if data[:3] == b"\xff\xd8\xff":
        data = jpeg.look(data).stripped(data)
    elif data[:4] in ifd.MAGIC and "TIFF" in formats:
        return open_plain(ifd.checked(data), ("TIFF",))
    return open_plain(data, tuple(name for name in formats if name != "TIFF"))


def open_plain(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    """Open an image file that was looked at before: a TIFF by `ifd.checked`, a JPEG by `jpeg.look`.

    Raises:
        BadImage: As `open_image`. UnidentifiedImageError, which is Pillow's, is its cause if no format was recognised.
    """
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        check_size(*sizes.webp(data))  # Pillow takes memory for it when it opens the file
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels() > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels()  # Pillow refuses twice as many
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError as error:
        kind = about(data[:HEAD])
        raise BadImage("not a picture in a known format" + f", but {kind}" * bool(kind)) from error
    except Image.DecompressionBombError:
        raise BadImage(f"more than the {max_pixels():,} pixels allowed on this machine (see {VARIABLE})") from None
    except Exception as error:  # Pillow raises almost anything on damaged files
        raise BadImage(f"{type(error).__name__}: {error}") from None
    check_size(*image.size)
    return image
