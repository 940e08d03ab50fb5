"""Detection: the encoder fine-tuned in Faster or Mask R-CNN as ViTDet is (arXiv 2203.16527), by average precision."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from torch import Tensor
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.roi_heads import paste_masks_in_image

from pixmim.data.dataset import BadImage
from pixmim.evaluation.classification import class_indices, shares, shortened_list, warn_shared
from pixmim.evaluation.context import EvalContext, Values, discard
from pixmim.evaluation.detection.coco_metrics import Found, Tally, pack
from pixmim.evaluation.detection.dataset import Annotated, Objects, open_annotated, rectangle
from pixmim.evaluation.detection.detector import detect
from pixmim.evaluation.detection.loader import fitted, picture, read
from pixmim.evaluation.detection.masks import View, bitmap, coco
from pixmim.evaluation.detection.train import build, trained
from pixmim.evaluation.settings import DetectionSettings
from pixmim.evaluation.visualize import draw_detections, image_grid, to_rgb
from pixmim.transforms.crops import flip_and_normalize
from pixmim.utils.console import print_plain, progress
from pixmim.utils.errors import UserError

_NAMES = ("train2017", "val2017")  # COCO's parts, to learn from and to be measured on


def check_detection(
    context: EvalContext, settings: DetectionSettings
) -> tuple[DetectionSettings, Annotated, Annotated, bool]:
    """Read all annotations and build the detector, once for a context; trains nothing.

    Returns:
        The settings with the files of COCO, train and test data, and whether masks are learned.

    Raises:
        UserError: For data or settings that do not suit.
    """

    def make() -> tuple[DetectionSettings, Annotated, Annotated, bool]:
        coco()
        found, encoder = _with_data(settings), context.encoder
        train = open_annotated(found.train, found.train_images, encoder.image_spec, "--train-images")
        test = _same_classes(train, open_annotated(found.test, found.test_images, encoder.image_spec, "--test-images"))
        console = context.console or Console(quiet=True)
        _tell(train, test, console)
        masks = _masks(found, train, test, console)
        build(encoder, found, len(train.classes), masks)
        if masks:
            train, test = _only_masked(train), _only_masked(test)
        return found, train, test, masks

    return context.cached(("detection", repr(settings)), make)


def evaluate_detection(context: EvalContext, settings: DetectionSettings) -> Values:
    """Fine-tune a detector and measure it: see `Tally.values`.

    Unfinished training is gone on with. Raises UserError.
    """
    settings, train, test, masks = check_detection(context, settings)
    model = trained(context, settings, train, masks)
    yield from _measured(context, settings, test, model, masks)
    discard(context.work_dir("detection", settings))


def _measured(
    context: EvalContext, settings: DetectionSettings, test: Annotated, model: FasterRCNN, masks: bool
) -> Values:
    encoder, tally = context.encoder, Tally(test.classes, masks)
    pictures: list[Image.Image] = []
    skipped = context.skipped(test.images)
    model.eval()
    with progress(f"objects of {test.images.spec}", len(test.images), context.console) as advance:
        for index in range(len(test.images)):
            try:
                image, there = read(test, index), test.objects(index)
                size = int(image.shape[-2]), int(image.shape[-1])
                if masks:
                    there = replace(there, masks=[bitmap(mask, size) for mask in there.masks])
            except BadImage as error:
                skipped.record(index, test.images.path_of(index), str(error))
                continue
            skipped.mark_ok(index)
            view = fitted(size, settings.size)
            shown = picture(image, view, encoder.mean.tolist())[None].to(encoder.device)
            (found,) = detect(model, flip_and_normalize(shown, None, encoder.mean, encoder.std))
            seen = _in_image(found, view)
            tally.add(size, there, seen)
            if len(pictures) < settings.pictures:
                drawn = [bitmap(mask, size) for mask in seen.masks]
                pixels = to_rgb(image, encoder.config)
                pictures.append(
                    draw_detections(pixels, there.boxes, seen.boxes, seen.labels, seen.scores, drawn, test.classes)
                )
            advance(index + 1)
    if pictures:
        caption = "detection: what was found, with scores from 0.5, and in white what is there"
        context.images[caption] = image_grid([pictures[i : i + 4] for i in range(0, len(pictures), 4)])
    yield from tally.values()


def _in_image(found: dict[str, Tensor], view: View) -> Found:
    """What was found in a view, in pixels of the image."""
    down, across = view.scale
    h, w = view.image
    boxes = found["boxes"] / found["boxes"].new_tensor([across, down, across, down])
    boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([w, h, w, h]))
    drawn = []
    if "masks" in found:
        for share, box in zip(found["masks"], boxes, strict=True):  # one by one: each is as large as the image
            drawn.append(paste_masks_in_image(share[None], box[None], (h, w))[0, 0].cpu().numpy() >= 0.5)
    return Found(boxes.cpu().numpy(), found["labels"].cpu().numpy() - 1, found["scores"].cpu().numpy(), pack(drawn))


def _tell(train: Annotated, test: Annotated, console: Console) -> None:
    """Print the classes of train and test data, and what is wrong with them. Raises UserError where nothing is left."""
    for what, data in (("train", train), ("test", test)):
        total, spec = sum(data.counts), data.images.spec
        found = f"{total:,} objects in {len(data.images):,} images of {shares(data.classes, data.counts)}"
        for line in [f"{what} data: {found}", *[f"  {line}" for line in data.about.splitlines()]]:
            print_plain(console, line)
        if not total:
            raise UserError(
                f"{spec} has no object to {'learn from' if what == 'train' else 'be found'} (crowds do not count)"
            )
    unknown = [name for name, a, b in zip(train.classes, train.counts, test.counts, strict=True) if b and not a]
    if unknown:
        print_plain(
            console,
            f"warning: {len(unknown)} test classes have no train object, and an AP of 0: {shortened_list(unknown)}",
        )
    warn_shared(train.images, test.images, console)


def _masks(settings: DetectionSettings, train: Annotated, test: Annotated, console: Console) -> bool:
    """Whether masks are learned, and what that means for objects without one, in lines. Raises UserError."""
    both = train, test
    lacking = [data for data in both if len(data.unmasked) == sum(data.counts)]
    if settings.masks == "yes" and lacking:
        raise UserError(f"--masks yes, but no object of {lacking[0].images.spec} has a mask that can be used")
    most = all(2 * len(data.unmasked) < sum(data.counts) for data in both)
    masks = settings.masks == "yes" or (settings.masks == "auto" and most)
    print_plain(console, "learns boxes and masks (Mask R-CNN)" if masks else "learns boxes only (Faster R-CNN)")
    for data in both if settings.masks != "no" else ():
        if data.unmasked:
            follows = (
                "these are treated as crowds, neither learned nor measured; --masks no takes all boxes"
                if masks
                else "--masks yes learns the masks of the others" * (not lacking)
            )
            print_plain(
                console,
                f"warning: {len(data.unmasked):,} of the {sum(data.counts):,} objects of {data.images.spec} have no "
                f"usable mask (the first is {data.unmasked[0]})" + f": {follows}" * bool(follows),
            )
    return masks


def _only_masked(data: Annotated) -> Annotated:
    """The data with objects without a mask as crowds."""

    def objects(index: int) -> Objects:
        found = data.objects(index)
        without = np.asarray([mask is None for mask in found.masks], bool)
        masks = [
            rectangle(box) if mask is None else mask
            for mask, box in zip(found.masks, found.boxes.tolist(), strict=True)
        ]
        return replace(found, crowd=found.crowd | without, masks=masks)

    return replace(data, objects=objects)


def _with_data(settings: DetectionSettings) -> DetectionSettings:
    """The settings with COCO's files in place of its folder. Raises UserError."""
    if not settings.data:
        if not (settings.train and settings.test):
            raise UserError("which images? Give --data COCO, or --train and --test: files in COCO's format, or shapes:")
        return settings
    if settings.train or settings.test:
        raise UserError("--data names both parts of COCO: leave out --train and --test")
    files = [Path(settings.data).expanduser() / "annotations" / f"instances_{name}.json" for name in _NAMES]
    return replace(settings, train=str(files[0]), test=str(files[1]))


def _same_classes(train: Annotated, test: Annotated) -> Annotated:
    """Return the test data with the class indices of the train data. Raises UserError for a class that those lack."""
    number = class_indices(test.classes, train.classes, "the test data").numpy()

    def objects(index: int) -> Objects:
        found = test.objects(index)
        return replace(found, labels=number[found.labels])

    counts = np.zeros(len(train.classes), np.int64)
    counts[number] = test.counts
    return replace(test, objects=objects, classes=train.classes, counts=counts.tolist())
