"""The 15 corruptions against independent formulas, and their properties."""

import io
import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor

from pixmim.data.shapes import Shapes
from pixmim.errors import UserError
from pixmim.evaluate.corruptions import CORRUPTIONS, corrupt
from pixmim.evaluate.corruptions.blur import disk
from pixmim.evaluate.corruptions.fields import enlarge, plasma, smear, smooth
from pixmim.transforms import evaluation_crop

RELATIVE = {"elastic_transform", "frost"}  # whose published constants trade one disturbance for another


def pictures(size: int, count: int = 4) -> list[Tensor]:
    data = Shapes(count=count, size=size)
    return [evaluation_crop(size).crop(data.image(i)) for i in range(count)]


def grey(value: int, size: int = 224, channels: int = 3) -> Tensor:
    return torch.full((channels, size, size), value, dtype=torch.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_pure_uint8_and_stronger_with_severity(name: str) -> None:
    images = pictures(112)
    change = []
    for severity in (1, 2, 3, 4, 5):
        made = [corrupt(image, name, severity, seed=3, index=i) for i, image in enumerate(images)]
        again = corrupt(images[1], name, severity, seed=3, index=1)
        assert torch.equal(made[1], again) and made[1].dtype == torch.uint8 and made[1].shape == images[1].shape
        change.append(np.mean([(a.float() - b.float()).abs().mean() for a, b in zip(made, images, strict=True)]))
    assert change[0] > 1
    if name not in RELATIVE:
        assert all(later >= 0.99 * sooner for sooner, later in itertools.pairwise(change)), change
    elif name == "elastic_transform":  # two kinds: a shear of up to 24 px and 49 px, then waves of few pixels
        assert change[0] < change[1] and change[2] < change[3] < change[4]


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("shape", [(1, 32, 32), (3, 48, 80), (3, 256, 96)])
def test_any_size_and_grey(name: str, shape: tuple[int, int, int]) -> None:
    image = torch.randint(0, 256, shape, dtype=torch.uint8)
    for severity in (1, 5):
        assert corrupt(image, name, severity).shape == shape


def test_chance_is_the_images_own() -> None:
    image = pictures(64, 1)[0]
    for name in ("gaussian_noise", "shot_noise", "impulse_noise", "glass_blur", "snow", "frost", "fog"):
        made = [corrupt(image, name, 3, seed=s, index=i) for s, i in ((0, 0), (0, 1), (1, 0))]
        assert not torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    one = corrupt(grey(128), "gaussian_noise", 1).float() - 128
    five = corrupt(grey(128), "gaussian_noise", 5).float() - 128
    assert np.corrcoef(one.flatten(), five.flatten())[0, 1] > 0.9  # severities of one image share their noise


@pytest.mark.parametrize("severity", [1, 2, 3])
def test_noise_has_the_published_strength(severity: int) -> None:
    sigma = (0.08, 0.12, 0.18)[severity - 1]
    made = corrupt(grey(128), "gaussian_noise", severity).double() / 255
    assert float(made.mean()) == pytest.approx(128 / 255, abs=0.003)
    assert float(made.std()) == pytest.approx(sigma, rel=0.02)
    photons = (60, 25, 12)[severity - 1]  # a Poisson count of mean v c, over c, has variance v / c
    made = corrupt(grey(64), "shot_noise", severity).double() / 255
    assert float(made.var()) == pytest.approx(64 / 255 / photons, rel=0.03)
    share = (0.03, 0.06, 0.09)[severity - 1]
    made = corrupt(grey(128), "impulse_noise", severity)
    assert float((made == 0).double().mean()) == pytest.approx(share / 2, rel=0.06)
    assert float((made == 255).double().mean()) == pytest.approx(share / 2, rel=0.06)
    assert set(made.unique().tolist()) == {0, 128, 255}


def test_brightness_is_hsvs() -> None:
    import colorsys

    image = pictures(32, 1)[0]
    image[:, 0, 0] = 0
    made = corrupt(image, "brightness", 2).permute(1, 2, 0).reshape(-1, 3)
    for before, after in zip(image.permute(1, 2, 0).reshape(-1, 3)[:300], made[:300], strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(before / 255).tolist())
        wanted = np.array(colorsys.hsv_to_rgb(h, s, min(1.0, v + 0.2))) * 255
        np.testing.assert_allclose(after.numpy(), wanted, atol=0.51)


def test_contrast_pixelate_and_jpeg_are_what_they_say() -> None:
    image = pictures(64, 1)[0]
    x = image.double().numpy()
    wanted = (x - x.mean(axis=(1, 2), keepdims=True)) * 0.2 + x.mean(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(corrupt(image, "contrast", 3).numpy(), wanted, atol=0.51)

    blocks = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    large = blocks.repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert torch.equal(corrupt(large, "pixelate", 5), large)  # a quarter of the pixels along an edge are enough
    means = torch.nn.functional.avg_pool2d(image.double(), 4).round()
    assert (corrupt(image, "pixelate", 5)[:, ::4, ::4].double() - means).abs().max() <= 1

    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=15)
    decoded = torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)
    assert torch.equal(corrupt(image, "jpeg_compression", 3), decoded)


