"""Conversion of channels and dtypes, .npy files, 16-bit PNG and PPM, and crops of 16-bit images."""

import io
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from helpers.images import encoded
from pixmim.data.dataset import BadImage, ImageSpec
from pixmim.data.decode.channels import convert
from pixmim.data.decode.image import decode, read
from pixmim.data.synthetic import SyntheticShapes
from pixmim.transforms.crops import (
    CenterCrop,
    Crop,
    RandomResizedCrop,
    SimpleResizedCrop,
    flip_and_normalize,
    resize_to_cover,
)
from pixmim.transforms.images import stack_images

RNG = np.random.default_rng(0)
DEEP = RNG.integers(0, 65536, (20, 30, 3), np.uint16)


def saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_unsigned_dtypes_convert_exactly() -> None:
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    deep = convert(eight, ImageSpec(1, "uint16"))
    assert np.array_equal(deep, eight.astype(np.uint16) * 257)
    assert np.array_equal(convert(deep, ImageSpec(1)), eight)
    assert np.array_equal(convert(eight, ImageSpec(1, "float32")), eight.astype(np.float32) / np.float32(255))
    assert np.array_equal(convert(deep, ImageSpec(1, "float32")), convert(eight, ImageSpec(1, "float32")))
    every = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1)
    assert np.array_equal(convert(every, ImageSpec(1)), np.round(every / 257).astype(np.uint8))
    assert np.array_equal(convert(every > 99, ImageSpec(1)), np.where(every > 99, 255, 0))


def test_luma_is_pillows() -> None:
    color = RNG.integers(0, 256, (40, 40, 3), np.uint8)
    assert np.array_equal(convert(color, ImageSpec(1))[..., 0], np.asarray(Image.fromarray(color).convert("L")))
    exact = color @ (np.asarray([19595, 38470, 7471]) / 65536)
    assert abs(convert(color.astype(np.uint16) * 257, ImageSpec(1, "uint16"))[..., 0] - exact * 257).max() <= 0.5
    assert np.allclose(convert(color.astype(np.float64), ImageSpec(1, "float32"))[..., 0], exact)
    masks = color > 99
    assert np.array_equal(convert(masks, ImageSpec(1)), convert(masks.astype(np.uint8) * 255, ImageSpec(1)))
    with pytest.raises(BadImage, match="int16 values are measurements"):
        convert(color.astype(np.int16), ImageSpec(1))
    white = np.full((2, 2, 3), 65535, np.uint16)
    assert (convert(white, ImageSpec(1, "uint16")) == 65535).all()


def test_channel_mismatch_names_the_flag() -> None:
    for channels, expected in ((2, 3), (4, 3), (13, 1), (3, 13), (1, 2)):
        with pytest.raises(BadImage, match=f"^{channels} channels? instead of {expected}: pass --channels {channels}$"):
            convert(np.zeros((4, 4, channels), np.uint8), ImageSpec(expected))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32, np.float64, ">u2", ">f4", bool])
def test_npy_of_each_layout(kind: object) -> None:
    pixels = (RNG.random((20, 30, 5)) * 200).astype(kind)  # type: ignore[call-overload]
    form = ImageSpec(5, "float32")
    expected = convert(pixels.astype(pixels.dtype.newbyteorder("=")), form)
    for array in (pixels, pixels.transpose(2, 0, 1), np.asfortranarray(pixels), pixels[:, ::-1][:, ::-1]):
        assert np.array_equal(decode(saved(array), form), expected)
    assert np.array_equal(decode(saved(pixels[..., 0]), ImageSpec(1, "float32")), expected[..., :1])
    assert read(saved(np.zeros((7, 9, 7), np.uint8))).shape == (7, 9, 7)  # if equal, the last holds the channels


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (saved(np.zeros(5)), "1 dimensions"),
        (saved(np.zeros((2, 2, 2, 2))), "4 dimensions"),
        (saved(np.asarray([["a"]])), "instead of numbers"),
        (saved(np.zeros((3, 3), complex)), "instead of numbers"),
        (saved(np.zeros((3, 3), [("x", "f4")])), "instead of numbers"),
        (saved(np.asarray([[{}]], object)), "instead of numbers"),
        (saved(np.zeros((20, 20)))[:-1], "truncated"),
        (saved(np.zeros((0, 20))), "is empty"),
        (saved(np.zeros((20, 20, 0))), "is empty|without channels"),
        (saved(np.zeros((1, 200))), "aspect ratio is above 100"),
        (saved(np.zeros((4, 4)))[:20], "damaged"),
        (b"\x93NUMPY\x09\x00", "damaged"),
        (saved(np.full((4, 4), np.nan, np.float32)), "16 of its values are not finite"),
    ],
)
def test_invalid_npy(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason):
        decode(data, ImageSpec(1, "float32"))


