"""Object detection: fine-tune the encoder in Faster or Mask R-CNN as ViTDet does, and measure average precision."""

from dataclasses import replace
from itertools import compress
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.roi_heads import paste_masks_in_image

from pixmim.evaluation.classification import alike_classes, class_indices, shares, shortened_list, warn_shared
from pixmim.evaluation.context import EvalContext, Values, checked_once, discard
from pixmim.evaluation.detection.coco_metrics import CocoMetrics, Detections
from pixmim.evaluation.detection.dataset import (
    DetectionDataset,
    Objects,
    box_polygon,
    decode_mask,
    encode_mask,
    load_evaluator,
    open_detection,
)
from pixmim.evaluation.detection.detector import build_detector, detect, train_detector
from pixmim.evaluation.detection.loader import SquareCrop, fit_to_square
from pixmim.evaluation.settings import DetectionSettings
from pixmim.evaluation.visualize import draw_detections, image_grid, to_rgb
from pixmim.transforms.crops import flip_and_normalize
from pixmim.utils.console import print_plain, progress
from pixmim.utils.errors import UserError

Checked = tuple[DetectionDataset, DetectionDataset, bool]


@checked_once
def check_detection(context: EvalContext, settings: DetectionSettings) -> Checked:
    """Return train and test data, and whether masks are learned; also build the detector once. Raises UserError."""
    load_evaluator()
    files, encoder, console = _annotation_files(settings), context.encoder, context.console
    train = open_detection(files[0], settings.train_images, encoder.image_spec, "--train-images")
    test = open_detection(files[1], settings.test_images, encoder.image_spec, "--test-images")
    test = _match_classes(train, test)
    _print_summary(train, test, console)
    masks = _choose_masks(settings, train, test, console)
    build_detector(encoder, settings, len(train.classes), masks)
    return (_unmasked_as_crowds(train), _unmasked_as_crowds(test), masks) if masks else (train, test, masks)


def evaluate_detection(context: EvalContext, settings: DetectionSettings) -> Values:
    """Fine-tune a detector and yield `CocoMetrics.compute` of the test data. Resumes. Raises UserError."""
    train, test, masks = check_detection(context, settings)
    model = train_detector(context, settings, train, masks).eval()
    yield from _measure(context, settings, test, model, masks)
    discard(context.work_dir("detection", settings, train.truth))


def _measure(
    context: EvalContext, settings: DetectionSettings, test: DetectionDataset, model: FasterRCNN, masks: bool
) -> Values:
    encoder, metrics = context.encoder, CocoMetrics(test.classes, masks)
    drawings: list[Image.Image] = []
    skipped = context.skipped(test.images)
    with progress(f"objects of {test.images.spec}", len(test.images), context.console) as advance:
        for index in range(len(test.images)):
            with skipped.attempt(test.images, index):
                image, objects = test.read(index), test.objects(index)
                size = int(image.shape[-2]), int(image.shape[-1])
                if masks:
                    objects = replace(objects, masks=[decode_mask(mask, size) for mask in objects.masks])
            if index in skipped:
                continue
            crop = fit_to_square(size, settings.size)
            square = crop.crop_image(image, encoder.mean.tolist())[None].to(encoder.device)
            (output,) = detect(model, flip_and_normalize(square, None, encoder.mean, encoder.std))
            detections = _to_image_pixels(output, crop)
            metrics.update(size, objects, detections)
            if len(drawings) < settings.pictures:
                pixels, decoded = to_rgb(image, encoder.config), [decode_mask(mask, size) for mask in detections.masks]
                boxes, labels, scores = detections.boxes, detections.labels, detections.scores
                drawings.append(draw_detections(pixels, objects.boxes, boxes, labels, scores, decoded, test.classes))
            advance(index + 1)
    if drawings:
        caption = "Detection: predictions with scores from 0.5 in color, true boxes in white"
        context.images[caption] = image_grid([drawings[i : i + 4] for i in range(0, len(drawings), 4)])
    yield from metrics.compute()


def _to_image_pixels(output: dict[str, Tensor], crop: SquareCrop) -> Detections:
    """Convert a detector's output for a crop to pixels of the image."""
    down, across = crop.scale
    h, w = crop.image
    boxes = output["boxes"] / output["boxes"].new_tensor([across, down, across, down])
    boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([w, h, w, h]))
    masks = []
    if "masks" in output:
        for mask, box in zip(output["masks"], boxes, strict=True):  # one by one: each is as large as the image
            pasted = paste_masks_in_image(mask[None], box[None], (h, w))[0, 0].cpu().numpy() >= 0.5
            masks.append(encode_mask(pasted))
    return Detections(boxes.cpu().numpy(), output["labels"].cpu().numpy() - 1, output["scores"].cpu().numpy(), masks)


