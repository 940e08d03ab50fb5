"""TIFFs of many channels, 16-bit color and measurements, written by tifffile and read back."""

import io
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.images import encoded
from pixmim.data.dataset import BadImage, ImageSpec
from pixmim.data.decode.channels import apply_exif_orientation
from pixmim.data.decode.image import decode

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")

RNG = np.random.default_rng(0)
BANDS = RNG.integers(0, 10_000, (20, 30, 13), np.uint16)
HEIGHTS = RNG.normal(300, 500, (20, 30)).astype(np.float32)
COLOR = RNG.integers(0, 65536, (20, 30, 3), np.uint16)


def written(pixels: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("compression", [None, "deflate", "lzw", "zstd"])
@pytest.mark.parametrize("layout", ["contig", "separate"])
@pytest.mark.parametrize("more", [{}, {"bigtiff": True}, {"tile": (16, 16)}, {"byteorder": ">"}, {"predictor": True}])
def test_thirteen_channels_of_sixteen_bits(
    compression: str | None, layout: str, more: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    if compression is None and "predictor" in more:
        more = {}  # nothing to predict
    pixels = BANDS if layout == "contig" else BANDS.transpose(2, 0, 1)
    data = written(pixels, photometric="minisblack", planarconfig=layout, compression=compression, **more)
    found = decode(data, ImageSpec(13, "uint16"))
    assert found.dtype == np.uint16 and np.array_equal(found, BANDS) and found.flags.c_contiguous
    shares = decode(data, ImageSpec(13, "float32"))
    assert shares.dtype == np.float32 and np.array_equal(shares, BANDS.astype(np.float32) / np.float32(65535))
    assert np.array_equal(decode(data, ImageSpec(13)), np.round(BANDS / 257).astype(np.uint8))
    assert not caplog.records  # Python prints what Pillow logs as an error, for each image


def test_16_bit_color_keeps_its_bits_unless_the_run_is_uint8() -> None:
    data = written(COLOR, photometric="rgb")
    assert np.array_equal(decode(data, ImageSpec(3, "uint16")), COLOR)
    assert abs(decode(data).astype(int) - COLOR / 257).max() < 1  # Pillow's upper byte
    luma = decode(data, ImageSpec(1, "uint16"))[..., 0]
    assert abs(luma - COLOR @ [0.299, 0.587, 0.114]).max() < 2
    grey = written(COLOR[..., 0], photometric="minisblack")
    assert np.array_equal(decode(grey, ImageSpec(3, "uint16")), COLOR[..., :1].repeat(3, axis=2))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("compression", [None, "deflate"])
@pytest.mark.parametrize("opacity", [None, "unassalpha", "assocalpha"])
@pytest.mark.parametrize("channels", [1, 3])
def test_planes_and_interleaved_channels_are_one_image(
    dtype: str, compression: str | None, opacity: str | None, channels: int
) -> None:
    pixels = RNG.integers(0, np.iinfo(dtype).max, (16, 20, channels), dtype)
    opaque = np.full((16, 20, 1), np.iinfo(dtype).max, dtype)
    if opacity:
        pixels = np.concatenate([pixels, opaque], axis=2)
    options: dict[str, Any] = {"photometric": "rgb" if channels == 3 else "minisblack", "compression": compression}
    options["extrasamples"] = [opacity] if opacity else None
    expected = pixels[..., :channels] / np.float64(np.iinfo(dtype).max)
    for layout in ("contig", "separate"):
        stored = pixels if layout == "contig" else pixels.transpose(2, 0, 1)
        data = written(stored if pixels.shape[2] > 1 else pixels[..., 0], planarconfig=layout, **options)
        for kind, white in (("uint8", 255), ("uint16", 65535), ("float32", 1)):
            found = decode(data, ImageSpec(channels, kind)) / np.float64(white)  # type: ignore[arg-type]
            assert abs(found - expected).max() < 1 / 255 + 1e-9, (layout, kind)


def test_min_is_white_is_inverted() -> None:
    for pixels in (COLOR[..., 0], COLOR[..., 0].astype(np.uint8)):
        data = written(pixels, photometric="miniswhite")
        number = str(pixels.dtype)
        assert np.array_equal(decode(data, ImageSpec(1, number))[..., 0], ~pixels)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int8, np.int16, np.int32, np.uint32])
