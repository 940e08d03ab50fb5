"""Channels in separate files become one image, grouped by a pattern of their names."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixmim.data import open_dataset
from pixmim.data.dataset import BadImage, ImageSpec
from pixmim.data.decode.image import read
from pixmim.data.duplicates import file_sizes
from pixmim.data.statistics import choose_image_spec, count_formats
from pixmim.data.uri import absolute
from pixmim.transforms.crops import Array
from pixmim.utils.errors import UserError

SPEC = ImageSpec(3, "uint16")
PATTERN = "channels={sample}_c{channel}.tif"


def plane(seed: int) -> Array:
    return np.random.default_rng(seed).integers(0, 65536, (12, 16), np.uint16)


def save(path: Path, seed: int) -> Array:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(plane(seed)).save(path)
    return plane(seed)


def test_files_of_a_sample_are_its_channels_in_the_order_of_numbers(tmp_path: Path) -> None:
    expected = {
        sample: np.stack([save(tmp_path / f"{sample}_c{c}.tif", 10 * i + c) for c in (2, 10, 1)], 2)[..., [2, 0, 1]]
        for i, sample in enumerate(("a_c1", "b", "sub/b"))
    }
    data = open_dataset(f"{tmp_path},{PATTERN}", SPEC)
    assert [data.path_of(i) for i in range(3)] == [f"{tmp_path}/{sample}" for sample in expected]
    for i, pixels in enumerate(expected.values()):
        assert np.array_equal(data.read_array(i), pixels)
        assert np.array_equal(read(data.read(i)), pixels)  # type: ignore[attr-defined]
    assert data.left_out == "3 channels of files: 1, 2, 10"
    assert choose_image_spec(count_formats(open_dataset(f"{tmp_path},{PATTERN}"), [0, 1])) == SPEC
    assert absolute(f"{tmp_path},{PATTERN}") == f"{tmp_path},{PATTERN}"


def test_incomplete_samples_and_other_files_are_counted(tmp_path: Path) -> None:
    for name in ("a_c1.tif", "a_c2.tif", "b_c1.tif", "c_c1.tif", "c_c2.tif", "overview.tif", "x.png"):
        save(tmp_path / "cells" / name, 0)
    data = open_dataset(f"{tmp_path},exclude=*.png,{PATTERN}", ImageSpec(2, "uint16"))
    assert len(data) == 2 and data.classes == ["cells"]
    assert data.left_out == (
        "2 channels of files: 1, 2; 1 samples without all of them are left out; 1 other images are left out; "
        "1 images left out by exclude=*.png"
    )


def test_a_pattern_with_a_slash_has_channels_in_folders(tmp_path: Path) -> None:
    planes = [save(tmp_path / stain / "x" / "1.png", i) for i, stain in enumerate(("actin", "dapi"))]
    data = open_dataset(f"{tmp_path},channels={{channel}}/{{sample}}.png", ImageSpec(2, "uint16"))
    assert np.array_equal(data.read_array(0), np.stack(planes, 2)) and data.path_of(0) == f"{tmp_path}/x/1"


def test_stretching_and_float_apply_to_each_channel(tmp_path: Path) -> None:
    low, high = np.arange(12 * 16, dtype=np.float32).reshape(12, 16), np.full((12, 16), 5, np.float32)
    for c, pixels in enumerate((low, high)):
        np.save(tmp_path / f"a_c{c}.npy", pixels)
    data = open_dataset(f"{tmp_path},channels={{sample}}_c{{channel}}.npy", ImageSpec(2, "uint8", stretch="0,100"))
    assert np.array_equal(data.read_array(0)[..., 0], np.rint(low / low.max() * 255))
    assert not data.read_array(0)[..., 1].any()


def test_files_are_read_as_one_file_would_be(tmp_path: Path) -> None:
    """With all bits for percentiles, and refused where too much has no data."""
    tifffile = pytest.importorskip("tifffile")
    ramp = np.arange(12 * 16, dtype=np.uint16).reshape(12, 16)
    for channel in (1, 2):
        color = np.stack([ramp] * 3, axis=2)
        tags = [(42113, "s", 0, "0", True)]
        tifffile.imwrite(tmp_path / f"a_c{channel}.tif", color, photometric="rgb", extratags=tags)
    data = open_dataset(f"{tmp_path},{PATTERN}", ImageSpec(6, stretch="0,100"))
    expected = (ramp - 1.0) / (ramp.max() - 1) * 255
    expected[0, 0] = expected.ravel()[1:].mean()  # the one without data
    assert abs(data.read_array(0) - expected[..., None]).max() <= 1
    assert len(data.extents(0)) == 2 and file_sizes(data)[0] == sum(f.stat().st_size for f in tmp_path.iterdir())  # type: ignore[attr-defined]
    for channel in (1, 2):
        tifffile.imwrite(tmp_path / f"a_c{channel}.tif", ramp // 96, photometric="minisblack", extratags=tags)
    with pytest.raises(BadImage, match=r"50% of its pixels have no data .*--max-no-data 0\.4"):
        open_dataset(f"{tmp_path},{PATTERN}", ImageSpec(2, "uint16", max_no_data=0.4)).read_array(0)


def test_all_bits_of_the_files_decide_on_the_dtype(tmp_path: Path) -> None:
    """Pillow reads 8 of 16 bits of color in a run of uint8; pages count too, if they are channels."""
    tifffile = pytest.importorskip("tifffile")
    colors = np.random.default_rng(0).integers(0, 65536, (2, 12, 16, 3), np.uint16)
    for channel, color in enumerate(colors):
        tifffile.imwrite(tmp_path / f"a_c{channel}.tif", color, photometric="rgb")
    data = open_dataset(f"{tmp_path},{PATTERN}")
    assert choose_image_spec(count_formats(data, [0])) == ImageSpec(6, "uint16")
    assert np.array_equal(read(data.read(0)), np.concatenate(list(colors), axis=2))  # type: ignore[attr-defined]
    for channel, color in enumerate(colors):
        tifffile.imwrite(tmp_path / f"a_c{channel}.tif", color.transpose(2, 0, 1), photometric="minisblack")
    pages = open_dataset(f"{tmp_path},{PATTERN}", ImageSpec(tiff_pages="channels"))
    assert choose_image_spec(count_formats(pages, [0], "channels")) == ImageSpec(6, "uint16")


def test_files_that_do_not_fit_are_a_broken_image(tmp_path: Path) -> None:
    save(tmp_path / "a_c1.tif", 0)
    Image.fromarray(plane(1)[:5]).save(tmp_path / "a_c2.tif")
    save(tmp_path / "b_c1.tif", 0)
    (tmp_path / "b_c2.tif").write_bytes(b"")
    data = open_dataset(f"{tmp_path},{PATTERN}", ImageSpec(2, "uint16"))
    with pytest.raises(BadImage, match=r"16x12 pixels, but uint16 of 16x5 in a_c2\.tif"):
        data.read_array(0)
    with pytest.raises(BadImage, match=r"b_c2\.tif: the file is empty"):
        data.read_array(1)
    with pytest.raises(BadImage, match="--channels 2"):
        save(tmp_path / "a_c2.tif", 0)
        open_dataset(f"{tmp_path},{PATTERN}", SPEC).read_array(0)


@pytest.mark.parametrize("pattern", ["{sample}.tif", "{channel}.tif", "x", "{sample}{sample}{channel}"])
def test_patterns_need_both_names_once(tmp_path: Path, pattern: str) -> None:
    save(tmp_path / "a_c1.tif", 0)
    with pytest.raises(UserError, match=r"must contain \{sample\} and \{channel\}"):
        open_dataset(f"{tmp_path},channels={pattern}")


def test_no_complete_sample_says_what_was_found(tmp_path: Path) -> None:
    for name in ("a_c1.tif", "b_c2.tif"):
        save(tmp_path / name, 0)
    with pytest.raises(UserError, match="1, 2 in 2 samples"):
        open_dataset(f"{tmp_path},{PATTERN}")
    with pytest.raises(UserError, match=r"channels= needs a folder of images, and .*a_c1\.tif is a file"):
        open_dataset(f"{tmp_path}/a_c1.tif,{PATTERN}")