def _annotation_files(settings: DetectionSettings) -> tuple[str, str]:
    """Return the annotations of the train and test data. Raises UserError."""
    if settings.data and (settings.train or settings.test):
        raise UserError("--data names both parts: leave out --train and --test")
    if settings.data:
        folder = Path(settings.data).expanduser()
        lists = folder / "ImageSets" / "Main"
        if lists.is_dir():
            return str(lists / "train.txt"), str(lists / ("test.txt" if (lists / "test.txt").is_file() else "val.txt"))
        if (yaml := folder / "data.yaml").is_file():
            return str(yaml), str(yaml)
        folder /= "annotations"
        return str(folder / "instances_train2017.json"), str(folder / "instances_val2017.json")
    if not (settings.train and settings.test):
        raise UserError(
            "no data given: add --data COCO, or --train and --test (boxes of COCO, VOC or YOLO, or shapes:)"
        )
    return settings.train, settings.test


def _match_classes(train: DetectionDataset, test: DetectionDataset) -> DetectionDataset:
    """Return the test data with the class indices of the train data, without crowds of other classes.

    Raises UserError for an object of an unknown class.
    """
    used = np.flatnonzero(test.counts)
    number = class_indices(test.classes, train.classes, "the test data", used).numpy()

    def objects(index: int) -> Objects:
        group = test.objects(index)
        labels = number[group.labels]
        known = labels >= 0
        masks = list(compress(group.masks, known))
        return Objects(group.boxes[known], labels[known], group.crowd[known], group.areas[known], masks)

    counts = np.zeros(len(train.classes), np.int64)
    counts[number[used]] = np.asarray(test.counts)[used]
    return replace(test, objects=objects, classes=train.classes, counts=counts.tolist())


def _print_summary(train: DetectionDataset, test: DetectionDataset, console: Console | None) -> None:
    """Print the classes and problems of the data. Raises UserError if either part has no object."""
    for split, data in (("train", train), ("test", test)):
        total = sum(data.counts)
        classes = shares(data.classes, data.counts)
        print_plain(console, f"{split} data: {total:,} objects in {len(data.images):,} images of {classes}")
        for line in alike_classes(data.classes) if split == "train" else []:
            print_plain(console, line)
        for line in data.problems.splitlines():
            print_plain(console, f"  {line}")
        if not total:
            raise UserError(f"the {split} data {data.images.spec} has no object (crowds do not count)")
    unseen = [name for name, a, b in zip(train.classes, train.counts, test.counts, strict=True) if b and not a]
    if unseen:
        effect = "have no train object, and will have an AP of 0"
        print_plain(console, f"warning: {len(unseen)} test classes {effect}: {shortened_list(unseen)}")
    warn_shared(train.images, test.images, console)


def _choose_masks(
    settings: DetectionSettings, train: DetectionDataset, test: DetectionDataset, console: Console | None
) -> bool:
    """Decide whether masks are learned, and print what happens to objects without one. Raises UserError."""
    splits = train, test
    maskless = [data for data in splits if len(data.unmasked) == sum(data.counts)]
    if settings.masks == "yes" and maskless:
        raise UserError(f"--masks yes, but no object of {maskless[0].images.spec} has a usable mask")
    most = all(2 * len(data.unmasked) < sum(data.counts) for data in splits)
    masks = settings.masks == "yes" or (settings.masks == "auto" and most)
    print_plain(console, "learns boxes and masks (Mask R-CNN)" if masks else "learns boxes only (Faster R-CNN)")
    effect = ""
    if masks:
        effect = ": these are treated as crowds, neither learned nor measured; --masks no uses all boxes"
    elif not maskless:
        effect = ": --masks yes learns the masks of the others"
    for data in splits if settings.masks != "no" else ():
        if data.unmasked:
            count = f"{len(data.unmasked):,} of the {sum(data.counts):,} objects of {data.images.spec}"
            print_plain(console, f"warning: {count} have no usable mask (the first is {data.unmasked[0]}){effect}")
    return masks


def _unmasked_as_crowds(data: DetectionDataset) -> DetectionDataset:
    """Return the data with objects without a mask turned into crowds."""

    def objects(index: int) -> Objects:
        group = data.objects(index)
        unmasked = np.asarray([mask is None for mask in group.masks], bool)
        pairs = zip(group.masks, group.boxes.tolist(), strict=True)
        masks = [box_polygon(box) if mask is None else mask for mask, box in pairs]
        return replace(group, crowd=group.crowd | unmasked, masks=masks)

    return replace(data, objects=objects)
