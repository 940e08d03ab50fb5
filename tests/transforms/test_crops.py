"""Crops against torchvision's own transforms and against slow pixel arithmetic."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from pixmim.transforms.crops import (
    CenterCrop,
    Crop,
    RandomResizedCrop,
    SimpleResizedCrop,
    evaluation_crop,
    flip_and_normalize,
    resize_to_cover,
)
from pixmim.utils import rng

U8 = torch.uint8


def random_image(h: int, w: int, c: int = 3) -> torch.Tensor:
    return torch.randint(0, 256, (c, h, w), dtype=U8)


@pytest.mark.parametrize("size", [(50, 70), (70, 50), (33, 33), (20, 90)])
def test_src_is_resize_reflect_pad_crop(size: tuple[int, int]) -> None:
    image, crop = random_image(*size), SimpleResizedCrop(32)
    resized = v2.functional.resize(image, 32, interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    padded = torch.from_numpy(np.pad(resized.numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect"))
    for u in [(0.0, 0.0), (0.999, 0.999), (0.5, 0.1), (0.2, 0.7)]:
        top, left = int(u[0] * (padded.shape[1] - 31)), int(u[1] * (padded.shape[2] - 31))
        assert torch.equal(crop.crop(image, u), padded[:, top : top + 32, left : left + 32])


def test_src_reaches_every_offset_evenly() -> None:
    columns = torch.arange(32, dtype=U8).expand(1, 32, 32).contiguous()
    u = rng.uniform(0, "test", 0, np.arange(1800), 2)
    lefts = [int(SimpleResizedCrop(32).crop(columns, row)[0, 0, 16]) - 16 for row in u.tolist()]
    counts = np.bincount(np.asarray(lefts) + 4, minlength=9)
    assert len(counts) == 9 and counts.min() > 140  # 200 expected each


def test_rrc_boxes_follow_torchvision_in_distribution() -> None:
    """Other random numbers of the same distribution: means of area, ratio and position agree within four errors."""
    h, w, n = 60, 90, 4000
    boxes = np.asarray(
        [RandomResizedCrop(32).box((h, w), u) for u in rng.uniform(0, "t", 0, np.arange(n), 22).tolist()]
    )
    image = torch.zeros(3, h, w)
    other = v2.RandomResizedCrop(32, scale=(0.2, 1.0))
    reference_boxes = np.asarray([[p[k] for k in ("top", "left", "height", "width")] for p in
                         (other.make_params([image]) for _ in range(n))])  # fmt: skip
    for values in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1]):
        a, b = values(boxes), values(reference_boxes)
        assert abs(a.mean() - b.mean()) < 4 * np.hypot(a.std(), b.std()) / n**0.5


def test_rrc_falls_back_to_the_center_for_a_strip() -> None:
    top, left, h, w = RandomResizedCrop(8).box((10, 1000), [0.999] * 22)
    assert (h, w) == (10, 13) and top == 0 and left == (1000 - 13) // 2


def test_evaluation_crop_equals_resize_256_center_crop_224() -> None:
    image = random_image(300, 421)
    reference = v2.Compose([v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(224)])(image)
    assert torch.equal(evaluation_crop(224).crop(image), reference)


@pytest.mark.parametrize("size", [(16, 48), (48, 16)])
def test_non_square_sizes_are_covered_at_the_same_aspect_ratio(size: tuple[int, int]) -> None:
    for source in ((30, 100), (100, 30), (5, 5)):
        image = resize_to_cover(random_image(*source), size)
        h, w = image.shape[-2:]
        assert (h == size[0] and w >= size[1]) or (w == size[1] and h >= size[0])
        assert h / w == pytest.approx(source[0] / source[1], rel=0.07)
        for crop in (SimpleResizedCrop(size), RandomResizedCrop(size), CenterCrop(size)):
            assert crop(random_image(*source)).shape == (3, *size)


def test_crops_of_pil_images() -> None:
    image = Image.fromarray(random_image(40, 60).permute(1, 2, 0).numpy())
    for crop in (SimpleResizedCrop(32), RandomResizedCrop(32), CenterCrop(32)):
        assert crop(image).size == (32, 32)
    torch.manual_seed(5)
    one = SimpleResizedCrop(32)(image)
    torch.manual_seed(5)
    assert np.array_equal(one, SimpleResizedCrop(32)(image))
    for mode in ("L", "LA", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"):
        other = Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60)) if mode == "I;16" else None
        other = other or (image.convert("RGB").convert(mode) if mode != "LAB" else Image.merge("LAB", image.split()))
        found = CenterCrop(40)(other)
        assert found.mode == mode, mode
        assert np.array_equal(np.asarray(found), np.asarray(other)[:, 10:50])
    for mode in ("1", "P"):
        with pytest.raises(TypeError, match=f"mode {mode} has no values between"):
            CenterCrop(32)(image.convert(mode))


def test_flip_and_normalize() -> None:
    images, flip = torch.randint(0, 256, (3, 2, 4, 5), dtype=U8), torch.tensor([True, False, True])
    mean, std = torch.tensor([0.3, 0.6]), torch.tensor([0.2, 0.5])
    done = flip_and_normalize(images, flip, mean, std)
    for b in range(3):
        for c in range(2):
            expected = (images[b, c].double() / 255 - mean[c].double()) / std[c].double()
            expected = expected.flip(-1) if flip[b] else expected
            torch.testing.assert_close(done[b, c].double(), expected, atol=1e-6, rtol=0)


def test_a_padding_as_large_as_the_crop_is_refused() -> None:
    with pytest.raises(ValueError, match="smaller than the crop"):
        SimpleResizedCrop(8, padding=8)


def test_a_single_try_is_clipped_to_the_image() -> None:
    """The crop of MAE's linear probe."""
    crop = RandomResizedCrop(16, scale=(0.08, 1.0), single=True)
    assert crop.num_uniforms == 4
    for h, w in ((40, 40), (30, 90), (90, 30)):
        for u in np.random.default_rng(h).random((200, 4)):
            area = h * w * (0.08 + 0.92 * u[0])
            ratio = (3 / 4) ** (1 - 2 * u[1])
            width, height = min(round((area * ratio) ** 0.5), w), min(round((area / ratio) ** 0.5), h)
            top, left = int(u[2] * (h - height + 1)), int(u[3] * (w - width + 1))
            assert crop.box((h, w), u.tolist()) == (top, left, height, width)