def test_measurements_are_unchanged(kind: type) -> None:
    values = RNG.integers(0 if kind == np.uint32 else -100, 100, (20, 30)).astype(kind)
    data = written(values, photometric="minisblack", compression="deflate")
    assert np.array_equal(decode(data, ImageSpec(1, "float32"))[..., 0], values.astype(np.float32))
    for number in ("uint8", "uint16"):
        with pytest.raises(BadImage, match=r"are measurements.*--dtype float32.*pixmim stats"):
            decode(data, ImageSpec(1, number))  # type: ignore[arg-type]


def test_missing_values_are_refused() -> None:
    for value, times in ((np.nan, 1), (np.inf, 3)):
        holes = HEIGHTS.copy()
        holes.flat[:times] = value
        with pytest.raises(BadImage, match=f"{times} of its values are not finite"):
            decode(written(holes, predictor=3, compression="deflate"), ImageSpec(1, "float32"))
    with pytest.raises(BadImage, match="not finite"):
        decode(written(np.full((9, 9), 1e300)), ImageSpec(1, "float32"))


def test_a_fourth_channel_is_transparency_only_if_it_is_tagged_so() -> None:
    four = RNG.integers(0, 256, (20, 30, 4), np.uint8)
    for options in ({"photometric": "rgb", "extrasamples": ["unspecified"]}, {"photometric": "minisblack"}):
        data = written(four, planarconfig="contig", **options)
        assert np.array_equal(decode(data, ImageSpec(4)), four)
        with pytest.raises(BadImage, match="4 channels instead of 3: pass --channels 4"):
            decode(data)
    for kind in (np.uint8, np.uint16):
        white = np.iinfo(kind).max
        pixels = RNG.integers(0, white + 1, (20, 30, 4)).astype(kind)
        share = pixels[..., 3:] / white
        data = written(pixels, photometric="rgb", extrasamples=["unassalpha"])
        found = decode(data, ImageSpec(3, kind.__name__))  # type: ignore[arg-type]
        assert abs(found - (pixels[..., :3] * share + white * (1 - share))).max() <= 1
        own = np.dstack([pixels[..., :3] * share, pixels[..., 3]]).astype(kind)
        deep = decode(written(own, photometric="rgb", extrasamples=["assocalpha"]), ImageSpec(3, "uint16"))
        assert abs(deep / 65535 - found / white).max() <= 3 / white
        with pytest.raises(BadImage, match="3 channels instead of 4"):
            decode(data, ImageSpec(4, "uint16"))
    with pytest.raises(BadImage, match="measurements with transparency"):
        decode(
            written(four.astype(np.float32), photometric="rgb", extrasamples=["unassalpha"]), ImageSpec(3, "float32")
        )


