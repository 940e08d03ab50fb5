"""COCO's average precision against a slow reference, and checks of annotation files."""

import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

pytest.importorskip("faster_coco_eval")

from pixmim.data.dataset import RGB, BadImage
from pixmim.evaluation.annotations import bounding_box
from pixmim.evaluation.detection import _choose_masks, _print_summary, _unmasked_as_crowds
from pixmim.evaluation.detection.coco_metrics import CocoMetrics, Detections
from pixmim.evaluation.detection.dataset import Objects, decode_mask, encode_mask, open_detection
from pixmim.evaluation.detection.loader import fit_to_square, jitter, make_target
from pixmim.evaluation.settings import DetectionSettings
from pixmim.utils.errors import UserError

SIDE = 40
Pair = tuple[Objects, Detections]


def mask_of(box: np.ndarray) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    left, top, right, bottom = box.astype(int)
    mask[top:bottom, left:right] = True
    return mask


def random_pairs(images: int, seed: int, classes: int = 4) -> list[Pair]:
    """Return objects and detections close to them, with ties, crowds, and images without objects or detections."""
    g = np.random.default_rng(seed)
    pairs = []
    for i in range(images):
        k = 0 if i % 5 == 1 else int(g.integers(1, 5))
        corner, size = g.integers(0, SIDE // 2, (k, 2)), g.integers(6, SIDE // 2, (k, 2))
        boxes = np.concatenate([corner, corner + size], 1).astype(np.float32)
        labels, crowd = g.integers(0, classes - 1, k), g.random(k) < 0.2  # the last class is absent
        areas = (size[:, 0] * size[:, 1]).astype(float)
        truth = Objects(boxes, labels, crowd, areas, [mask_of(box) for box in boxes])
        close = np.repeat(boxes, 2, axis=0) + g.integers(-2, 3, (2 * k, 4))
        distant = np.concatenate([corner, corner + 8], 1)[:1]
        guessed = np.concatenate([close, distant]).clip(0, SIDE).astype(np.float32)[: 0 if i % 5 == 2 else None]
        of = np.concatenate([np.repeat(labels, 2), labels[:1]])[: len(guessed)]
        of = np.where(g.random(len(of)) < 0.2, g.integers(0, classes, len(of)), of)
        scores = (g.integers(1, 6, len(guessed)) / 5).astype(np.float32)
        masks = [mask_of(box) for box in guessed]
        pairs.append((truth, Detections(guessed, of, scores, [encode_mask(mask) for mask in masks])))
    return pairs


def slow_precision(images: list[Pair], label: int, threshold: float, masks: bool) -> float:
    """Compute AP of a class at one IoU threshold by definition: greedy matching, monotone precision, 101 recalls."""
    guesses, total = [], 0
    for truth, found in images:
        objects = [i for i in range(len(truth.labels)) if truth.labels[i] == label]
        total += sum(not truth.crowd[i] for i in objects)
        mine = sorted((i for i in range(len(found.labels)) if found.labels[i] == label), key=lambda i: -found.scores[i])
        taken: set[int] = set()
        for guess in mine[:100]:
            best, match = threshold, None
            for i in sorted(objects, key=lambda i: truth.crowd[i]):
                if i in taken and not truth.crowd[i]:
                    continue
                if match is not None and not truth.crowd[match] and truth.crowd[i]:
                    break
                overlap = slow_overlap(truth, i, found, guess, masks)
                if overlap >= best:
                    best, match = overlap, i
            if match is None:
                guesses.append((found.scores[guess], False))
            elif not truth.crowd[match]:
                taken.add(match)
                guesses.append((found.scores[guess], True))
    if not total:
        return math.nan
    guesses.sort(key=lambda pair: -pair[0])  # stable, as images come
    right, points = 0, []
    for count, (_, hit) in enumerate(guesses, 1):
        right += hit
        points.append((right / total, right / count))
    return float(
        np.mean([max((p for r, p in points if r >= recall), default=0.0) for recall in np.linspace(0, 1, 101)])
    )


def slow_overlap(truth: Objects, i: int, found: Detections, guess: int, masks: bool) -> float:
    """Compute IoU, or for a crowd the share of the detection's area."""
    if masks:
        a, b = truth.masks[i], decode_mask(found.masks[guess], (SIDE, SIDE))
        common, own, other = float((a & b).sum()), float(b.sum()), float(a.sum())
    else:
        a, b = truth.boxes[i].astype(float), found.boxes[guess].astype(float)
        sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
        common = float(np.prod(sides.clip(0)))
        own, other = (float(np.prod(box[2:] - box[:2])) for box in (b, a))
    union = own if truth.crowd[i] else own + other - common
    return common / union if union else 0.0


@pytest.mark.parametrize("seed", [0, 1])
def test_average_precision_equals_the_slow_reference(seed: int) -> None:
    images = random_pairs(15, seed)
    metrics = CocoMetrics(list("abcd"), masks=True)
    for truth, found in images:
        metrics.update((SIDE, SIDE), truth, found)
    values = dict(metrics.compute())
    thresholds = [0.5 + 0.05 * i for i in range(10)]
    for kind in ("box", "mask"):
        slow = np.asarray([[slow_precision(images, c, t - 1e-9, kind == "mask") for t in thresholds] for c in range(4)])
        assert values[f"{kind}/AP"] == pytest.approx(100 * np.nanmean(slow), abs=1e-6)
        assert values[f"{kind}/AP50"] == pytest.approx(100 * np.nanmean(slow[:, 0]), abs=1e-6)
        assert values[f"{kind}/AP75"] == pytest.approx(100 * np.nanmean(slow[:, 5]), abs=1e-6)
        if kind == "box":
            assert [values[f"ap/{name}"] for name in "abc"] == pytest.approx((100 * slow.mean(axis=1)[:3]).tolist())
    assert math.isnan(values["ap/d"])  # detected, but absent
    assert 5 < values["box/AP"] < 95


def test_no_objects_are_nan_and_no_detections_are_zero() -> None:
    truth, found = random_pairs(1, 3)[0]
    empty = Objects(truth.boxes[:0], truth.labels[:0], truth.crowd[:0], truth.areas[:0], [])
    none = Detections(found.boxes[:0], found.labels[:0], found.scores[:0], [])
    truth = Objects(truth.boxes, truth.labels, np.zeros_like(truth.crowd), truth.areas, truth.masks)
    for objects, detections, expected in ((empty, none, math.nan), (empty, found, math.nan), (truth, none, 0.0)):
        metrics = CocoMetrics(list("abcd"), masks=True)
        metrics.update((SIDE, SIDE), objects, detections)
        values = dict(metrics.compute())
        assert values["box/AP"] == pytest.approx(expected, nan_ok=True)
        assert values["mask/AP50"] == pytest.approx(expected, nan_ok=True)
    crowd = Objects(truth.boxes, truth.labels, np.ones_like(truth.crowd), truth.areas, truth.masks)
    metrics = CocoMetrics(list("abcd"), masks=False)
    metrics.update((SIDE, SIDE), crowd, found)
    assert math.isnan(dict(metrics.compute())["box/AP"])
    exact = Detections(
        truth.boxes, truth.labels, np.ones(len(truth.labels), np.float32), [encode_mask(m) for m in truth.masks]
    )
    metrics = CocoMetrics(list("abcd"), masks=True)
    metrics.update((SIDE, SIDE), truth, exact)
    assert {round(v, 6) for k, v in metrics.compute() if v == v} == {100.0}


def annotation(**changes: Any) -> dict[str, Any]:
    square = {"segmentation": [[2, 2, 12, 2, 12, 12, 2, 12]], "area": 100, "iscrowd": 0}
    return {"id": 1, "image_id": 7, "category_id": 90, "bbox": [2, 2, 10, 10], **square, **changes}


@pytest.fixture
def coco_set(tmp_path: Path) -> Path:
    """Write three images of 20 x 30 in COCO's layout, the last without boxes; category ids have a gap."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "few").mkdir()
    for i in (7, 3, 5):
        Image.fromarray(np.full((20, 30, 3), 10 * i, np.uint8)).save(tmp_path / "few" / f"{i}.png")
    runs = {"size": [20, 30], "counts": [0, 20, 580]}  # the first column
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 20, "width": 30} for i in (7, 3, 5)],
        "categories": [{"id": 90, "name": "tooth"}, {"id": 2, "name": "bicycle"}],
        "annotations": [
            annotation(),
            annotation(image_id=3, category_id=2, bbox=[-5, 4, 15, 40], segmentation=runs),
            annotation(image_id=3, bbox=[0, 0, 1, 20], segmentation=runs, iscrowd=1),
            annotation(image_id=7, bbox=[40, 1, 5, 5]),
            annotation(image_id=7, bbox=[4, 1, 0, 5]),
        ],
    }
    (tmp_path / "annotations" / "instances_few.json").write_text(json.dumps(content))
    return tmp_path


def test_coco_file_with_gaps_crowds_and_images_without_boxes(coco_set: Path) -> None:
    data = open_detection(str(coco_set / "annotations" / "instances_few.json"), "", RGB)
    assert data.classes == ["bicycle", "tooth"] and not data.unmasked and len(data.images) == 3
    assert "1 boxes extend beyond" in data.problems and "1 boxes are outside" in data.problems
    first, second, third = (data.objects(i) for i in range(3))
    assert first.boxes.tolist() == [[2, 2, 12, 12]] and first.labels.tolist() == [1]
    assert second.boxes.tolist() == [[0, 4, 10, 20], [0, 0, 1, 20]] and second.labels.tolist() == [0, 1]
    assert second.crowd.tolist() == [False, True] and third.boxes.shape == (0, 4)
    assert decode_mask(first.masks[0], (20, 30)).sum() == 100
    assert bounding_box(decode_mask(second.masks[1], (20, 30))) == (0, 0, 1, 20)
    assert int(data.read(0)[0, 0, 0]) == 70
    target = make_target(second, fit_to_square((20, 30), 60), masks=True)  # without the crowd; the mask's box
    assert target["boxes"].tolist() == [[0, 0, 2, 40]] and target["labels"].tolist() == [1]
    assert target["masks"].shape == (1, 60, 60) and target["masks"].sum() == 80


def test_unusable_coco_files_are_refused(coco_set: Path) -> None:
    file = coco_set / "annotations" / "instances_few.json"
    valid = json.loads(file.read_text())

    def fails(match: str, **changes: Any) -> None:
        file.write_text(json.dumps({k: v for k, v in (valid | changes).items() if v is not None}))
        with pytest.raises(UserError, match=match):
            open_detection(str(file), "", RGB)

    fails("lacks 'annotations'", annotations=None)
    fails("number 0 of its images lacks 'height'", images=[{"id": 7, "file_name": "7.png"}])
    image = valid["images"][0]
    fails("two images have the id 7: 7.png and 3.png", images=[image, image | {"file_name": "3.png"}])
    fails("two categories have the id 2: 'a' and 'b'", categories=[{"id": 2, "name": name} for name in "ab"])
    gone = [image, *({"id": i, "file_name": f"{i}.jpg", "height": 20, "width": 30} for i in (3, 5))]
    fails(r"2 of the 3 images .* are not in .*few, such as 3.jpg: .* --train-images FOLDER", images=gone)
    fails("lists no images", images=[], annotations=[])
    file.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        open_detection(str(file), "", RGB)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        open_detection(str(coco_set / "none.json"), "", RGB)
    file.write_text(json.dumps(valid))
    with pytest.raises(UserError, match=r"nowhere.*--test-images"):
        open_detection(str(file), str(coco_set / "nowhere"), RGB, "--test-images")
    Image.new("RGB", (20, 30)).save(coco_set / "few" / "3.png")
    data = open_detection(str(file), str(coco_set / "few"), RGB)
    with pytest.raises(BadImage, match="30x20 differs from its annotations: 20x30"):
        data.read(1)
    (coco_set / "few" / "3.png").unlink()
    with pytest.raises(BadImage, match="No such file"):
        data.read(1)


SPUR = [2, 2, 12, 2, 7, 2]
RUNS = {"size": [20, 30], "counts": [0, 20, 580]}


@pytest.mark.parametrize(
    ("changes", "problem", "masked"),
    [
        ({"image_id": 9}, "1 annotations have no image_id that the file lists: left out", None),
        ({"image_id": [7]}, "annotations have no image_id that the file lists", None),
        ({"category_id": 4}, "1 annotations have no category_id that the file lists: left out", None),
        ({"category_id": None}, "annotations have no category_id", None),
        ({"bbox": [1, 2, 3]}, "1 annotations have a bbox that is not four numbers: left out", None),
        ({"bbox": [1, 2, math.nan, 3]}, "bbox that is not four numbers", None),
        ({"bbox": [40, 1, 5, 5]}, "1 boxes are outside their image: left out", None),
        ({"bbox": [4, 4, -2, 5]}, "1 boxes are empty: left out", None),
        ({"bbox": [-5, 4, 15, 40]}, "1 boxes extend beyond their image: clipped", True),
        ({"area": "large"}, "1 areas are not numbers from 0: the area of the box is used", True),
        ({"id": 1}, "1 annotations have the id of another one: all are used", True),
        ({"bbox": [2, 2, 10, 10]}, "1 objects are listed twice: the second is left out", None),
        ({"segmentation": None}, "", False),
        ({"segmentation": []}, "", False),
        ({"segmentation": "x"}, "1 masks are neither polygons nor a run-length code: no mask", False),
        ({"segmentation": [[2, 2, 12, 12]]}, "1 masks have a polygon with fewer than three corners", False),
        ({"segmentation": [SPUR]}, "1 masks have a polygon without an area: no mask", False),
        ({"segmentation": [[1, 1, 9, 1, 9, 9], SPUR]}, "without an area: a part is ignored", True),
        ({"segmentation": [[2, 2, "x", 2, 7, 9]]}, "1 masks have a polygon that is not numbers: no mask", False),
        ({"segmentation": [[2, 2, 1e6, 2, 7, 9]]}, "that extends beyond 10 times its image: no mask", False),
        ({"segmentation": {"size": [4, 4], "counts": [16]}}, "1 masks and images differ in size", False),
        ({"segmentation": {"size": [20, 30], "counts": [600]}}, "1 masks have no pixel: no mask", False),
        ({"segmentation": {"size": [20, 30], "counts": [3, 4]}}, "counts that do not add up to their pixels", False),
        ({"segmentation": {"size": [20, 30]}}, "1 masks have no readable counts: no mask", False),
        ({"segmentation": {"size": [20, 30], "counts": "oh no"}}, "masks have", False),
        ({"segmentation": RUNS}, "", True),
    ],
)
def test_one_invalid_annotation_is_counted(
    changes: dict[str, Any], problem: str, masked: bool | None, coco_set: Path
) -> None:
    """The problem names the annotation. `masked`: the object keeps its mask; None: it is left out."""
    file = coco_set / "annotations" / "instances_few.json"
    good, odd = annotation(), {**annotation(), "id": 17, "bbox": [3, 3, 9, 9], **changes}
    more = [annotation(id=i, image_id=3, bbox=[i, 2, 10, 10]) for i in (2, 3)]
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"annotations": [good, *more, odd]}))
    data = open_detection(str(file), "", RGB)
    assert problem in data.problems and len(data.problems.splitlines()) == bool(problem)
    assert not problem or f"(the first is annotation {odd['id']})" in data.problems
    assert sum(data.counts) == 3 + (masked is not None)
    assert data.unmasked == ["annotation 17"] * (masked is False)
    masks = data.objects(0).masks
    assert [mask is None for mask in masks] == [False, *[not masked] * (masked is not None)]
    for mask in masks:
        assert mask is None or decode_mask(mask, (20, 30)).any()
    file.write_text(json.dumps(content | {"annotations": [good, *[odd | {"id": i} for i in (17, 18)]]}))
    if re.search("annotations have (a|no) |masks have", problem):
        with pytest.raises(
            UserError, match=f"more than a quarter of its 3 annotations are broken:\n2 .*{problem[2:40]}"
        ):
            open_detection(str(file), "", RGB)


def test_masks_are_learned_if_most_objects_have_one(coco_set: Path) -> None:
    file = coco_set / "annotations" / "instances_few.json"
    content = json.loads(file.read_text())
    odd = annotation(id=5, bbox=[3, 3, 9, 9], segmentation=None)
    most = [annotation(id=2), annotation(id=3, image_id=3), odd]
    few = [annotation(id=2), odd, odd | {"id": 6, "image_id": 3}]
    for annotations, masks, expected, words in (
        (most, "auto", True, "1 of the 3 objects .* usable mask .*annotation 5.*: these are treated as crowds"),
        (few, "auto", False, "2 of the 3 objects .* usable mask .*annotation 5.*: --masks yes learns the masks of"),
        (few, "yes", True, "these are treated as crowds"),
        (few, "no", False, "boxes only"),
        ([odd], "auto", False, "1 of the 1 objects .* usable mask"),
    ):
        file.write_text(json.dumps(content | {"annotations": annotations}))
        data = open_detection(str(file), "", RGB)
        console = Console(file=io.StringIO(), width=500)
        settings = DetectionSettings(masks=masks)  # type: ignore[arg-type]
        assert _choose_masks(settings, data, data, console) == expected
        assert re.search(words, console.file.getvalue())  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="--masks yes, but no object of"):
        _choose_masks(DetectionSettings(masks="yes"), data, data, console)
    file.write_text(json.dumps(content | {"annotations": most}))
    data = _unmasked_as_crowds(open_detection(str(file), "", RGB))
    assert data.objects(0).crowd.tolist() == [False, True]
    assert len(make_target(data.objects(0), fit_to_square((20, 30), 60), masks=True)["masks"]) == 1


def test_summary_of_classes_and_problems(coco_set: Path) -> None:
    file = coco_set / "annotations" / "instances_few.json"
    data, console = open_detection(str(file), "", RGB), Console(file=io.StringIO(), width=500)
    _print_summary(data, replace(data, counts=[1, 0]), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "train data: 2 objects in 3 images of 2 classes: bicycle 50.0 %, tooth 50.0 %" in text
    assert "  1 boxes are outside their image: left out" in text and "  1 boxes are empty: left out" in text
    assert "warning: all 3 test images" in text
    _print_summary(replace(data, counts=[0, 1]), data, console)
    assert "warning: 1 test classes have no train object, and will have an AP of 0: bicycle" in console.file.getvalue()  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"the test data .* has no object"):
        _print_summary(data, replace(data, counts=[0, 0]), console)


@pytest.mark.parametrize("numbers", [(0.0, 0.5, 0.5), (0.4, 0.1, 0.9), (0.99, 0.7, 0.2)])
@pytest.mark.parametrize("flip", [False, True])
def test_crops_keep_image_boxes_and_masks_together(numbers: tuple[float, ...], flip: bool) -> None:
    """Compare box, polygon and bitmap of a bright object with its pixels in the crop."""
    inside = mask_of(np.asarray([11, 5, 31, 17]))[:30]
    image = torch.from_numpy(np.where(inside, 200, 0).astype(np.uint8))[None].expand(3, -1, -1)
    polygon = [[11, 5, 31, 5, 31, 17, 11, 17]]
    crop = jitter((30, SIDE), 64, (0.5, 2.0), numbers, flip)
    seen = crop.crop_image(image, (0, 0, 0))[0].numpy() > 100
    if seen.any():
        box = crop.crop_boxes(np.asarray([[11, 5, 31, 17]], np.float32))[0]
        assert np.abs(np.asarray(bounding_box(seen)) - box).max() <= 1
    for mask in (crop.crop_mask(polygon), crop.crop_mask(inside), crop.crop_mask(encode_mask(inside))):
        edge = np.logical_xor(mask, seen).sum()
        assert edge <= 0.12 * max(seen.sum(), 200)
    assert crop.covered[0] <= 64 and seen.shape == (64, 64)


def test_padding_has_the_mean() -> None:
    crop = jitter((30, 40), 64, (0.5, 0.5), (0.3, 0.9, 0.9), False)
    assert crop.resized == (24, 32) and crop.corner == (0, 0) and crop.covered == (24, 32)
    seen = crop.crop_image(torch.zeros(3, 30, 40, dtype=torch.uint8), (0.5, 0.2, 0.1))
    assert seen[:, 30, 40].tolist() == [128, 51, 26] and seen[:, :24, :32].sum() == 0
    deep = crop.crop_image(torch.zeros(2, 30, 40), (0.5, 0.2))
    assert deep[:, 30, 40].tolist() == pytest.approx([0.5, 0.2])
