"""Test object coverage against enumeration, torchvision's crop and simulation; and the readers of annotations."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop as TorchvisionCrop

from pixmim import cli
from pixmim.evaluation.annotations import ImageObject, read_objects
from pixmim.evaluation.object_coverage import (
    crops,
    draw,
    expected_coverage,
    measure_coverage,
    sampled_coverage,
    window_cover,
)
from pixmim.transforms.crops import CenterCrop, RandomResizedCrop, SimpleResizedCrop
from pixmim.utils.errors import UserError

BOXES = [
    ((375, 500), (100.0, 60.0, 380.0, 300.0)),
    ((375, 500), (3.0, 5.0, 9.0, 8.0)),  # tiny, in the corner
    ((500, 333), (0.0, 0.0, 333.0, 500.0)),  # the complete image
    ((120, 600), (10.5, 20.25, 580.0, 100.0)),  # five times as wide as high: RRC often fails
    ((64, 64), (20.0, 20.0, 21.0, 64.0)),
]


def test_window_cover_against_enumeration() -> None:
    for length, window in ((10, 3), (10, 8), (7, 7), (9, 1), (11, 6)):
        for edge in np.linspace(0, length, 23):
            inside = [np.clip(edge - start, 0, window) for start in range(length - window + 1)]
            assert window_cover(edge, window, length) == pytest.approx(np.mean(inside), abs=1e-12)
    assert window_cover([[0.0, 4.0]], [[2], [4]], 4).shape == (2, 2)


@pytest.mark.parametrize("name", crops((224, 224)))
@pytest.mark.parametrize(("size", "box"), BOXES)
def test_expectation_is_what_drawing_gives(
    name: str, size: tuple[int, int], box: tuple[float, float, float, float]
) -> None:
    thing, crop = ImageObject("a", size, box), crops((224, 224))[name]
    each = sampled_coverage(thing, crop, 3000)
    assert each.min() >= 0 and each.max() <= 1 + 1e-9
    error = each.std(ddof=1) / len(each) ** 0.5
    assert abs(each.mean() - expected_coverage(thing, crop)) <= 4 * error + 2e-4


def test_rrc_against_torchvisions_own_boxes() -> None:
    torch.manual_seed(0)
    for size, (left, top, right, bottom) in BOXES[:1] + BOXES[3:4]:
        image, found = torch.zeros(1, *size), []
        for _ in range(4000):
            i, j, h, w = TorchvisionCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3])
            down, across = min(bottom, i + h) - max(top, i), min(right, j + w) - max(left, j)
            found.append(max(down, 0) * max(across, 0) / (bottom - top) / (right - left))
        error = np.std(found) / len(found) ** 0.5
        wanted = expected_coverage(ImageObject("a", size, (left, top, right, bottom)), RandomResizedCrop(224))
        assert abs(np.mean(found) - wanted) <= 4 * error + 2e-4


def test_src_against_all_its_crops_and_without_what_is_mirrored() -> None:
    whole = ImageObject("a", (40, 60), (0.0, 0.0, 60.0, 40.0))
    crop = SimpleResizedCrop(40, padding=4)
    kept = []
    for top in range(-4, 5):  # rows and columns of the image in the crop
        for left in range(-4, 25):
            kept.append((40 - abs(top)) * (min(60, left + 40) - max(0, left)) / (40 * 60))
    assert expected_coverage(whole, crop) == pytest.approx(np.mean(kept), abs=1e-12)
    square = ImageObject("a", (40, 40), (0.0, 0.0, 40.0, 40.0))
    assert expected_coverage(square, CenterCrop(40)) == 1 and expected_coverage(square, crop) < 1
    assert expected_coverage(ImageObject("a", (40, 80), (0.0, 0.0, 80.0, 40.0)), CenterCrop(40)) == pytest.approx(0.5)


@pytest.mark.parametrize("name", crops((32, 32)))
def test_a_mask_that_fills_its_box_counts_as_the_box(name: str) -> None:
    mask = np.zeros((48, 60), bool)
    mask[10:30, 5:44] = True
    thing, crop = ImageObject("a", (48, 60), (5.0, 10.0, 44.0, 30.0), mask), crops((32, 32))[name]
    assert expected_coverage(thing, crop) == pytest.approx(
        expected_coverage(ImageObject("a", (48, 60), thing.box), crop), abs=1e-9
    )
    mask = np.random.default_rng(0).random((48, 60)) < 0.2
    each = sampled_coverage(ImageObject("a", (48, 60), (0.0, 0.0, 60.0, 48.0), mask), crop, 1000)
    wanted = expected_coverage(ImageObject("a", (48, 60), (0.0, 0.0, 60.0, 48.0), mask), crop)
    assert abs(each.mean() - wanted) <= 4 * each.std() / 1000**0.5 + 5e-4


def test_masks_beside_a_folder_of_images_are_the_objects(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    Image.new("RGB", (40, 40), "white").save(tmp_path / "images/0.jpg")
    mask = np.zeros((40, 40), np.uint8)
    mask[10:20, 5:15] = 255
    Image.fromarray(mask).save(tmp_path / "masks/0.png")
    (found,), _ = read_objects(str(tmp_path))
    assert found.box == (5, 10, 15, 20)


def test_means_of_images_and_of_objects(tmp_path: Path) -> None:
    table = tmp_path / "boxes.csv"
    table.write_text(
        "image,width,height,x,y,w,h\na,80,40,0,0,80,40\na,80,40,30,10,20,20\nb,40,40,0,0,40,40\nb,40,40,50,50,9,9\n"
    )
    found = measure_coverage(str(table), (40, 40), 0.75, draws=400)
    assert found.problems.left_out == 1 and len(found.objects) == 3
    assert found.values["CC"] == pytest.approx([0.5, 1, 1])
    means = found.means()
    assert means["CC"]["object"] == pytest.approx(2.5 / 3) and means["CC"]["image"] == pytest.approx((0.75 + 1) / 2)
    assert means["CC"]["masked/image"] == pytest.approx(means["CC"]["image"] / 4)
    assert replace(found, mask_ratio=0.625).table().columns[3].header == "images, 62.5% masked"
    for mean in means.values():
        assert abs(mean["simulated/object"] - mean["object"]) <= 4 * mean["simulated/error"] + 5e-4
    assert means["RRC (0.67, 1)"]["object"] > means["RRC (0.2, 1)"]["object"]


def test_every_kind_of_file_says_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("width,height,x,y,w,h\n60,40,10,5,20,30\n60,40,-5,-5,15,15\n")
    images = [{"id": i, "width": 60, "height": 40, "file_name": f"{i}.jpg"} for i in (1, 2)]
    notes = [{"id": 1, "image_id": 1, "bbox": [10, 5, 20, 30]}, {"id": 2, "image_id": 2, "bbox": [-5, -5, 15, 15]}]
    crowd = {"id": 3, "image_id": 2, "bbox": [0, 0, 60, 40], "iscrowd": 1}
    (tmp_path / "a.json").write_text(json.dumps({"images": images, "annotations": [*notes, crowd]}))
    for i, (left, top, right, bottom) in enumerate([(11, 6, 30, 35), (-4, -4, 10, 10)]):
        (tmp_path / "voc").mkdir(exist_ok=True)
        (tmp_path / f"voc/{i}.xml").write_text(
            f"<annotation><filename>{i}.jpg</filename><size><width>60</width><height>40</height></size><object><bndbox>"
            f"<xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox></object></annotation>"
        )
        mask = np.zeros((40, 60), np.uint8)
        mask[max(top - 1, 0) : bottom, max(left - 1, 0) : right] = 7
        (tmp_path / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(tmp_path / f"masks/{i}.png")
    for name in ("a.csv", "a.json", "voc", "masks"):
        found, problems = read_objects(str(tmp_path / name))
        assert [(o.size, o.box) for o in found] == [((40, 60), (10, 5, 30, 35)), ((40, 60), (0, 0, 10, 10))]
        assert problems.left_out == 0 and all((o.mask is not None) == (name == "masks") for o in found)


def test_objects_left_out_are_counted_by_their_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Only one of the three is outside of its image."""
    good = {"image_id": 1, "bbox": [1, 1, 5, 5]}
    bad = {"image_id": 9, "bbox": [1, 1, 5, 5]}, {"image_id": 1}, {"image_id": 1, "bbox": [40, 1, 5, 5]}
    images = [{"id": 1, "file_name": "a.jpg", "width": 40, "height": 30}]
    (tmp_path / "a.json").write_text(json.dumps({"images": images, "annotations": [good] * 9 + [*bad]}))
    assert cli.main(["coverage", str(tmp_path / "a.json"), "--size", "32", "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    for kind in ("have no image_id that the file lists", "have a bbox that is not four numbers", "their image"):
        assert f"{kind}: left out" in text
    assert json.loads((tmp_path / "out/coverage.json").read_text())["left_out"] == 3


def test_photographs_are_not_masks(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    for suffix, message in (("jpg", "PNG, TIFF, BMP, GIF or PGM"), ("png", "have no background, which is 0: 100.0 %")):
        (tmp_path / suffix).mkdir()
        Image.fromarray(pixels).save(tmp_path / suffix / f"a.{suffix}")
        with pytest.raises(UserError, match=message):
            read_objects(str(tmp_path / suffix))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "width,height,x,y\n1,2,3,4\n", "lacks the columns w, h"),
        ("a.csv", "width,height,x,y,w,h\n10,10,1,1,x,2\n", "line 2: six numbers"),
        ("a.csv", "sep=;\nwidth;height;x;y;w;h\n10;10;1;1;x;2\n", "line 2: six numbers"),
        ("a.csv", "width,height,x,y,w,h\n10,10,1,1,-3,2\n", "line 2: invalid box size -3x2"),
        ("a.csv", "width,height,x,y,w,h\n0,10,1,1,3,2\n", "line 2: invalid image size 0x10"),
        ("a.csv", "width,height,x,y,w,h\n10,10,nan,1,3,2\n", "not finite"),
        ("a.csv", "width,height,x,y,w,h\n10,10,20,20,3,2\n", "no object inside"),
        ("a.json", "{}", "not a COCO file"),
        ("a.xml", "<annotation/>", "not a .csv"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_objects(str(tmp_path / name))
    with pytest.raises(UserError, match=r"neither VOC \.xml"):
        (tmp_path / "empty").mkdir()
        read_objects(str(tmp_path / "empty"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["coverage", "shapes:count=30,size=48", "--size", "48", "--out", str(out), "--simulate", "50"]) == 0
    text = capsys.readouterr().out
    assert "SRC" in text and "±" in text and "written" in text
    kept = json.loads((out / "coverage.json").read_text())
    assert kept["objects"] == kept["images"] == 30 and set(kept["means"]) == set(crops((48, 48)))
    assert len((out / "coverage.csv").read_text().splitlines()) == 31
    assert Image.open(out / "coverage.png").width > 400
    assert cli.main(["coverage", "/no/such.csv"]) == 1 and cli.main(["coverage", "shapes:", "--mask-ratio", "1"]) == 1
    with pytest.raises(UserError, match="--simulate takes 2 crops or more"):
        measure_coverage("shapes:count=5,size=48", (48, 48), draws=1)
    with pytest.raises(UserError, match=r"--size must be above 4, .* not 4x48"):
        measure_coverage("shapes:count=5,size=48", (4, 48))
    assert measure_coverage("shapes:count=5,size=48", (5, 48)).means()
    boxes, masks = (measure_coverage("shapes:count=5,size=48", (48, 48), boxes=flag) for flag in (True, False))
    assert boxes.objects[0].mask is None and masks.objects[0].mask is not None
    assert draw(boxes) is not None