@pytest.mark.parametrize(("radius", "sigma"), [(3, 0.1), (4, 0.5), (10, 0.5), (0.9, 0.03)])
def test_disk_sums_to_one_and_has_its_radius(radius: float, sigma: float) -> None:
    kernel = disk(radius, sigma).double()
    assert float(kernel.sum()) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(kernel, kernel.T)
    torch.testing.assert_close(kernel, kernel.flip(0))
    y, x = np.mgrid[: len(kernel), : len(kernel)] - len(kernel) // 2
    # The mean squared distance of a disk is r^2 / 2; softening adds 2 sigma^2, and pixels have some width.
    assert float((kernel.numpy() * (x**2 + y**2)).sum()) == pytest.approx(radius**2 / 2 + 2 * sigma**2, abs=0.3)


def test_smear_of_a_point_is_half_a_gaussian_on_a_line() -> None:
    point = torch.zeros(1, 61, 61)
    point[0, 30, 30] = 1
    for angle in (0.0, 45.0, -30.0):
        row = smear(point, 10, 3, angle)[0]
        assert float(row.sum()) == pytest.approx(1, abs=1e-5)
        weights = np.exp(-(np.arange(21) ** 2) / 18)
        weights /= weights.sum()
        wanted: npt.NDArray[Any] = np.zeros((61, 61))
        for i, weight in enumerate(weights):
            down, right = i * math.sin(math.radians(angle)), i * math.cos(math.radians(angle))
            wanted[30 - math.floor(down + 0.5), 30 - math.floor(right + 0.5)] += weight
        np.testing.assert_allclose(row.numpy(), wanted, atol=1e-6)


def test_smoothing_and_enlarging_against_loops() -> None:
    x = torch.rand(1, 9, 12)
    kernel = np.exp(-(np.arange(-4, 5) ** 2) / 2)
    kernel /= kernel.sum()
    padded = np.pad(x[0].numpy().astype(np.float64), 4, mode="symmetric")
    rows = np.apply_along_axis(np.convolve, 1, padded, kernel, mode="valid")
    wanted = np.apply_along_axis(np.convolve, 0, rows, kernel, mode="valid")
    np.testing.assert_allclose(smooth(x, 1.0)[0].numpy(), wanted, atol=1e-6)
    torch.testing.assert_close(smooth(torch.ones(1, 20, 20), 170.0, 3.0), torch.ones(1, 20, 20))

    torch.testing.assert_close(enlarge(x, 1.0), x)
    ramp = torch.arange(11.0).expand(1, 11, 11)  # a ramp stays a ramp about its middle
    torch.testing.assert_close(enlarge(ramp, 2.0), 5 + (ramp - 5) / 2)


def test_zoom_blur_of_the_middle_stays_and_of_a_point_points_outwards() -> None:
    image = grey(0, 225)
    image[:, 112, 112] = 255
    image[:, 112, 180] = 255
    made = corrupt(image, "zoom_blur", 3)[0]
    rows, columns = np.nonzero(made.numpy())
    assert made[112, 112] > 100 and rows.min() >= 111 and rows.max() <= 113
    assert columns[columns > 120].min() >= 179 and columns.max() <= 112 + 68 * 1.2 + 2


def test_fields_and_glass_keep_what_they_should() -> None:
    field = plasma((40, 64), 2.0, np.random.default_rng(0))
    assert field.shape == (1, 40, 64) and float(field.min()) >= 0 and float(field.max()) <= 1
    rough = [float(plasma((64, 64), d, np.random.default_rng(0)).diff(dim=2).abs().mean()) for d in (3.0, 2.0, 1.4)]
    assert rough == sorted(rough)  # a slower decay leaves more detail
    assert torch.equal(corrupt(grey(90), "glass_blur", 5), grey(90))
    assert torch.equal(corrupt(grey(90), "elastic_transform", 5), grey(90))
    image = pictures(224, 1)[0]
    moved = corrupt(image, "glass_blur", 3).float()
    assert float(moved.mean()) == pytest.approx(float(image.float().mean()), abs=1)  # pixels change places only


def test_what_is_not_defined_is_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'snow'"):
        corrupt(grey(1), "snoww", 1)
    with pytest.raises(UserError, match="1, 2, 3, 4 or 5"):
        corrupt(grey(1), "snow", 6)
    with pytest.raises(UserError, match=r"3 channels \(colour\) or 1 \(grey\), not of 4"):
        corrupt(grey(1, channels=4), "snow", 1)
