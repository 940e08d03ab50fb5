"""Semantic segmentation: datasets, crops, colors, heads, windows and metrics, each against a slow reference."""

import colorsys
import io
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from helpers.evaluated import evaluate
from helpers.models import CNNS
from pixmim.build import build_encoder, build_model
from pixmim.config import ArchitectureConfig, PretrainConfig
from pixmim.config_io import to_json
from pixmim.data.bad_images import BadImageLog
from pixmim.data.dataset import BadImage, ImageSpec
from pixmim.data.loader import Batch
from pixmim.data.synthetic import SHAPES, SyntheticShapes
from pixmim.evaluation.context import EvalContext
from pixmim.evaluation.frozen_encoder import FrozenEncoder, load_frozen_encoder, rebuild_at_size, wrap_live_encoder
from pixmim.evaluation.segmentation import (
    check_masks,
    confusion_matrix,
    evaluate_segmentation,
    iterate_pairs,
    segmentation_metrics,
)
from pixmim.evaluation.segmentation.dataset import IGNORE, open_segmentation
from pixmim.evaluation.segmentation.model import Segmenter, argmax_at_size, segment, segmentation_loss, window_starts
from pixmim.evaluation.segmentation.train import (
    JitteredCrop,
    build,
    distort_colors,
    fit,
    learning_rate,
    prepare_batch,
    resize_nearest,
    symmetric_indices,
)
from pixmim.evaluation.settings import SegmentationSettings
from pixmim.evaluation.visualize import class_colors, overlay_mask
from pixmim.models import features
from pixmim.models.feature_maps import maps, widths
from pixmim.training import trainer
from pixmim.transforms.crops import flip_and_normalize
from pixmim.utils.errors import UserError
from pixmim.weights.adapt import relative_biases
from pixmim.weights.save import save_encoder

Make = Callable[..., PretrainConfig]
TRAIN, TEST = "shapes:count=60,size=32", "shapes:count=12,size=32,seed=1"
QUICK = SegmentationSettings(TRAIN, TEST, size="32", steps=6, batch_size=4, width=16, threads=2, lr=3e-3, warmup=2)

