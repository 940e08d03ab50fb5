"""Stretched images are those that NumPy's percentiles give."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixmim.build import image_spec
from pixmim.config import PretrainConfig
from pixmim.data import open_dataset
from pixmim.data.build_resized_cache import make_cache
from pixmim.data.dataset import BadImage, ImageSpec
from pixmim.data.decode.channels import stretch
from pixmim.data.decode.image import decode
from pixmim.data.resized_cache import open_cache
from pixmim.data.statistics import Stats, load_statistics, save_statistics
from pixmim.transforms.crops import Array
from pixmim.utils.errors import UserError
from pixmim.utils.validation import parse_stretch

RNG = np.random.default_rng(0)
SOURCES = {
    "uint8": RNG.integers(20, 90, (40, 30, 3)).astype(np.uint8),
    "uint16": RNG.integers(300, 4000, (40, 30, 3)).astype(np.uint16),
    "int16": RNG.integers(-900, 800, (40, 30, 3)).astype(np.int16),
    "float32": RNG.normal(5, 2, (40, 30, 3)).astype(np.float32),
}
WHITE = {"uint8": 255, "uint16": 65535, "float32": 1.0}


def by_numpy(pixels: Array, low: float, high: float, dtype: str) -> Array:
    result = np.empty(pixels.shape)
    for k in range(pixels.shape[2]):
        a, b = np.percentile(pixels[..., k].astype(np.float64), [low, high])
        result[..., k] = np.clip((pixels[..., k] - a) / (b - a), 0, 1) * WHITE[dtype]
    return result


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("dtype", WHITE)
@pytest.mark.parametrize(("text", "low", "high"), [("1,99", 1, 99), ("0,100", 0, 100), ("0.5,97.25", 0.5, 97.25)])
def test_percentiles_of_each_channel_become_the_full_range(
    source: str, dtype: str, text: str, low: float, high: float
) -> None:
    form = ImageSpec(3, dtype, stretch=text)  # type: ignore[arg-type]
    pixels = stretch(SOURCES[source], form)
    assert pixels.dtype == dtype
    tolerance = 1e-5 if dtype == "float32" else 0.51
    assert np.abs(pixels - by_numpy(SOURCES[source], low, high, dtype)).max() <= tolerance
    assert pixels.min() == 0 and pixels.max() == WHITE[dtype]


def test_flat_and_nearly_flat_images() -> None:
    form = ImageSpec(1, "uint8", stretch="1,99")
    for kind in (np.uint8, np.uint16, np.float32):
        assert not stretch(np.full((9, 9, 1), 7, kind), form).any()
    spot = np.full((20, 20, 1), 7, np.uint16)
    spot[3, 3], spot[4, 4] = 17, 12
    assert sorted(set(stretch(spot, form).ravel().tolist())) == [0, 128, 255]
    with pytest.raises(BadImage, match="1 of its values are not finite"):
        stretch(np.asarray([[1.0, np.nan]], np.float32)[..., None], form)


def test_all_bits_of_a_file_are_stretched() -> None:
    deep = RNG.integers(0, 700, (40, 30), np.uint16)  # less than three steps of 8 bits
    file = io.BytesIO()
    Image.fromarray(deep).save(file, "TIFF")
    pixels = decode(file.getvalue(), ImageSpec(3, stretch="0,100"))
    assert np.abs(pixels[..., 0] - by_numpy(deep[..., None], 0, 100, "uint8")[..., 0]).max() <= 0.51
    assert len(np.unique(pixels)) > 200


def test_a_cache_is_stretched_once(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for i in range(3):
        Image.fromarray(SOURCES["uint8"]).save(tmp_path / "images" / f"{i}.png")
    form = ImageSpec(stretch="10,90")
    data = open_dataset(str(tmp_path / "images"), form)
    for kind in ("raw", "jpeg"):
        make_cache(data, tmp_path / kind, (30, 30), kind=kind, chroma="444", quality=100)  # type: ignore[arg-type]
        cached = open_cache(tmp_path / kind, form)
        difference = np.abs(cached.read_array(1).astype(int) - data.read_array(1))
        assert difference.max() <= (0 if kind == "raw" else 8)
        with pytest.raises(UserError, match="--stretch 10,90"):
            open_cache(tmp_path / kind, ImageSpec())


def test_synthetic_images_are_stretched() -> None:
    plain, stretched = (open_dataset("shapes:count=2", ImageSpec(stretch=text)) for text in ("", "5,95"))
    assert np.abs(stretched.read_array(1) - by_numpy(plain.read_array(1), 5, 95, "uint8")).max() <= 0.51


def test_the_setting_is_part_of_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = PretrainConfig(stretch="1,99")
    assert image_spec(config) == ImageSpec(stretch="1,99")
    assert image_spec(config).flags == "--channels 3 --dtype uint8 --stretch 1,99"
    for text in ("99,1", "1", "1,101", "a,b", "1,99,3", "-1,99"):
        assert parse_stretch(text) is None
        with pytest.raises(UserError, match="stretch"):
            PretrainConfig(stretch=text)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stats = Stats((0.5,) * 3, (0.2,) * 3, 3, 3)
    save_statistics("photos", image_spec(config), stats)
    assert load_statistics("photos", image_spec(config)) == stats
    assert load_statistics("photos", ImageSpec()) is None