def test_pages_as_channels() -> None:
    stack = BANDS.transpose(2, 0, 1)
    data = written(stack, photometric="minisblack")
    assert np.array_equal(decode(data, ImageSpec(1, "uint16"))[..., 0], stack[0])
    assert np.array_equal(decode(data, ImageSpec(13, "uint16", "channels")), BANDS)
    with pytest.raises(
        BadImage, match=r"1 channel instead of 13: pass --channels 1; or --tiff-pages channels, for its 13 pages"
    ):
        decode(data, ImageSpec(13, "uint16"))
    with pytest.raises(BadImage, match="13 channels instead of 12"):
        decode(data, ImageSpec(12, "uint16", "channels"))
    eight = [Image.fromarray(plane) for plane in (stack // 257).astype(np.uint8)]
    found = decode(
        encoded(eight[0], "TIFF", save_all=True, append_images=eight[1:]), ImageSpec(13, "uint8", "channels")
    )
    assert np.array_equal(found, BANDS // 257)
    assert np.array_equal(decode(written(BANDS, planarconfig="contig", photometric="minisblack"),
                                 ImageSpec(13, "uint16", "channels")), BANDS)  # fmt: skip
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:  # an overview is not a channel
        file.write(stack[:2], photometric="minisblack")
        file.write(stack[2], photometric="minisblack", subfiletype=1)
        file.write(stack[0, ::2, ::2], photometric="minisblack")
    assert np.array_equal(decode(buffer.getvalue(), ImageSpec(2, "uint16", "channels")), BANDS[..., :2])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite", "rgb", "rgb separate", "bands", "bands separate"])
@pytest.mark.parametrize(
    "kind", ["1", "2", "4", "6", "u8", "10", "12", "14", "u16", "u32", "i8", "i16", "i32", "f16", "f32", "f64"]
)
def test_every_sample_format_equals_tifffile(kind: str, photometric: str, order: str) -> None:
    name, _, planar = photometric.partition(" ")
    channels = {"rgb": 3, "bands": 5}.get(name, 1)
    options: dict[str, Any] = {"photometric": "minisblack" if name == "bands" else name, "byteorder": order}
    if channels > 1:
        options["planarconfig"] = planar or "contig"
    if kind.isdigit():
        if channels > 1:
            return  # tifffile writes packed values of one channel only
        most = 2 ** int(kind) - 1
        values = RNG.integers(0, most + 1, (20, 32)).astype(np.uint8 if most < 256 else np.uint16)
        values = values.astype(bool) if most == 1 else values
        options |= {"bitspersample": int(kind)} if most > 1 else {}
    else:
        dtype = np.dtype(f"{kind[0]}{int(kind[1:]) // 8}")
        most = np.iinfo(dtype).max if dtype.kind == "u" else 1
        values = (RNG.random((20, 32, channels)) * 120 * (257 if dtype == np.uint16 else 1)).astype(dtype)
        values = np.moveaxis(values, 2, 0) if planar else values[..., 0] if channels == 1 else values
    try:
        data = written(values, **options)
    except NotImplementedError:
        pytest.skip(f"this imagecodecs does not write integers of {kind} bits")
    truth = tifffile.imread(io.BytesIO(data)).astype(np.float64)
    truth = np.moveaxis(truth, 0, 2) if planar else truth
    if kind.isdigit() or dtype in (np.uint8, np.uint16):
        truth = (most - truth if name == "miniswhite" else truth) / most
    found = decode(data, ImageSpec(channels, "float32"))
    if channels == 1:
        truth = truth[..., None]
    assert abs(found - truth).max() < (1e-5 if kind != "6" else 0.5 / 255)  # six bits are rounded to eight


def test_lab_becomes_srgb() -> None:
    """By the formulas of CIE and sRGB, D50 adapted to D65."""
    colors = np.asarray([[200, 60, 50], [60, 200, 70], [40, 50, 160], [128, 128, 128], [200, 150, 20], [20, 30, 90]])
    share = colors / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    to_d50 = [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
    ratio = linear @ np.asarray(to_d50).T / [0.96422, 1, 0.82521]
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)
    stored = np.concatenate([lab[:, :1] * 2.55, lab[:, 1:] % 256], axis=1).round() % 256
    pixels = np.tile(stored.astype(np.uint8)[None], (20, 1, 1))
    found = decode(written(pixels, photometric="cielab"))
    assert abs(found[0].astype(int) - colors).max() <= 8
    with pytest.raises(BadImage, match="save it as grey or RGB"):
        decode(written(np.moveaxis(pixels, 2, 0), photometric="cielab", planarconfig="separate"))


def test_a_thumbnail_before_the_image_is_skipped() -> None:
    image, small = (RNG.integers(0, 256, (side, side, 3), np.uint8) for side in (32, 8))
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as file:
        file.write(small, photometric="rgb", subfiletype=1)
        file.write(image, photometric="rgb")
        file.write(image[::2, ::2], photometric="rgb", subfiletype=1)
    for pages in ("first", "channels"):
        assert np.array_equal(decode(buffer.getvalue(), ImageSpec(3, "uint8", pages)), image)  # type: ignore[arg-type]
    with pytest.raises(BadImage, match=r"3 channels instead of 4: pass --channels 3$"):
        decode(buffer.getvalue(), ImageSpec(4))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation: int) -> None:
    tag = [(274, "H", 1, orientation, True)]
    data = written(COLOR, photometric="rgb", extratags=tag)
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain = encoded(Image.fromarray((COLOR // 257).astype(np.uint8)), "PNG", exif=exif)
    assert np.array_equal(decode(data, ImageSpec(3, "uint16")) // 257, decode(plain))
    assert np.array_equal(apply_exif_orientation(COLOR, orientation), decode(data, ImageSpec(3, "uint16")))


@pytest.mark.usefixtures("usual_bounds")
def test_refused_before_memory_is_allocated() -> None:
    for pixels, options, reason in (
        (np.zeros((4, 1000), np.uint16), {"photometric": "minisblack"}, "aspect ratio is above 100"),
        (
            np.zeros((20, 20, 20), np.uint16),
            {"volumetric": True, "tile": (16, 16, 16), "photometric": "minisblack"},
            "axes ZYX",
        ),
        (COLOR[..., :1].repeat(4, 2), {"photometric": "separated"}, "SEPARATED of 16 bits"),
        (COLOR[..., 0].astype(np.complex64), {}, "bits per value"),
    ):
        with pytest.raises(BadImage, match=reason):
            decode(written(pixels, **options), ImageSpec(3, "uint16"))
    bomb = bytearray(written(np.zeros((16, 16, 13), np.uint16), photometric="minisblack", planarconfig="contig"))
    with tifffile.TiffFile(io.BytesIO(bytes(bomb))) as file:
        sides = [file.pages[0].tags[name].valueoffset for name in ("ImageWidth", "ImageLength")]
    for at in sides:
        bomb[at : at + 2] = (10_900).to_bytes(2, "little")
    with pytest.raises(BadImage, match=r"2\.9 GiB are more than the 1 allowed"):
        decode(bytes(bomb), ImageSpec(13, "uint16"))


def test_damage_gives_pixels_or_bad_image(capfd: pytest.CaptureFixture[str]) -> None:
    """Truncation and flipped bytes raise nothing else, print nothing and do not hang."""
    form = ImageSpec(13, "uint16")
    for options in ({}, {"compression": "deflate", "predictor": True}, {"tile": (16, 16), "compression": "lzw"}):
        data = written(BANDS, photometric="minisblack", planarconfig="contig", **options)
        for end in (8, 100, len(data) // 3, len(data) - 40):
            with suppress(BadImage):
                assert np.array_equal(decode(data[:end], form), BANDS)  # only the padding is lost
        for _ in range(60):
            damaged = bytearray(data)
            for at in RNG.integers(0, min(len(data), 600), 4):
                damaged[at] ^= int(RNG.integers(1, 256))
            with suppress(BadImage):
                assert decode(bytes(damaged), form).dtype == np.uint16
    assert capfd.readouterr() == ("", "")


def test_missing_tifffile_is_named(monkeypatch: pytest.MonkeyPatch, pictures: Path) -> None:
    data = written(BANDS, photometric="minisblack", planarconfig="contig")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(BadImage, match=r"pip install 'pixmim\[tiff\]'"):
        decode(data, ImageSpec(13, "uint16"))
    plain = written(COLOR, photometric="rgb")
    assert decode(plain).dtype == np.uint8  # Pillow reads eight bits
    assert decode(encoded(Image.fromarray(COLOR[..., 0]), "TIFF"), ImageSpec(1, "uint16")).dtype == np.uint16
