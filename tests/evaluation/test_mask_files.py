"""Masks next to images are found by name, by a twin, or in a folder for each sample."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixmim.data.dataset import RGB, BadImage
from pixmim.evaluation.annotations import read_objects
from pixmim.evaluation.mask_files import find_masks
from pixmim.evaluation.segmentation.dataset import open_segmentation
from pixmim.transforms.crops import Array


def save(path: Path, pixels: Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def image(seed: int) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)


def mask(top: int, value: int = 1) -> Array:
    pixels = np.zeros((12, 16), np.uint8)
    pixels[top : top + 4, 3:9] = value
    return pixels


@pytest.mark.parametrize("name", ["{}_mask.png", "{}-seg.png", "{}.labels.tif", "{}_GT.bmp"])
def test_masks_named_like_their_image(tmp_path: Path, name: str) -> None:
    for i, stem in enumerate(("a", "sub/b", "gt")):
        save(tmp_path / f"{stem}.jpg", image(i))
        save(tmp_path / name.format(stem), mask(i))
    save(tmp_path / "without.jpg", image(9))
    pairs = open_segmentation(str(tmp_path), RGB, "training")
    assert [Path(pairs.path_of(i)).name for i in range(len(pairs))] == ["a.jpg", "gt.jpg", "b.jpg"]
    for i, top in enumerate((0, 2, 1)):
        assert np.array_equal(pairs.read_array(i)[..., 3], mask(top))
    assert pairs.left_out.startswith("1 images without a mask")


def test_a_lossless_twin_of_a_jpeg_is_its_mask(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "a.jpg", image(0))
    save(tmp_path / "cat" / "a.png", mask(3, 255))
    pairs = open_segmentation(str(tmp_path), RGB, "training", foreground=255)
    assert pairs.classes == ["background", "foreground"] and len(pairs) == 1
    assert np.array_equal(pairs.read_array(0)[..., 3], mask(3))


def test_masks_of_single_objects_become_one(tmp_path: Path) -> None:
    for sample, tops in (("x", (0, 6)), ("y", (2,))):
        save(tmp_path / sample / "images" / f"{sample}.png", image(len(tops)))
        for top in tops:
            save(tmp_path / sample / "masks" / f"{top}.png", mask(top, 255))
    pairs = open_segmentation(str(tmp_path), RGB, "training")
    assert pairs.classes == ["background", "object"]
    assert np.array_equal(pairs.read_array(0)[..., 3], mask(0) | mask(6))
    assert np.array_equal(pairs.read_array(1)[..., 3], mask(2))
    objects, problems = read_objects(str(tmp_path))
    assert [(each.image, each.box) for each in objects] == [
        ("x/images/x.png", (3, 0, 9, 4)),
        ("x/images/x.png", (3, 6, 9, 10)),
        ("y/images/y.png", (3, 2, 9, 6)),
    ]
    assert problems.left_out == 0
    save(tmp_path / "x" / "masks" / "9.png", mask(0)[:5])
    with pytest.raises(BadImage, match="differ in size"):
        pairs = open_segmentation(str(tmp_path), RGB, "training")
        pairs.read_array(0)


@pytest.mark.parametrize("form", ["blue", "white first", "no black", "16 bits", "float", "opaque"])
def test_all_but_black_is_an_object_whatever_holds_the_colors(form: str, tmp_path: Path) -> None:
    """Dark colors have no luma; the numbers of a palette say nothing if it has black; values may exceed a byte."""
    true = mask(5)
    palettes = {"white first": ([255, 255, 255, 0, 0, 0], 1 - true), "no black": ([9, 9, 9, 200, 0, 0], true)}
    if form in palettes:
        palette, indices = palettes[form]
        picture = Image.fromarray(indices, "P")
        picture.putpalette(palette)
    elif form in ("blue", "opaque"):
        alpha = [np.full_like(true, 255)] * (form == "opaque")
        picture = Image.fromarray(np.stack([0 * true, 0 * true, 4 * true, *alpha], axis=2))
    else:
        picture = Image.fromarray(true.astype(np.uint16) * 65535 if form == "16 bits" else true.astype(np.float32) / 4)
    file = tmp_path / "x" / "masks" / ("1.tif" if form == "float" else "1.png")
    save(tmp_path / "x" / "images" / "x.png", image(1))
    file.parent.mkdir()
    picture.save(file)
    pairs = open_segmentation(str(tmp_path), RGB, "training")
    assert np.array_equal(pairs.read_array(0)[..., 3], true)
    ((found,), _) = read_objects(str(tmp_path))
    assert found.mask is not None and np.array_equal(found.mask, true == 1)


def test_a_folder_of_images_has_no_masks(tmp_path: Path) -> None:
    save(tmp_path / "a.png", image(0))
    save(tmp_path / "b_mask.png", image(1))
    assert find_masks(tmp_path) is None
