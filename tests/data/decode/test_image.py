"""Decoding of every image format, and errors for files that only look like images."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from helpers.images import JPEG, PIXELS, PNG, SMOOTH, encoded
from pixmim.data.dataset import BadImage, ImageSpec
from pixmim.data.decode.image import decode


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_are_exact(kind: str) -> None:
    assert np.array_equal(decode(encoded(Image.fromarray(PIXELS), kind)), PIXELS)


def test_webp_and_gif() -> None:
    assert np.array_equal(decode(encoded(Image.fromarray(PIXELS), "WEBP", lossless=True)), PIXELS)
    grey = Image.fromarray(SMOOTH)
    assert np.array_equal(decode(encoded(grey, "GIF"))[..., 0], SMOOTH)


@pytest.mark.parametrize("options", [{"quality": 90}, {"quality": 75, "progressive": True}, {"subsampling": 0}])
def test_jpeg_gives_pillows_pixels(options: dict[str, object]) -> None:
    data = encoded(Image.fromarray(PIXELS), "JPEG", **options)
    assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data))))


def test_grey_jpeg_becomes_color_and_color_becomes_grey() -> None:
    data = encoded(Image.fromarray(SMOOTH), "JPEG")
    assert decode(data).shape == (20, 30, 3)
    assert decode(data, ImageSpec(1)).shape == (20, 30, 1)
    color = encoded(Image.merge("RGB", [Image.fromarray(p) for p in (SMOOTH, SMOOTH[::-1], SMOOTH)]), "JPEG")
    expected = np.asarray(Image.open(io.BytesIO(color)).convert("L"), int)
    assert abs(decode(color, ImageSpec(1))[..., 0].astype(int) - expected).max() <= 1


def test_cmyk_palette_bilevel() -> None:
    cmyk = Image.fromarray(PIXELS).convert("CMYK")
    data = encoded(cmyk, "JPEG", quality=95)
    assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    palette = Image.fromarray(PIXELS).quantize(16)
    assert np.array_equal(decode(encoded(palette, "PNG")), np.asarray(palette.convert("RGB")))
    bilevel = Image.fromarray(SMOOTH).point(lambda v: 255 * (v > 99)).convert("1")
    assert set(np.unique(decode(encoded(bilevel, "PNG")))) == {0, 255}


def test_transparency_is_composited_on_white() -> None:
    alpha = np.dstack([PIXELS, np.zeros((20, 30), np.uint8)])
    assert (decode(encoded(Image.fromarray(alpha), "PNG")) == 255).all()
    palette = Image.fromarray(SMOOTH).quantize(4)
    palette.info["transparency"] = 0
    found = decode(encoded(palette, "PNG", transparency=0))
    assert (found[np.asarray(palette) == 0] == 255).all()
    grey = Image.merge("LA", [Image.fromarray(SMOOTH), Image.new("L", (30, 20), 255)])
    assert np.array_equal(decode(encoded(grey, "PNG"))[..., 0], SMOOTH)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(PIXELS), kind, exif=exif)
    plain = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    turned = {
        1: plain, 2: plain[:, ::-1], 3: plain[::-1, ::-1], 4: plain[::-1], 5: plain.transpose(1, 0, 2),
        6: np.rot90(plain, -1), 7: plain[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(plain),
    }[orientation]  # fmt: skip
    assert np.array_equal(decode(data), turned)


@pytest.mark.parametrize("before", [b"\xff\xe2\xff\x00" + bytes(65278), b"\xff\xff", b"\xff\xdb\x00\x43" + bytes(65)])
def test_exif_after_a_profile_fill_bytes_and_tables(before: bytes) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.fromarray(PIXELS), "JPEG", exif=exif)
    assert np.array_equal(decode(data[:2] + before + data[2:]), decode(data))
    assert decode(data).shape == (30, 20, 3)


def test_sixteen_bits_are_rounded_to_eight() -> None:
    deep = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    expected = np.round(deep / 257).astype(np.uint8)
    for kind in ("PNG", "TIFF"):
        assert np.array_equal(decode(encoded(Image.fromarray(deep), kind))[..., 1], expected)


def test_an_animation_shows_its_first_frame() -> None:
    first, second = Image.new("L", (9, 9), 10), Image.new("L", (9, 9), 200)
    data = encoded(first, "GIF", save_all=True, append_images=[second])
    assert (decode(data) == 10).all()


def bomb() -> bytes:
    """A PNG of a few bytes that claims 60,000 x 60,000 pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<html><body>Not found</body></html>", "not an image"),
        (JPEG[: len(JPEG) // 2], "truncated|Premature|OSError"),
        (JPEG[:2], "not an image"),
        (b"\xff\xd8\xff" + bytes(200), "not an image|OSError|SyntaxError"),
        (PNG[: len(PNG) // 2], "truncated|OSError|SyntaxError"),
        (bomb(), "PIXMIM_MAX_PIXELS"),
        (encoded(Image.new("RGB", (3000, 2)), "PNG"), "aspect ratio is above 100"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "measurements.*--dtype float32"),
    ],
)
def test_files_that_are_not_images_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        decode(data)


def test_image_of_one_pixel() -> None:
    assert decode(encoded(Image.new("RGB", (1, 1), "red"), "PNG")).tolist() == [[[255, 0, 0]]]
