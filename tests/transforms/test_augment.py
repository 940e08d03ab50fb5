"""Augmentations against timm's own and torchvision's, with the same arguments; and that they are pure functions."""

import random
from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from timm.data import auto_augment as theirs
from torchvision.transforms.v2 import functional as V

from pixmim.transforms import augment
from pixmim.transforms.augment import OPERATIONS, Augmented, Jitter, RandAugment, ThreeAugment, augmented
from pixmim.transforms.crops import CenterCrop, SimpleResizedCrop

FILL = (124, 116, 104)


def picture(seed: int = 0, size: tuple[int, int] = (40, 56), channels: int = 3) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 255, (size[0] // 8, size[1] // 8, channels), np.uint8)
    return torch.from_numpy(np.kron(coarse, np.ones((8, 8, 1), np.uint8))).permute(2, 0, 1).contiguous()


def test_operations_are_timms_in_its_order() -> None:
    names = [name.removesuffix("Rel").removesuffix("Increasing") for name in theirs.rand_augment_choices("", True)]
    assert list(OPERATIONS) == names
    (rand,) = {type(t) for t in [theirs.rand_augment_transform("rand-m9-mstd0.5-inc1", {})]}
    made = theirs.rand_augment_transform("rand-m9-mstd0.5-inc1", {"img_mean": FILL})
    assert isinstance(made, rand) and made.num_layers == 2 and made.choice_weights is None
    assert {(op.magnitude, op.magnitude_std, op.prob) for op in made.ops} == {(9, 0.5, 0.5)}


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_an_operation_is_timms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known = [name, name + "Increasing", name + "Rel"]
    (full,) = [n for n in theirs.rand_augment_choices("", True) if n in known]
    hparams = {"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}
    image = V.to_pil_image(picture())
    function, argument = OPERATIONS[name]
    for level, negative in product((0.0, 4.4, 8.7, 9.3), (False, True)):
        monkeypatch.setattr(random, "random", lambda: 0.9 if negative else 0.1)  # noqa: B023
        op = theirs.AugmentOp(full, prob=1.0, magnitude=level, hparams=hparams)
        given = [] if argument is None else [argument(level, negative)]
        mine = function(image, *given, fillcolor=FILL, resample=Image.Resampling.BICUBIC)
        assert np.array_equal(np.asarray(mine), np.asarray(op(image))), (level, negative)


def test_no_bits_are_black() -> None:
    """timm's posterize before Pillow refused 0 bits."""
    function, argument = OPERATIONS["Posterize"]
    assert argument is not None and argument(10.0, False) == 0
    assert np.asarray(function(V.to_pil_image(picture()), 0)).max() == 0


def test_how_often_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()
    levels: list[float] = []
    signs: list[bool] = []

    def spy(name: str) -> tuple[object, object]:
        def argument(level: float, negative: bool) -> float:
            levels.append(level)
            signs.append(negative)
            return 0.0

        def function(image: Image.Image, *_: object, **__: object) -> Image.Image:
            seen[name] += 1
            return image

        return function, argument

    monkeypatch.setattr(augment, "OPERATIONS", {name: spy(name) for name in OPERATIONS})
    step, image = RandAugment(), V.to_pil_image(picture())
    for u in np.random.default_rng(0).random((6000, step.num_uniforms)):
        step.apply(image, u.tolist(), FILL)
    assert sum(seen.values()) == pytest.approx(6000, rel=0.05)  # two layers, one half each
    assert set(seen) == set(OPERATIONS) and max(seen.values()) < 1.3 * min(seen.values())
    assert np.mean(levels) == pytest.approx(9, abs=0.03) and np.std(levels) == pytest.approx(0.5, abs=0.03)
    assert max(levels) == 10.0 and 0.01 < np.mean(np.asarray(levels) == 10) < 0.04  # 2.3 % lie beyond two deviations
    assert np.mean(signs) == pytest.approx(0.5, abs=0.03)


def test_three_augment_is_deit_threes() -> None:
    image = V.to_pil_image(picture())
    step = ThreeAugment()
    grey, solar, blurred = (np.asarray(step.apply(image, [u, 0.5], FILL)) for u in (0.1, 0.4, 0.9))
    assert np.array_equal(grey, np.asarray(V.rgb_to_grayscale(image, num_output_channels=3)))
    assert np.array_equal(solar, np.asarray(ImageOps.solarize(image, 128)))
    assert np.array_equal(blurred, np.asarray(image.filter(ImageFilter.GaussianBlur(1.05))))


@pytest.mark.parametrize(("u", "order"), [(0.0, "bcs"), (0.999, "scb"), (0.5, "csb")])
def test_jitter_is_torchvisions(u: float, order: str) -> None:
    image = V.to_pil_image(picture())
    change = {
        "b": lambda x: V.adjust_brightness(x, 0.7 + 0.6 * 0.2),
        "c": lambda x: V.adjust_contrast(x, 0.7 + 0.6 * 0.9),
        "s": lambda x: V.adjust_saturation(x, 0.7 + 0.6 * 0.4),
    }
    expected = image
    for letter in order:
        expected = change[letter](expected)
    mine = Jitter(0.3).apply(image, [0.2, 0.9, 0.4, u], FILL)
    table = {0.0: "bcs", 0.999: "scb", 0.5: "csb"}
    assert table[u] == order and np.array_equal(np.asarray(mine), np.asarray(expected))


def test_an_augmented_crop_takes_the_crops_numbers_first() -> None:
    base = SimpleResizedCrop(32)
    crop = Augmented(base, (RandAugment(), Jitter(0.3)), FILL)
    assert (
        crop.num_uniforms == base.num_uniforms + 8 + 4
        and crop.shape == (32, 32)
        and crop.offset_without_resize((32, 32), [0.0] * 14) is None
    )
    u = np.random.default_rng(3).random(crop.num_uniforms).tolist()
    u[3] = u[7] = 0.1  # both layers do something
    image = V.to_pil_image(base.crop(picture(), u[:2]))
    expected = Jitter(0.3).apply(RandAugment().apply(image, u[2:10], FILL), u[10:], FILL)
    assert torch.equal(crop.crop(picture(), u), V.pil_to_tensor(expected))
    assert torch.equal(crop.crop(picture(), u), crop.crop(picture(), u))


def test_channels_by_themselves() -> None:
    """Grey images, and images of two channels: each as a grey image with the same numbers and its own fill."""
    u = np.random.default_rng(4).random(8).tolist()
    u[0], u[1], u[5] = 3.5 / 15, 0.1, 0.9  # Rotate, and nothing
    both = picture(channels=2, size=(32, 32))
    found = Augmented(CenterCrop(32), (RandAugment(),), (10, 200)).crop(both, u)
    for channel, fill in enumerate((10, 200)):
        alone = Augmented(CenterCrop(32), (RandAugment(),), (fill,)).crop(both[channel : channel + 1], u)
        assert torch.equal(found[channel : channel + 1], alone) and (alone == fill).any()
    with pytest.raises(ValueError, match="uint8"):
        Augmented(CenterCrop(32), (RandAugment(),), FILL).crop(picture().float(), u)


def test_what_a_recipe_names() -> None:
    base = CenterCrop(32)
    assert augmented(base, "none", 0.0, (0.5,)) is base
    three = augmented(base, "three", 0.3, (0.485, 0.456, 0.406))
    assert isinstance(three, Augmented) and three.fill == FILL
    assert three.steps == (ThreeAugment(), Jitter(0.3))