@pytest.mark.usefixtures("usual_bounds")
def test_npy_header_allocates_no_memory() -> None:
    small = saved(np.zeros((10, 10, 4)))
    for shape, reason in (
        (b"(99999, 99999, 4)", "allowed"),
        (b"(9999, 9999, 4)", "3.0 GiB"),
        (b"(999, 999, 4)", "truncated"),
    ):
        claim = small.replace(b"(10, 10, 4), }" + b" " * (len(shape) - 11), shape + b", }")
        assert claim != small and len(claim) == len(small)
        tracemalloc.start()
        with pytest.raises(BadImage, match=reason):
            decode(claim, ImageSpec(4, "float32"))
        assert tracemalloc.get_traced_memory()[1] < 10**6
        tracemalloc.stop()


def test_sixteen_bit_png_and_ppm(monkeypatch: pytest.MonkeyPatch) -> None:
    imagecodecs = pytest.importorskip("imagecodecs")
    data = imagecodecs.png_encode(DEEP)
    assert np.array_equal(decode(data, ImageSpec(3, "uint16")), DEEP)
    assert np.array_equal(decode(data), DEEP >> 8)  # Pillow's upper byte
    clear = imagecodecs.png_encode(np.dstack([DEEP, np.zeros((20, 30), np.uint16)]))
    assert (decode(clear, ImageSpec(3, "uint16")) == 65535).all()
    for cut in (40, len(data) // 2):
        with pytest.raises(BadImage, match=r"Png|OSError|SyntaxError|not an image"):
            decode(data[:cut], ImageSpec(3, "uint16"))
    grey = encoded(Image.fromarray(DEEP[..., 0]), "PNG")
    assert np.array_equal(decode(grey, ImageSpec(3, "uint16"))[..., 2], DEEP[..., 0])
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    assert np.array_equal(decode(grey, ImageSpec(1, "uint16"))[..., 0], DEEP[..., 0])
    assert decode(data).shape == (20, 30, 3)
    with pytest.raises(BadImage, match=r"16-bit color PNG needs imagecodecs: pip install 'pixmim\[tiff\]'"):
        decode(data, ImageSpec(3, "uint16"))
    grey = b"P5 30 20 65535\n" + DEEP[..., 0].astype(">u2").tobytes()
    assert np.array_equal(decode(grey, ImageSpec(1, "uint16"))[..., 0], DEEP[..., 0])
    color = b"P6 30 20 65535\n" + DEEP.astype(">u2").tobytes()
    assert abs(decode(color).astype(int) - DEEP / 257).max() <= 1
    with pytest.raises(BadImage, match="save it as PNG or TIFF"):
        decode(color, ImageSpec(3, "uint16"))


@pytest.mark.parametrize(
    "form",
    [ImageSpec(1, "uint16"), ImageSpec(3, "float32"), ImageSpec(13), ImageSpec(5, "uint16"), ImageSpec(2, "float32")],
)
def test_synthetic_shapes_in_any_form(form: ImageSpec) -> None:
    image, plain = SyntheticShapes(image_spec=form).image(3), SyntheticShapes().image(3)
    assert image.dtype == form.torch_dtype and image.shape == (form.channels, *plain.shape[1:])
    assert len({tuple(plane.flatten().tolist()) for plane in image}) == min(form.channels, 6)
    if form.channels >= 3:
        white = 1 if form.dtype == "float32" else torch.iinfo(form.torch_dtype).max
        torch.testing.assert_close(image[:3].float() / white, plain.float() / 255)


@pytest.mark.parametrize("crop", [SimpleResizedCrop((24, 16), 3), RandomResizedCrop((24, 16)), CenterCrop((24, 16))])
@pytest.mark.parametrize("size", [(40, 50), (24, 16)])
def test_crops_of_uint16_equal_those_of_float32(crop: Crop, size: tuple[int, int]) -> None:
    """A uint16 crop equals the float32 crop, rounded and clamped to 16 bits."""
    image = torch.from_numpy(RNG.choice([0, 1, 255, 32768, 65535], (*size, 5)).astype(np.uint16)).permute(2, 0, 1)
    for u in RNG.random((6, crop.num_uniforms)).tolist():
        deep, values = crop.crop(image, u), crop.crop(image.float(), u)
        assert deep.dtype == torch.uint16 and deep.shape == (5, 24, 16)
        assert torch.equal(deep.float(), values.round().clamp(0, 65535))
    assert resize_to_cover(image, size) is image


def test_normalize_scales_65535_to_one() -> None:
    images = torch.from_numpy(RNG.integers(0, 65536, (3, 2, 4, 5)).astype(np.uint16))
    mean, std, flip = torch.tensor([0.1, 0.6]), torch.tensor([0.02, 0.5]), torch.tensor([True, False, True])
    done = flip_and_normalize(images, flip, mean, std).double()
    expected = (images.double() / 65535 - mean.double().view(-1, 1, 1)) / std.double().view(-1, 1, 1)
    expected[flip] = expected[flip].flip(-1)
    torch.testing.assert_close(done, expected, atol=2e-6, rtol=1e-6)
    assert torch.equal(stack_images(list(images)), images) and stack_images(list(images)).dtype == torch.uint16