FAMILIES = {
    "vit": ArchitectureConfig(
        backbone="vit_tiny_patch16_224", options={"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    ),
    "beit": ArchitectureConfig(
        "simmim", "beit_base_patch16_224", options={"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    ),
    "swin": ArchitectureConfig(
        "simmim",
        "swin_tiny_patch4_window7_224",
        options={"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 4},
    ),
    "convmae": ArchitectureConfig(
        "convmae",
        "convmae_tiny",
        decoder_dim=16,
        decoder_depth=1,
        decoder_heads=2,
        options={"embed_dim": [16, 24, 32], "depth": [1, 1, 2], "num_heads": 2},
    ),
    **CNNS,
}


def encoder_of(config: PretrainConfig) -> FrozenEncoder:
    return wrap_live_encoder(config, build_model(config).encoder.eval(), torch.device("cpu"), "fp32")


def save_pair(root: Path, name: str, size: tuple[int, int], mask: np.ndarray | None, folder: str = "masks") -> None:
    """Save an image of random pixels of (h, w), and its mask."""
    for part in ("images", folder):
        (root / part / name).parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(root / "images" / f"{name}.png")
    if mask is not None:
        Image.fromarray(mask).save(root / folder / f"{name}.png")


# --- metrics


def test_metrics_equal_sets_of_pixels() -> None:
    """Compare with IoU by sets over several images, with an absent class, a false one, and ignored pixels."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randint(0, 4, (3, 9, 7), generator=generator)
    true[true == 2] = 1  # no pixel of class 2; predictions of it are wrong
    true[0, :4] = IGNORE
    predicted = torch.randint(0, 5, (3, 9, 7), generator=generator)
    matrix = sum(
        (confusion_matrix(p, t, 5) for p, t in zip(predicted, true, strict=True)), torch.zeros(5, 5, dtype=torch.int64)
    )
    pixels = [i for i, t in enumerate(true.flatten().tolist()) if t != IGNORE]
    t, p = ({c: {i for i in pixels if x.flatten()[i] == c} for c in range(5)} for x in (true, predicted))
    iou = {c: 100 * len(t[c] & p[c]) / len(t[c] | p[c]) for c in range(5) if t[c]}
    values = segmentation_metrics(matrix, list("01234"))
    assert set(iou) == {0, 1, 3} and math.isnan(values["iou/2"]) and math.isnan(values["iou/4"])
    for c, value in iou.items():
        assert values[f"iou/{c}"] == pytest.approx(value)
    assert values["mIoU"] == pytest.approx(sum(iou.values()) / 3)
    assert values["mAcc"] == pytest.approx(100 * sum(len(t[c] & p[c]) / len(t[c]) for c in iou) / 3)
    assert values["aAcc"] == pytest.approx(100 * sum(len(t[c] & p[c]) for c in iou) / len(pixels))
    assert values["majority"] == pytest.approx(100 * max(map(len, t.values())) / len(pixels))


def test_metrics_of_ignored_pixels_are_undefined() -> None:
    matrix = confusion_matrix(torch.zeros(4, 4, dtype=torch.int64), torch.full((4, 4), IGNORE), 3)
    assert all(map(math.isnan, segmentation_metrics(matrix, "abc").values()))


# --- datasets


def test_folder_of_images_and_masks(tmp_path: Path) -> None:
    """Nested names, palette indices, one channel, and as many classes as the masks have."""
    mask = np.zeros((12, 20), np.uint8)
    mask[3:, 5:] = 2
    mask[0, 0] = IGNORE
    save_pair(tmp_path, "a/one", (12, 20), mask)
    save_pair(tmp_path, "two", (12, 20), None)
    palette = Image.fromarray(mask, mode="P")
    palette.putpalette([9, 9, 9] * 256)
    palette.save(tmp_path / "masks" / "two.png")
    for channels in (1, 3):
        pairs = open_segmentation(str(tmp_path), ImageSpec(channels), "training")
        assert len(pairs) == 2 and pairs.classes == ["class 0", "class 1", "class 2"]
        assert pairs.path_of(0).endswith("images/a/one.png")
        for index in (0, 1):
            assert pairs.image(index).shape == (channels + 1, 12, 20)
            assert (pairs.image(index)[-1].numpy() == mask).all()
    (tmp_path / "classes.txt").write_text("sky\nroad\ncar\nrider\n")
    assert open_segmentation(str(tmp_path), ImageSpec(), "training").classes == ["sky", "road", "car", "rider"]
    with pytest.raises(UserError, match="4 instead of 2"):
        open_segmentation(str(tmp_path), ImageSpec(), "validation", ["sky", "road"])
    with pytest.raises(UserError, match="number 1 is 'road' instead of 'lane'"):
        open_segmentation(str(tmp_path), ImageSpec(), "validation", ["sky", "lane", "car", "rider"])
    with pytest.raises(UserError, match=rf"shapes: and the train data differ in their classes: {1 + len(SHAPES)} inst"):
        open_segmentation("shapes:", ImageSpec(), "validation", ["sky", "road"])


def test_ade20k_layout(tmp_path: Path) -> None:
    mask = np.array([[0, 1], [2, 255]], np.uint8)
    for part, names in (("training", "ab"), ("validation", "c")):
        for name in names:
            save_pair(tmp_path, f"{part}/{name}", (2, 2), mask, "annotations")
    (tmp_path / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t.1\t1\t1\t1\twall\n2\t.1\t1\t1\t0\tflag, banner\n"
    )
    train, test = (open_segmentation(str(tmp_path), ImageSpec(), part) for part in ("training", "validation"))
    assert (len(train), len(test)) == (2, 1) and train.classes == ["wall", "flag"]
    assert train.image(0)[-1].tolist() == [[IGNORE, 0], [1, IGNORE]]
    assert test.path_of(0).endswith("images/validation/c.png")


def test_unusable_folders_and_pairs_are_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        open_segmentation(str(tmp_path / "nowhere"), ImageSpec(), "training")
    (tmp_path / "x.zip").touch()
    with pytest.raises(UserError, match=r"x\.zip is a file: segmentation reads a folder"):
        open_segmentation(str(tmp_path / "x.zip"), ImageSpec(), "training")
    with pytest.raises(UserError, match="lacks images/ or masks/"):
        open_segmentation(str(tmp_path), ImageSpec(), "training")
    save_pair(tmp_path, "lonely", (4, 4), None)
    with pytest.raises(UserError, match=r"no image of .* has a mask that can be read"):
        open_segmentation(str(tmp_path), ImageSpec(), "training")
    (tmp_path / "classes.txt").write_text("a\nb\n")
    save_pair(tmp_path, "small", (4, 4), np.zeros((4, 5), np.uint8))
    save_pair(tmp_path, "many", (4, 4), np.full((4, 4), 2, np.uint8))
    save_pair(tmp_path, "deep", (4, 4), np.full((4, 4), 999, np.uint16))
    save_pair(tmp_path, "color", (4, 4), np.zeros((4, 4, 3), np.uint8))
    save_pair(tmp_path, "broken", (4, 4), np.zeros((4, 4), np.uint8))
    (tmp_path / "masks" / "broken.png").write_bytes(b"\x89PNG")
    save_pair(tmp_path, "valid", (4, 4), np.ones((4, 4), np.uint8))
    pairs = open_segmentation(str(tmp_path), ImageSpec(), "training")
    errors = {}
    for index in range(len(pairs)):
        try:
            pairs.image(index)
        except BadImage as error:
            errors[Path(pairs.path_of(index)).stem] = str(error)
    assert errors.keys() == {"lonely", "small", "many", "deep", "color", "broken"}
    assert "mask not found" in errors["lonely"] and "mask 5x4, image 4x4" in errors["small"]
    assert "without a class: 2, of 2 classes" in errors["many"] and "outside 0 to 255: 999" in errors["deep"]
    assert "mode RGB" in errors["color"] and "cannot be read" in errors["broken"]
    skipped = BadImageLog(tmp_path / "skipped.csv", len(pairs), 1.0)
    assert [index for index, _ in iterate_pairs(pairs, skipped, threads=2)] == [6] and len(skipped) == 6
    assert set(skipped.reasons.split("; ")) == {
        "1 x mask not found",
        "1 x image and mask differ in size",
        "1 x mask value without a class",
        "1 x mask value outside 0 to 255",
        "2 x mask cannot be read",
    }


def mask_of(*values: int) -> np.ndarray:
    """Return stripes of 8 rows, one per value."""
    return np.repeat(np.asarray(values, np.uint8), 8)[:, None].repeat(16, axis=1)


SMOOTHED = np.concatenate(
    [mask_of(0), np.arange(15, 255, 15, dtype=np.uint8)[:, None].repeat(16, 1)[::2], mask_of(255)]
)


@pytest.mark.parametrize(
    ("mask", "options", "pattern"),
    [
        (mask_of(0, 255), {}, r"2 values, 0 \(50.0 %\), 255 .*--foreground 255"),
        (mask_of(0, 255), {"foreground": 255}, "background 50.0 %, foreground 50.0 %"),
        (mask_of(0, 255), {"ignore": "none"}, "value 0 50.0 %, value 255 50.0 %"),
        (mask_of(0, 0, 0, 1, 255), {}, r"class 0 75.0 %, class 1 25.0 %; 20.0 % of the pixels do not count"),
        (mask_of(0, 100, 200), {}, "3 values.*not class numbers counted from 0: add --ignore none"),
        (mask_of(0, 100, 200, 200), {"ignore": "none"}, "3 classes: value 200 50.0 %, value 0 25.0 %"),
        (mask_of(0, 100, 200), {"ignore": "200"}, "value 0 50.0 %, value 100 50.0 %; 33.3 % of the pixels"),
        (mask_of(0, 100, 200), {"foreground": 200}, "background 66.7 %, foreground 33.3 %"),
        (SMOOTHED, {}, "never fill even 2 x 2 pixels"),
        (SMOOTHED, {"ignore": "none"}, "never fill even 2 x 2 pixels"),
        (SMOOTHED, {"foreground": 255}, "foreground 33.3 %"),
        (mask_of(1), {}, "have pixels of 1 class"),
        (mask_of(255), {}, "255 does not count: add --foreground 255"),
        (mask_of(0, 1), {"foreground": 7}, "pixels of 1 class.*0 .50.0 %., 1 .50.0 %."),
        (mask_of(0, 1), {"foreground": 7, "ignore": "0"}, "--foreground takes a value"),
        (mask_of(0, 1), {"ignore": "white"}, "--ignore takes auto, none, or a value from 0 to 255, not 'white'"),
    ],
)
def test_meaning_of_mask_values(mask: np.ndarray, options: dict[str, Any], pattern: str, tmp_path: Path) -> None:
    """The meaning is printed before training, or refused with the values and the flag to add."""
    for name in "ab":
        save_pair(tmp_path, name, mask.shape, mask)  # type: ignore[arg-type]
    console = Console(file=io.StringIO(), width=500)
    try:
        pairs = open_segmentation(str(tmp_path), ImageSpec(), "training", **options)
        check_masks(pairs, BadImageLog(None, 2, 0.25), "train", console)
        text = console.file.getvalue()  # type: ignore[attr-defined]
    except UserError as error:
        text = str(error)
        assert "--foreground" in text or "--ignore" in text
    assert re.search(pattern, text)


def test_binary_masks_in_ade20ks_layout_and_names_without_pixels(tmp_path: Path) -> None:
    for part in ("training", "validation"):
        for name in "abcde":
            save_pair(tmp_path, f"{part}/{name}", (16, 16), mask_of(0, 1))
    with pytest.raises(UserError, match="--ignore none"):
        check_masks(
            open_segmentation(str(tmp_path), ImageSpec(), "training"),
            BadImageLog(None, 5, 0.25),
            "train",
            Console(quiet=True),
        )
    (tmp_path / "classes.txt").write_text("road\ncar\nrider\n")
    (tmp_path / "masks" / "training" / "c.png").unlink()
    train = open_segmentation(str(tmp_path), ImageSpec(), "training", ignore="none")
    console = Console(file=io.StringIO(), width=500)
    check_masks(train, BadImageLog(None, 5, 0.25), "train", console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "train masks: 4 images of 3 classes: road 50.0 %, car 50.0 %, rider 0.0 %" in text
    assert "1 of 5 images are left out: 1 x mask not found" in text
    assert "warning: 1 classes without a pixel cannot be learned: rider" in text
    for name in "de":
        (tmp_path / "masks" / "training" / f"{name}.png").unlink()
    with pytest.raises(UserError, match="3 of the first 5 images cannot be read"):
        check_masks(train, BadImageLog(None, 5, 0.25), "train", Console(quiet=True))


def test_masks_of_synthetic_shapes() -> None:
    pairs = open_segmentation(TEST, ImageSpec(), "validation")
    sample = SyntheticShapes.from_spec(TEST).sample(3)
    assert pairs.classes[0] == "background" and len(pairs.classes) == 11
    assert (pairs.image(3)[-1].numpy() == sample.mask * (sample.shape + 1)).all()


# --- crops and colors


@pytest.mark.parametrize(("size", "height", "width"), [((32, 32), 60, 40), ((24, 40), 30, 90), ((32, 32), 28, 20)])
def test_crops_keep_image_and_mask_together(size: tuple[int, int], height: int, width: int) -> None:
    """An image equal to its mask stays so, where the mask counts and no edge makes the image gray."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None, :]
    mask = ((rows // 9 + columns // 11) % 2).to(torch.uint8)
    ignored = 0
    for k in range(40):
        out = JitteredCrop(size).crop(torch.stack([mask * 200, mask]), np.random.default_rng(k).random(21).tolist())
        assert out.shape == (2, *size)
        known = out[1] != IGNORE
        sharp = known & ((out[0] == 0) | (out[0] == 200))
        assert sharp.sum() > 0.3 * known.sum() and torch.equal(out[0][sharp], out[1][sharp] * 200)
        ignored += int((~known).sum())
    assert ignored > 0  # images smaller than the crop


def test_crop_avoids_windows_of_a_single_class() -> None:
    """Compare with a loop over the ten windows of an image that is not resized."""
    mask = torch.zeros(64, 70, dtype=torch.uint8)
    mask[:30, :30], mask[40:, 50:] = 1, IGNORE
    pair, tries = torch.stack([mask, mask]), []
    for k in range(60):
        u = np.random.default_rng(k).random(21).tolist()
        for n in range(10):
            top, left = int(u[1 + 2 * n] * 45), int(u[2 + 2 * n] * 51)
            window = mask[top : top + 20, left : left + 20]
            ones, zeros = int((window == 1).sum()), int((window == 0).sum())
            if max(ones, zeros) < 0.75 * (ones + zeros):
                break
        tries.append(n)
        assert torch.equal(JitteredCrop((20, 20), (3.2, 3.2)).crop(pair, u)[1], window)
    assert {0, 9} < set(tries)


def test_symmetric_indices_and_nearest_resize() -> None:
    assert symmetric_indices(1, 8, 3).tolist() == [1, 2, 2, 1, 0, 0, 1, 2]
    assert symmetric_indices(0, 3, 1).tolist() == [0, 0, 0]
    mask = np.random.default_rng(0).integers(0, 9, (7, 5), np.uint8)
    expected = F.interpolate(torch.from_numpy(mask)[None, None].float(), size=(11, 3), mode="nearest-exact")
    assert (resize_nearest(mask, (11, 3)) == expected[0, 0].numpy()).all()


def test_color_distortion_equals_a_loop_over_pixels() -> None:
    generator = torch.Generator().manual_seed(3)
    images, u = torch.rand(12, 3, 2, 3, generator=generator), torch.rand(12, 9, generator=generator)
    images[0, :, 0, 0] = 0.4  # gray has no hue
    distorted = distort_colors(images, u)
    for i in range(12):
        b_on, b, c_on, c, late, s_on, s, h_on, h = u[i].tolist()
        for y, x in np.ndindex(2, 3):
            rgb = images[i, :, y, x].double().numpy()
            if b_on < 0.5:
                rgb = np.clip(rgb + (2 * b - 1) * 32 / 255, 0, 1)
            if c_on < 0.5 and late < 0.5:
                rgb = np.clip(rgb * (0.5 + c), 0, 1)
            hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
            saturation = min(1, saturation * (0.5 + s)) if s_on < 0.5 else saturation
            hue = (hue + (2 * h - 1) / 10) % 1 if h_on < 0.5 else hue
            rgb = np.asarray(colorsys.hsv_to_rgb(hue, saturation, value))
            if c_on < 0.5 and late >= 0.5:
                rgb = np.clip(rgb * (0.5 + c), 0, 1)
            np.testing.assert_allclose(distorted[i, :, y, x], rgb, atol=2e-5)
    gray = distort_colors(images[:, :1], u)
    assert gray.shape == (12, 1, 2, 3) and gray.min() >= 0 and gray.max() <= 1


# --- encoders and heads


@pytest.mark.parametrize("family", FAMILIES)
def test_four_maps_of_every_encoder(family: str, tiny_run: Make) -> None:
    """Check shapes at another image size than the encoder's own; the last map, normalized, is that of `features`."""
    encoder = encoder_of(tiny_run(model=FAMILIES[family]))
    module = rebuild_at_size(encoder, "64x128" if family != "swin" else "128x128").eval()
    x = torch.randn(2, 3, *((64, 128) if family != "swin" else (128, 128)))
    found = maps(module, x)
    assert [m.shape[1] for m in found] == widths(module)
    strides = [8] * 4 if family in ("vit", "beit") else [4, 8, 16, 32]
    assert [tuple(m.shape[2:]) for m in found] == [(x.shape[2] // s, x.shape[3] // s) for s in strides]
    last = found[2] if family == "convmae" else found[3]
    norm: Any = {"resnet": nn.Identity(), "convnext": getattr(module, "head", None)}.get(family, module)
    norm = getattr(norm, "norm", norm)
    last = last.permute(0, 2, 3, 1)
    again = (
        nn.functional.layer_norm(last, last.shape[-1:], norm.weight, norm.bias, norm.eps)
        if hasattr(norm, "eps")
        else last
    )
    again = again.permute(0, 3, 1, 2)
    torch.testing.assert_close(again, features(module, x).map, atol=1e-5, rtol=1e-5)


def test_map_depths_are_those_of_beit_and_mae(tiny_run: Make) -> None:
    for depth, expected in ((12, [3, 5, 7, 11]), (24, [7, 11, 15, 23]), (2, [0, 0, 0, 1])):
        options = {"patch_size": 16, "embed_dim": 8, "depth": depth, "num_heads": 1}
        run = tiny_run(model=replace(FAMILIES["vit"], options=options))
        encoder = encoder_of(run).module
        outputs: list[Tensor] = []
        for block in encoder.blocks:  # type: ignore[union-attr]
            block.register_forward_hook(lambda module, args, output, keep=outputs.append: keep(output))
        for m, d in zip(maps(encoder, torch.randn(1, 3, 32, 32)), expected, strict=True):
            torch.testing.assert_close(m.flatten(2).transpose(1, 2), outputs[d][:, 1:])


def test_rebuilding_an_encoder_at_its_own_size_changes_nothing(tiny_run: Make) -> None:
    for model in FAMILIES.values():
        encoder = encoder_of(tiny_run(model=model))
        again, x = rebuild_at_size(encoder, "32", drop_path_rate=0.5).eval(), torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(features(again, x).map, features(encoder.module, x).map)
        rates = [m.drop_prob for m in again.modules() if hasattr(m, "drop_prob")]
        assert max(rates) == pytest.approx(0.5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", ["linear", "uper"])
def test_every_encoder_trains_with_both_heads(family: str, head: str, tiny_run: Make, tmp_path: Path) -> None:
    """A few steps change every parameter that is not frozen, and no other."""
    size = "32x48" if family in ("vit", "beit") else "64"
    settings = replace(QUICK, head=head, size=size, steps=3, accumulation_steps=2)
    run = tiny_run(model=FAMILIES[family], channels=1 if family == "vit" else 3)
    encoder = encoder_of(run)
    model, crop = build(encoder, settings, 11)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit(
        model,
        encoder,
        settings,
        open_segmentation(TRAIN, encoder.image_spec, "training"),
        crop,
        folder=tmp_path,
        skipped=BadImageLog(None, 60, 0.1),
    )
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    frozen = [name for name, p in model.encoder.named_parameters() if not p.requires_grad]
    assert (len(frozen) == len(list(model.encoder.parameters()))) == (head == "linear")
    model.eval()
    prediction = segment(model, encoder, torch.randint(0, 255, (run.channels, 50, 70), dtype=torch.uint8), crop)
    assert prediction.shape == (50, 70) and prediction.max() < 11


@pytest.mark.parametrize("width", [512, 768])
def test_uper_has_the_published_number_of_parameters(width: int) -> None:
    """Count the parameters of UPerNet on ViT-B by hand from its convolutions and norms; MAE's has 768 channels."""
    with torch.device("meta"):
        run = PretrainConfig(model=ArchitectureConfig("mae", "vit_base_patch16_224"), size="512")
        model = Segmenter(build_encoder(run), "uper", 150, width)

    def conv(i: int, o: int, k: int) -> int:
        return i * o * k * k + 2 * o

    neck = 3 * (768 * 768 * 4 + 768) + 2 * 768
    head = 7 * conv(768, width, 1) + conv(768 + 4 * width, width, 3) + 3 * conv(width, width, 3)
    head += conv(4 * width, width, 3) + width * 150 + 150
    auxiliary = conv(768, 256, 3) + 256 * 150 + 150
    for part, expected in ((model.neck, neck), (model.head, head), (model.auxiliary, auxiliary)):
        assert part is not None and sum(p.numel() for p in part.parameters()) == expected


def test_loss_is_cross_entropy_of_labeled_pixels_over_all() -> None:
    scores, masks = torch.randn(2, 5, 4, 4), torch.randint(0, 5, (2, 8, 8))
    masks[0, :3] = IGNORE
    large = F.interpolate(scores, scale_factor=2, mode="bilinear").log_softmax(dim=1)
    picked = [
        -float(large[i, masks[i, y, x], y, x]) for i, y, x in np.ndindex(2, 8, 8) if int(masks[i, y, x]) != IGNORE
    ]
    assert float(segmentation_loss([scores], masks)) == pytest.approx(sum(picked) / 128, rel=1e-5)
    assert float(segmentation_loss([scores, scores], masks)) == pytest.approx(1.4 * sum(picked) / 128, rel=1e-5)
    assert float(segmentation_loss([scores], torch.full_like(masks, IGNORE))) == 0


def test_learning_rate_is_maes() -> None:
    published, rate = SegmentationSettings("a", "b"), learning_rate
    assert rate(published, 1499) == pytest.approx(1e-4 * (1 - 1499 / 160_000))
    assert rate(published, 749) == pytest.approx(0.5e-4 * (1 - 749 / 160_000))
    assert rate(published, 80_000) == pytest.approx(0.5e-4) and rate(published, 159_999) < 1e-9
    assert SegmentationSettings("a", "b", head="linear").rate == 1e-3


@pytest.mark.parametrize("pixels", ["uint16", "float32"])
def test_images_of_16_bits_and_floats(pixels: str, tiny_run: Make, tmp_path: Path) -> None:
    """Train and test on five channels of 16 bits or floating point."""
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    generator = np.random.default_rng(0)
    for i in range(6):
        values = generator.integers(0, 65535, (40, 36, 5)).astype(np.uint16)
        np.save(tmp_path / "images" / f"{i}.npy", values if pixels == "uint16" else (values / 65535).astype(np.float32))
        Image.fromarray(generator.integers(0, 3, (40, 36), np.uint8)).save(tmp_path / "masks" / f"{i}.png")
    run = tiny_run(channels=5, dtype=pixels)
    context = EvalContext(encoder_of(run), tmp_path / "out")
    values = dict(evaluate_segmentation(context, replace(QUICK, train=str(tmp_path), test=str(tmp_path), steps=2)))
    assert values["images"] == 6 and 0 <= values["mIoU"] <= 100


# --- windows


def test_windows_cover_every_pixel() -> None:
    starts = window_starts
    assert starts(512, 512) == [0] and starts(683, 512) == [0, 171] and starts(1024, 512) == [0, 341, 512]
    assert starts(32, 32) == [0] and starts(33, 32) == [0, 1]


@pytest.mark.parametrize("head", ["linear", "uper"])
def test_one_window_equals_the_full_image(head: str, tiny_run: Make) -> None:
    encoder = encoder_of(tiny_run())
    model, size = build(encoder, replace(QUICK, head=head), 11)
    model.eval()
    image = torch.randint(0, 255, (3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        (scores,) = model(flip_and_normalize(image[None], None, encoder.mean, encoder.std))
    expected = F.interpolate(scores, size=(32, 32), mode="bilinear")[0].argmax(dim=0)
    assert torch.equal(segment(model, encoder, image, size), expected)


def test_overlapping_windows_are_averaged(tiny_run: Make) -> None:
    """Compare with two windows by hand, for a network that sees the full window."""
    encoder = encoder_of(tiny_run())
    model, size = build(encoder, QUICK, 11)
    model.eval()
    image = torch.randint(0, 255, (3, 32, 50), dtype=torch.uint8)
    x = flip_and_normalize(image[None], None, encoder.mean, encoder.std)
    total, count = torch.zeros(11, 32, 50), torch.zeros(50)
    for left in (0, 18):
        with torch.no_grad():
            (scores,) = model(x[..., left : left + 32])
        total[..., left : left + 32] += F.interpolate(scores, size=size, mode="bilinear")[0]
        count[left : left + 32] += 1
    assert torch.equal(segment(model, encoder, image, size), (total / count).argmax(dim=0))


def test_scores_that_are_not_finite_are_no_classes(tiny_run: Make) -> None:
    encoder = encoder_of(tiny_run())
    model, size = build(encoder, replace(QUICK, head="linear"), 11)
    model.eval().head[-1].bias.data[3] = torch.nan  # type: ignore[index, operator, union-attr]
    with pytest.raises(UserError, match="scores of the segmentation are not finite"):
        segment(model, encoder, torch.zeros(3, 32, 32, dtype=torch.uint8), size)


def test_argmax_in_chunks() -> None:
    scores = torch.randn(40, 5, 6)
    expected = F.interpolate(scores[None], size=(11, 9), mode="bilinear")[0].argmax(dim=0)
    assert torch.equal(argmax_at_size(scores, (11, 9)), expected)


# --- training and evaluation


def test_batches_are_flipped_with_their_masks(tiny_run: Make) -> None:
    encoder = encoder_of(tiny_run())
    pair = torch.randint(0, 255, (4, 8, 8), dtype=torch.uint8)
    batch = Batch(pair.repeat(2, 1, 1, 1), torch.tensor([False, True]), torch.tensor([5, 5]))
    x, masks = prepare_batch(batch, encoder, 0, 3)
    assert torch.equal(masks[1], masks[0].flip(-1)) and torch.equal(masks[0], pair[-1].long())
    torch.testing.assert_close(x[1], x[0].flip(-1))  # one image, one distortion
    assert not torch.equal(prepare_batch(batch, encoder, 0, 4)[0], x)


@pytest.mark.parametrize("head", ["linear", "uper"])
def test_training_resumes_bitwise(head: str, tiny_run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt after step 3 of 6, with dropout and drop path, and compare with an uninterrupted training."""
    encoder = encoder_of(tiny_run())
    settings, train = replace(QUICK, head=head, accumulation_steps=2), open_segmentation(TRAIN, ImageSpec(), "training")

    def trained(folder: str) -> dict[str, Tensor]:
        model, size = build(encoder, settings, 11)
        fit(model, encoder, settings, train, size, folder=tmp_path / folder, skipped=BadImageLog(None, 60, 0.1))
        return dict(model.state_dict())

    expected = trained("uninterrupted")

    class Stops(trainer.PreemptionHandler):
        count = 0

        @property
        def requested(self) -> bool:  # type: ignore[override]
            type(self).count += 1
            return type(self).count > 2  # read once per step

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "PreemptionHandler", Stops)
        with pytest.raises(KeyboardInterrupt):
            trained("interrupted")
    torch.manual_seed(99)
    resumed = trained("interrupted")
    assert expected.keys() == resumed.keys()
    for name, value in expected.items():
        assert torch.equal(value, resumed[name]), name


def test_a_trained_head_beats_the_majority_class(tiny_run: Make, tmp_path: Path) -> None:
    """Segment squares by their color; check values, drawing and files as well."""
    run = tiny_run()
    (tmp_path / "config.json").write_text(to_json(run))
    save_encoder(build_model(run).encoder, tmp_path / "encoder", run, step=7)
    context = EvalContext(load_frozen_encoder(str(tmp_path), device="cpu", precision="fp32"), tmp_path)
    root = tmp_path / "pairs"
    for part, count in (("training", 40), ("validation", 10)):
        for i in range(count):
            generator = np.random.default_rng([i, count])
            mask = np.ones((36, 44), np.uint8)
            top, left = generator.integers(0, 20, 2)
            mask[top : top + 16, left : left + 16] = 2
            pixels = np.where(mask[..., None] == 2, [200, 60, 40], [30, 90, 160]) + generator.integers(
                0, 40, (36, 44, 3)
            )
            mask[0] = 0
            save_pair(root, f"{part}/{i}", (36, 44), mask, "annotations")
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / part / f"{i}.png")
    settings = replace(QUICK, train=str(root), test=str(root), steps=40, batch_size=8, head="uper", lr=1e-3)
    values = dict(evaluate_segmentation(context, settings))
    true = torch.cat(
        [
            pair[-1].flatten()
            for _, pair in iterate_pairs(
                open_segmentation(str(root), ImageSpec(), "validation"), BadImageLog(None, 10, 0)
            )
        ]
    )
    zeros = torch.zeros_like(true, dtype=torch.int64)
    baseline = segmentation_metrics(confusion_matrix(zeros, true.long(), 2), "ab")
    assert values["aAcc"] > baseline["aAcc"] + 5 and values["mIoU"] > baseline["mIoU"] + 20
    assert (
        values["mIoU"] == pytest.approx((values["iou/class 0"] + values["iou/class 1"]) / 2) and values["images"] == 10
    )
    (picture,) = context.images.values()
    assert picture.width > 500 and picture.height > 900
    assert not (tmp_path / "unfinished").exists() or not list((tmp_path / "unfinished").iterdir())


def test_inconsistent_settings_are_refused(tiny_run: Make, tmp_path: Path) -> None:
    encoder = encoder_of(tiny_run())
    with pytest.raises(UserError, match="choose multiples of 8"):
        build(encoder, replace(QUICK, size="30"), 3)
    with pytest.raises(UserError, match="equal parts of 2 images or more"):
        replace(QUICK, accumulation_steps=4)
    with pytest.raises(UserError, match="contains no weights"):
        list(evaluate(str(tmp_path), [("segmentation", QUICK)], tmp_path))


def test_overlays_color_all_but_ignored_pixels() -> None:
    image, mask = np.full((2, 2, 3), 100, np.uint8), np.array([[0, 1], [1, IGNORE]])
    palette = class_colors(2)
    drawn = overlay_mask(image, mask, palette)
    assert drawn[1, 1].tolist() == [100] * 3 and drawn[0, 1].tolist() == drawn[1, 0].tolist()
    np.testing.assert_allclose(drawn[0, 0], 45 + 0.55 * palette[0], atol=1)
    assert len({tuple(c) for c in class_colors(150).tolist()}) == 150


def test_relative_biases_of_a_window_of_two_are_interpolated() -> None:
    """Fit a parabola to three distances; in a window of three the known ones keep their values."""
    table = torch.randn(9, 2)
    interpolated = relative_biases(table, (2, 2), (3, 3)).view(5, 5, 2)
    torch.testing.assert_close(interpolated[1:4, 1:4], table.view(3, 3, 2), atol=1e-5, rtol=0)
