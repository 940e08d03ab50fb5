"""Pixels without data in GeoTIFFs: filled, left out of mean and std, and counted."""

import io
from pathlib import Path

import numpy as np
import pytest

from pixmim.data import open_dataset, statistics
from pixmim.data.dataset import BadImage, ImageSpec
from pixmim.data.decode.image import decode

tifffile = pytest.importorskip("tifffile")

RNG = np.random.default_rng(4)


def written(pixels: np.ndarray, no_data: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, extratags=[(42113, "s", 0, no_data, True)], planarconfig="contig", **options)
    return buffer.getvalue()


def holes(dtype: str, value: float, channels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels (h w c) with holes, and where they are."""
    pixels = RNG.integers(1, 200, (20, 30, channels)).astype(dtype)
    missing = np.zeros(pixels.shape, bool)
    missing[:5, :12] = True
    missing[9, 9, 0] = True  # in one channel only
    pixels[missing] = value
    return pixels, missing


@pytest.mark.parametrize(
    ("dtype", "value", "spec"),
    [
        ("uint8", "0", ImageSpec(3)),
        ("uint16", "65535", ImageSpec(3, "uint16")),
        ("int16", "-9999", ImageSpec(3, "float32")),
        ("float32", "-3.4028234663852886e+38", ImageSpec(3, "float32")),
        ("float32", "nan", ImageSpec(3, "float32")),
    ],
)
@pytest.mark.parametrize("options", [{}, {"compression": "zlib", "tile": (16, 16)}])
def test_they_take_the_mean_of_the_other_values_of_their_channel(
    dtype: str, value: str, spec: ImageSpec, options: dict[str, object]
) -> None:
    pixels, missing = holes(dtype, float(value))
    result = decode(written(pixels, value, photometric="rgb" if dtype[0] == "u" else "minisblack", **options), spec)
    for k in range(3):
        mean = pixels[..., k][~missing[..., k]].astype(np.float64).mean()
        expected = np.where(missing[..., k], np.rint(mean) if dtype != "float32" else mean, pixels[..., k])
        np.testing.assert_allclose(result[..., k], expected, rtol=1e-6)


@pytest.mark.parametrize("value", ["", "none", "-1", "256", "0.5", "inf", "1e400"])
def test_a_value_that_no_pixel_can_have_changes_nothing(value: str) -> None:
    pixels = RNG.integers(0, 256, (9, 9, 3), np.uint8)
    assert np.array_equal(decode(written(pixels, value, photometric="rgb")), pixels)


def test_values_are_compared_as_they_are_in_the_file() -> None:
    """Before 16 bits become 8, indices become colors, and white that is stored as zero is inverted."""
    for value, dtype in (("65535", "uint16"), ("0", "uint16"), ("0", "uint8")):
        pixels, missing = holes(dtype, float(value))
        found = decode(written(pixels, value, photometric="rgb"), ImageSpec(3, "uint8"))
        means = [pixels[..., k][~missing[..., k]].mean() for k in range(3)]
        assert abs(found - np.where(missing, means, pixels) / (257 if dtype == "uint16" else 1)).max() <= 0.51
    shades, missing = holes("uint8", 0, 1)
    for bits in (8, 16):
        stored = shades.astype(f"u{bits // 8}")
        data = written(stored[..., 0], "0", photometric="miniswhite")
        mean = (2**bits - 1) - stored[~missing].mean()
        found = decode(data, ImageSpec(1, "uint16"))[missing]
        assert abs(found - mean * (257 if bits == 8 else 1)).max() <= (129 if bits == 8 else 0.5)
    palette = np.zeros((3, 256), np.uint16)
    palette[:, 1:4] = 65535 * np.eye(3, dtype=np.uint16)
    indices = RNG.integers(0, 4, (20, 30), np.uint8)  # 0 is black, and no data
    found = decode(written(indices, "0", photometric="palette", colormap=palette))
    assert np.array_equal(found[indices > 0], 255 * np.eye(3, dtype=np.uint8)[indices[indices > 0] - 1])
    assert (found[indices == 0] == np.rint(found[indices > 0].mean(axis=0))).all()


def test_an_image_with_too_little_data_is_left_out() -> None:
    data = written(holes("uint8", 0)[0], "0", photometric="rgb")  # 61 of 600 pixels
    decode(data, ImageSpec(max_no_data=0.11))
    with pytest.raises(BadImage, match=r"10% of its pixels have no data .*--max-no-data 0\.1"):
        decode(data, ImageSpec(max_no_data=0.1))
    with pytest.raises(BadImage, match="channel 1 has no data"):
        decode(written(np.zeros((9, 9, 3), np.uint8), "0", photometric="rgb"))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_mean_and_std_are_those_of_the_pixels_with_data(tmp_path: Path, dtype: str) -> None:
    means, variances, white = [], [], {"uint8": 255, "uint16": 65535, "float32": 1}[dtype]
    for i in range(4):
        pixels, missing = holes(dtype, 0)
        kind = "rgb" if dtype != "float32" else "minisblack"
        (tmp_path / f"{i}.tif").write_bytes(written(pixels, "0", photometric=kind))
        values = [pixels[..., k][~missing[..., k]].astype(np.float64) / white for k in range(3)]
        means.append([v.mean() for v in values])
        variances.append([v.var() for v in values])
    data = open_dataset(str(tmp_path), ImageSpec(3, dtype))  # type: ignore[arg-type]
    result = statistics.measure(data, list(range(4)), threads=1)
    rounding = 0.5 / white if dtype != "float32" else 0
    np.testing.assert_allclose(result.mean, np.mean(means, 0), atol=rounding / 5 + 1e-6)
    spread = np.mean(variances, 0) + np.var(means, 0)
    np.testing.assert_allclose(result.std, np.sqrt(spread), rtol=1e-3)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("value", ["-9999", "nan"])
def test_percentiles_and_statistics_are_those_of_the_pixels_with_data(tmp_path: Path, dtype: str, value: str) -> None:
    """Whatever their share, also where they are clipped."""
    values = RNG.exponential(300, (40, 30)).astype(np.float32)
    holed = values.copy()
    holed[:31] = float(value)
    (tmp_path / "0.tif").write_bytes(written(holed, value, photometric="minisblack"))
    data = open_dataset(str(tmp_path), ImageSpec(1, dtype, stretch="5,80"))  # type: ignore[arg-type]
    low, high = np.percentile(values[31:].astype(np.float64), [5, 80])
    expected = np.clip((values[31:] - low) / (high - low), 0, 1)
    white = {"uint8": 255, "uint16": 65535, "float32": 1}[dtype]
    found = data.read_array(0)[..., 0] / white
    rounding = 0.51 / white if dtype != "float32" else 1e-6
    np.testing.assert_allclose(found[31:], expected, atol=rounding)
    np.testing.assert_allclose(found[:31], expected.mean(), atol=2 * rounding)
    result = statistics.measure(data, [0], threads=1)
    np.testing.assert_allclose([result.mean[0], result.std[0]], [expected.mean(), expected.std()], atol=2 * rounding)
    (tmp_path / "0.tif").write_bytes(
        written(np.full((9, 9), float(value), np.float32), value, photometric="minisblack")
    )
    with pytest.raises(BadImage, match="channel 1 has no data"):
        data.read_array(0)
