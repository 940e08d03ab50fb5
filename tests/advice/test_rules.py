"""Each rule, on a survey that was changed in one respect."""

import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch

from pixmim.advice.rules import Suggestion, apply_rules, choose_recipe, configure, judge_speed
from pixmim.build import image_spec
from pixmim.cli.pretrain import read_flags
from pixmim.data.dataset import ImageSpec
from pixmim.data.spectrum import Spectrum
from pixmim.data.survey import Survey

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def spectrum(size: int, kept: float) -> Spectrum:
    """Return a spectrum of which the low-pass keeps this share."""
    variance = np.zeros(size)
    variance[1], variance[-1] = kept, 1 - kept
    return Spectrum(size, np.ones(size // 2), variance, 2.0, 10)


PHOTOS = Survey(
    data="photos",
    images=3_000,
    masks=0,
    mask_example="",
    examined=2_000,
    image_spec=ImageSpec(),
    formats={"3 x uint8": 64},
    heights=(300, 400, 500),
    widths=(300, 500, 600),
    short_side=400,
    aspect=0.8,
    elongation=1.25,
    same_orientation=0.7,
    unreadable={},
    flat=[],
    duplicates=[],
    spectrum=spectrum(96, 0.85),
    images_per_s=1_000.0,
)


def rules(device: torch.device = CPU, **changes: object) -> dict[str, Suggestion]:
    found = replace(PHOTOS, **changes)  # type: ignore[arg-type]
    return {suggestion.topic: suggestion for suggestion in apply_rules(found, found.data, device)}


def test_more_unreadable_images_than_training_allows_are_said() -> None:
    assert "unreadable" not in rules(unreadable={"empty": (666, "a.jpg")})
    reason = rules(unreadable={"empty": (600, "a.jpg"), "cut": (67, "b.jpg")})["unreadable"].reason
    assert "more than 25%" in reason and "667 of 2,667" in reason


def test_usual_photographs_need_no_more_than_a_recipe_and_a_length() -> None:
    found = rules()
    assert list(found) == ["recipe", "length", "target", "start"]
    assert found["recipe"].flags == ["pixmim-vit-tiny-96"]
    assert found["length"].flags == ["--epochs", str(round(15_625 * 128 / 3_000))]
    assert {suggestion.basis for suggestion in found.values()} == {"guess", "measured", "published"}


@pytest.mark.parametrize(
    ("images", "device", "recipe"),
    [
        (999, CPU, "pixmim-vit-tiny-64"),
        (1_000, CPU, "pixmim-vit-tiny-96"),
        (10**7, CPU, "pixmim-vit-tiny-96"),
        (999, GPU, "pixmim-vit-tiny-96"),
        (9_999, GPU, "pixmim-vit-tiny"),
        (10_000, GPU, "pixmim-vit-small"),
        (10**6, GPU, "pixmim-vit-base-300"),
    ],
)
def test_the_recipe_follows_from_the_number_of_images(images: int, device: torch.device, recipe: str) -> None:
    assert choose_recipe(images, device) == recipe


def test_few_images_are_trained_on_in_small_batches_and_too_few_steps_are_named() -> None:
    tiny = rules(images=100, examined=100)["length"]
    assert tiny.flags == ["--epochs", "1600", "--batch-size", "16"] and "too few" not in tiny.reason
    assert "too few" in rules(images=10, examined=10)["length"].reason
    assert rules(images=10**7)["length"].flags == ["--epochs", "1"]


@pytest.mark.parametrize(("aspect", "size"), [(2.5, "152x64"), (0.4, "64x152")])
def test_elongated_images_get_a_shape_of_the_same_area(aspect: float, size: str) -> None:
    found = rules(aspect=aspect, elongation=2.5, same_orientation=0.9)["size"]
    assert found.flags == ["--size", size] and "40%" in found.reason
    assert "size" not in rules(aspect=aspect, elongation=2.5, same_orientation=0.5)


def test_small_images_are_not_enlarged_and_large_ones_lose_details() -> None:
    assert rules(short_side=50)["size"].flags == ["--size", "48"]
    assert rules(short_side=9)["size"].flags == ["--size", "32"]
    assert "31 times" in rules(short_side=3_000)["detail"].reason


def test_channels_that_rgb_would_lose_are_kept() -> None:
    assert rules(image_spec=ImageSpec(4, "uint16"))["channels"].flags == ["--channels", "4", "--dtype", "uint16"]
    gray = rules(image_spec=ImageSpec(1))["channels"]
    assert gray.flags == [] and "--channels 1" in gray.reason
    for spec in (ImageSpec(4, "uint16"), ImageSpec(1), ImageSpec(2, tiff_pages="channels"), ImageSpec(stretch="1,99")):
        found = rules(image_spec=spec)  # the alternative reads the images as the command does
        words = shlex.split(found["start"].reason.split("`")[1])
        own, alternative = configure("photos", list(found.values())), read_flags(["pixmim-vit-tiny", *words[3:]]).config
        assert image_spec(alternative) == image_spec(own)


def test_the_share_that_the_low_pass_keeps_is_judged() -> None:
    usual = rules()["target"].reason
    assert "85%" in usual and "MAE" not in usual and "--" not in usual
    assert "MAE" in rules(spectrum=spectrum(96, 0.99))["target"].reason
    rough = rules(spectrum=spectrum(48, 0.3))["target"].reason
    assert "--target.kind pixels" in rough and "--target.radius 94 " in rough  # all is kept at radius 47 of 48 pixels
    small = rules(spectrum=spectrum(48, 0.3), short_side=50)  # trained at 48 pixels
    assert small["size"].flags == ["--size", "48"] and "--target.radius 47 " in small["target"].reason
    assert "target" not in rules(spectrum=None)


def test_duplicates_concern_evaluations_only() -> None:
    found = rules(duplicates=[["a", "b"]])["duplicates"]
    assert found.flags == [] and "evaluation" in found.reason


@pytest.mark.parametrize("device", [CPU, GPU])
def test_published_weights_are_an_alternative_for_few_images(device: torch.device) -> None:
    reason = rules(device, images=500, data="my photos")["start"].reason
    words = shlex.split(reason.split("`")[1])
    assert words[:3] == ["pixmim", "pretrain", "adapt"]
    config = read_flags(["pixmim-vit-tiny", *words[3:]]).config
    assert config.init.startswith("timm:") and config.data == "my photos"
    assert "`" not in rules(images=20_000)["start"].reason


def test_the_duration_follows_from_the_speed_and_slow_reading_asks_for_a_cache() -> None:
    config = configure("photos", apply_rules(PHOTOS, "photos", CPU))
    images = config.epochs * 3_000
    (time,), cached = judge_speed(config, PHOTOS, images / 7_200)
    assert "2.0 hours" in time.reason and "--epochs" not in time.reason and not cached
    for seconds, words in ((60, "about 1 minute on"), (600, "about 10 minutes on"), (3_599, "about 1.0 hours on")):
        assert words in judge_speed(config, PHOTOS, images / seconds)[0][0].reason
    slow = judge_speed(config, replace(PHOTOS, images_per_s=0.3), 0.4)[0]
    assert "at 0.4 images/s" in slow[0].reason and "(0.3 images/s)" in slow[1].reason
    (time, cache), cached = judge_speed(config, replace(PHOTOS, images_per_s=20), images / (24 * 3_600))
    assert f"--epochs {int(config.epochs / 2)} " in time.reason and cache.topic == "cache" and cached
