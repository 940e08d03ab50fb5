"""What was found in an image, drawn over it: masks, boxes, names and scores; what is there in white."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pixmim.evaluation.detection.coco_metrics import Found
from pixmim.evaluation.detection.dataset import Objects
from pixmim.evaluation.detection.masks import bitmap
from pixmim.evaluation.visualize import Picture
from pixmim.utils.console import label

COLOURS = ((230, 60, 50), (40, 120, 230), (30, 160, 70), (240, 150, 20), (150, 70, 200), (20, 170, 180), (220, 60, 150))

_LONGER = 320  # pixels of a picture's longer edge
_SURE = 0.5  # scores from which on an object is drawn


def draw(image: Picture, truth: Objects, found: Found, classes: Sequence[str]) -> Image.Image:
    """A picture (h w 3) with what was found in the colours of the classes, over what is there, in white.

    Objects of a score from 0.5 are drawn. The image is brought to 320 pixels along its longer edge before lines and
    letters are.
    """
    pixels = image.astype(np.float64)
    shown = [i for i in range(len(found.boxes)) if found.scores[i] >= _SURE]
    tint = pixels.copy()
    for i in reversed(shown) if found.masks else ():  # the surest on top
        tint[bitmap(found.masks[i], (pixels.shape[0], pixels.shape[1]))] = _colour(int(found.labels[i]))
    pixels = (pixels + tint) / 2
    scale = _LONGER / max(pixels.shape[:2])
    picture = Image.fromarray(pixels.astype(np.uint8)).resize(
        (round(pixels.shape[1] * scale), round(pixels.shape[0] * scale)), Image.Resampling.BILINEAR
    )
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for box in truth.boxes * scale:
        canvas.rectangle(box.tolist(), outline="white", width=1)
    for i in reversed(shown):
        box, colour = (found.boxes[i] * scale).tolist(), _colour(int(found.labels[i]))
        canvas.rectangle(box, outline=colour, width=3)
        text = f"{label(classes[int(found.labels[i])])} {found.scores[i]:.2f}"
        left, top, right, bottom = canvas.textbbox((0, 0), text, font)
        x = min(max(box[0], 0), max(picture.width - (right - left) - 6, 0))
        y = min(max(box[1], 0), picture.height - (bottom - top) - 6)
        canvas.rectangle((x, y, x + right - left + 6, y + bottom - top + 6), fill=colour)
        canvas.text((x + 3 - left, y + 3 - top), text, "white", font)
    return picture


def sheet(pictures: Sequence[Image.Image], columns: int = 4, gap: int = 6) -> Image.Image:
    """Pictures in rows on white, each row as high as its highest."""
    rows = [pictures[i : i + columns] for i in range(0, len(pictures), columns)]
    width = max(sum(picture.width + gap for picture in row) for row in rows) - gap
    heights = [max(picture.height for picture in row) for row in rows]
    page = Image.new("RGB", (width, sum(heights) + gap * (len(rows) - 1)), "white")
    y = 0
    for row, height in zip(rows, heights, strict=True):
        x = 0
        for picture in row:
            page.paste(picture, (x, y))
            x += picture.width + gap
        y += height + gap
    return page


def _colour(label: int) -> tuple[int, int, int]:
    return COLOURS[label % len(COLOURS)]