@pytest.mark.parametrize("crop", [SimpleResizedCrop((8, 12)), RandomResizedCrop((8, 12)), CenterCrop((8, 12))])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_arrays_and_tensors_have_the_same_crops(crop: Crop, dtype: type) -> None:
    array = (np.random.default_rng(0).random((20, 30, 5)) * 200).astype(dtype)
    crops = []
    for image in (array, torch.from_numpy(array.transpose(2, 0, 1).copy()), np.ascontiguousarray(array[..., 0])):
        torch.manual_seed(1)
        crops.append(np.asarray(crop(image)))
    assert crops[0].shape == (8, 12, 5) and crops[0].dtype == dtype
    assert np.array_equal(crops[0], crops[1].transpose(1, 2, 0)) and np.array_equal(crops[2], crops[0][..., 0])
    with pytest.raises(ValueError, match="not one of 4 dimensions"):
        crop(array[None])


INTEGERS = ["int8", "int16", "int32", "int64", "uint16", "uint32", ">u2", ">i4"]


@pytest.mark.parametrize("dtype", [*INTEGERS, "float16", "float64", ">f4"])
def test_every_dtype_is_interpolated_exactly_and_within_its_range(dtype: str) -> None:
    """An edge between its smallest and its largest value, where bicubic interpolation overshoots on both sides."""
    kind = np.dtype(dtype)
    low, high = (np.iinfo(kind).min, min(np.iinfo(kind).max, 2**40)) if kind.kind in "ui" else (-1000, 1000)
    image = np.full((20, 20, 2), max(low, -(2**40)), kind)
    image[:, 9:] = high
    found = CenterCrop(16)(image)
    exact = torch.from_numpy(image.astype(np.float64).transpose(2, 0, 1))
    expected = v2.functional.resize(exact, [16, 16], interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    expected = expected.numpy().transpose(1, 2, 0)
    if kind.kind in "ui":
        assert expected.max() > high  # what must not wrap around
        expected = np.clip(np.rint(expected), np.iinfo(kind).min, np.iinfo(kind).max)
    assert found.dtype == kind.newbyteorder("=")
    np.testing.assert_allclose(found.astype(np.float64), expected, rtol=1e-15 if kind.kind in "ui" else 2e-3)


def test_masks_are_not_interpolated() -> None:
    for image in (np.ones((20, 30, 1), bool), torch.ones(1, 20, 30, dtype=torch.bool)):
        with pytest.raises(TypeError, match="bool has no values between"):
            CenterCrop(16)(image)


def test_leading_dimensions_of_a_tensor_have_one_crop() -> None:
    """As in torchvision."""
    batch = torch.stack([random_image(20, 30) for _ in range(4)]).reshape(2, 2, 3, 20, 30)
    for image in (batch, batch[0, 1, 2]):
        torch.manual_seed(3)
        found = RandomResizedCrop(16)(image)
        torch.manual_seed(3)
        one = RandomResizedCrop(16)(batch[0, 1])
        assert found.shape == (*image.shape[:-2], 16, 16)
        assert torch.equal(found[0, 1] if image is batch else found, one if image is batch else one[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_cropped_as_float32(dtype: torch.dtype) -> None:
    image = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = CenterCrop(12)(image.clone().requires_grad_())
    assert found.dtype == dtype and not found.requires_grad
    assert torch.equal(found, CenterCrop(12)(image.float()).to(dtype))
