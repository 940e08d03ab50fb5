"""Test what a survey finds in small folders."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.cli import say
from pixmim.data import open_dataset
from pixmim.data.build_resized_cache import make_cache
from pixmim.data.dataset import ImageSpec
from pixmim.data.survey import Survey, is_cache, open_unconverted, split_masks, survey
from pixmim.utils.errors import UserError

NOISE = np.random.default_rng(0)


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def photo(height: int = 40, width: int = 48) -> np.ndarray:
    coarse = Image.fromarray(NOISE.integers(0, 256, (9, 9, 3), np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def mask() -> np.ndarray:
    return np.kron(NOISE.integers(0, 2, (10, 12), np.uint8) * 255, np.ones((4, 4), np.uint8))


def examine(data: object, **options: int) -> Survey:
    dataset = open_unconverted(str(data))
    return survey(str(data), dataset, split_masks(dataset), **options)


def names(dataset_folder: Path) -> tuple[list[str], list[str]]:
    dataset = open_dataset(str(dataset_folder))
    images, masks = ([Path(dataset.path_of(int(i))).name for i in part] for part in split_masks(dataset))
    return images, masks


def test_masks_are_found_whichever_source_names_the_files(tmp_path: Path) -> None:
    """Put the data below a folder whose name is one of masks, which does not make all files candidates."""
    root, names = tmp_path / "labels" / "set", list[str]()
    for i in range(6):
        names += [f"{i % 2}/{i}.jpg", f"{i % 2}/{i}_mask.png"]
        save(root / names[-2], photo())
        save(root / names[-1], mask())
    (tmp_path / "list.txt").write_text("".join(f"labels/set/{name}\n" for name in names))
    (tmp_path / "labels" / "table.csv").write_text("path\n" + "".join(f"set/{name}\n" for name in names))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in names:
            archive.write(root / name, f"masks/set/{name}")
    for source in ("labels/set", "labels", "list.txt", "labels/table.csv", "x.zip", "list.txt*2+labels/set"):
        images, masks = split_masks(open_dataset("+".join(f"{tmp_path}/{part}" for part in source.split("+"))))
        assert len(images) == len(masks) == (18 if "+" in source else 6), source
    assert examine(f"{root},exclude=*_mask.png").lines()[1] == "6 images left out by exclude=*_mask.png"


@pytest.mark.parametrize(
    "form",
    ["images/{}.jpg masks/{}.png", "{}.jpg {}_mask.png", "{}.jpg {}.png", "{}.jpg {}.bmp", "{}.jpg {}.PNG"],
)
def test_masks_are_found_by_folder_by_name_and_beside_a_jpeg(tmp_path: Path, form: str) -> None:
    image_name, mask_name = form.split()
    for i in range(6):
        save(tmp_path / image_name.format(i), photo())
        save(tmp_path / mask_name.format(i), mask())
    images, masks = names(tmp_path)
    assert images == [Path(image_name.format(i)).name for i in range(6)]
    assert masks == [Path(mask_name.format(i)).name for i in range(6)]
    found = examine(tmp_path)
    assert (found.images, found.masks, found.examined) == (6, 6, 6)
    assert found.mask_example.endswith(mask_name.rpartition(".")[2])
    twice = open_dataset(f"{tmp_path}*2")
    assert [len(part) for part in split_masks(twice)] == [12, 12]


def test_photographs_named_like_masks_are_images_and_a_folder_of_masks_is_a_dataset(tmp_path: Path) -> None:
    for i in range(5):
        save(tmp_path / "photos" / "labels" / f"{i}.jpg", photo())
        save(tmp_path / "photos" / f"{i}.jpg", photo())
        save(tmp_path / "alone" / f"{i}_mask.png", mask())
    assert len(names(tmp_path / "photos")[0]) == 10
    assert len(names(tmp_path / "alone")[0]) == 5


def test_sizes_flat_damaged_and_duplicated_images_are_counted(tmp_path: Path) -> None:
    for i in range(10):
        save(tmp_path / f"{i}.png", photo(100, 40 + i))
    Image.open(tmp_path / "3.png").resize((90, 200)).save(tmp_path / "copy.png")
    save(tmp_path / "flat.png", np.full((100, 44, 3), 9, np.uint8))
    (tmp_path / "bad.png").write_bytes(b"nothing")
    found = examine(tmp_path, size=32)
    assert (found.images, found.examined, found.usable) == (13, 12, 11)
    assert [Path(path).name for path in found.flat] == ["flat.png"]
    assert [[Path(path).name for path in group] for group in found.duplicates] == [["3.png", "copy.png"]]
    assert [count for count, _ in found.unreadable.values()] == [1]
    assert found.heights[:2] == (100, 100) and 40 <= found.widths[0] <= found.widths[1] <= 50
    assert 2 < found.elongation < 2.5 and found.same_orientation == 1
    assert found.spectrum is not None and found.spectrum.size == 32 and found.spectrum.images == 11
    text = "\n".join(found.lines())
    assert "3.png and copy.png" in text and "flat.png" in text and "bad.png" in text and str(tmp_path / "3") not in text


def test_channels_and_dtype_are_those_of_the_files(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.png", NOISE.integers(0, 4_000, (40, 40), np.uint16))
    found = examine(tmp_path)
    assert (found.image_spec.channels, found.image_spec.dtype) == (1, "uint16") and not found.flat


def test_splits_and_mixtures_of_deep_images_and_caches_keep_their_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i in range(8):
        save(tmp_path / "deep" / "ab"[i % 2] / f"{i}.png", NOISE.integers(0, 4_000, (40, 40), np.uint16))
    spec = ImageSpec(1, "uint16", stretch="1,99")
    make_cache(open_dataset(str(tmp_path / "deep"), spec), tmp_path / "cache", (24, 24), kind="raw")
    for text, count in (("split:train:{}", 6), ("{}*2", 16), ("{0}+{0}", 16)):
        assert examine(text.format(tmp_path / "deep")).image_spec == ImageSpec(1, "uint16")
        data = text.format(tmp_path / "cache")
        found = examine(data)
        assert (found.image_spec, found.images, found.data) == (spec, count, data)
        assert is_cache(open_unconverted(data))
        status, text = say(capsys, "stats", data)
        assert status == 0 and text.endswith(spec.flags)
    assert not is_cache(open_unconverted(str(tmp_path / "deep")))


def test_the_shorter_side_is_that_of_each_image(tmp_path: Path) -> None:
    """Half of the images are upright, so the median of the heights and of the widths is between both sides."""
    for i, (h, w) in enumerate([(48, 64), (64, 48)] * 4):
        save(tmp_path / f"{i}.png", photo(h, w))
    found = examine(tmp_path)
    assert found.heights[1] == found.widths[1] == 56 and found.short_side == 48


def test_images_without_contrast_have_no_spectrum(tmp_path: Path) -> None:
    for i in range(3):
        save(tmp_path / f"{i}.png", np.full((20, 20, 3), i, np.uint8))
    found = examine(tmp_path)
    assert found.spectrum is None and len(found.flat) == 3 and found.duplicates == [] and found.usable == 1


def test_a_dataset_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"a\.png"):
        examine(tmp_path)


def test_the_sample_is_bounded_and_datasets_without_files_are_examined() -> None:
    found = examine("shapes:count=500,size=32", sample=20)
    assert (found.images, found.examined, found.masks) == (500, 20, 0)
