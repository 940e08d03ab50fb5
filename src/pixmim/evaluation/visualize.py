"""Draw images, masks and boxes for evaluations and reports."""

import colorsys
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Integer, Shaped
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from pixmim.config import ModelConfig
from pixmim.utils.console import label
from pixmim.utils.plotting import matplotlib

Pixels = npt.NDArray[np.uint8]  # an image (h w c), or several of one size (n h w c)

_DARK = 1 / 8  # of white: an image whose brightest percent is darker has 10 or 12 bits stored in 16
_FLAT = 1e-3  # range relative to the values, below which an image has no contrast
_MIN_SCORE = 0.5  # of detections that are drawn
_LONG_EDGE = 320  # pixels of an image with boxes
_ROW_HEIGHT = 160  # pixels of an image with masks
_MAX_LEGEND = 24  # classes
_TEXT_HEIGHT = 18  # pixels of a title or a caption


def to_pixels(images: Mapping[str, Float[Tensor, "b c h w"]], config: ModelConfig) -> dict[str, Pixels]:
    """Convert unnormalized images to uint8 (b h w 3) or (b h w 1), all columns of a row over the same range.

    8-bit color and gray keep their range 0 to 255, except in images that are almost black. Everything else is stretched
    from the 1st to the 99th percentile of "image" and "target", over all channels if there are three, otherwise per
    channel, because each may have its own unit. Values without contrast become gray. The channels are those of
    `config.drawn`.
    """
    channels = list(config.drawn)
    selected = {name: values[:, channels].float() for name, values in images.items()}
    known = torch.cat([selected[name] for name in ("image", "target") if name in selected], dim=2)
    values = known.flatten(1)[:, None] if config.channels == 3 else known.flatten(2)
    # numpy, because torch.quantile refuses large images.
    ends = torch.from_numpy(np.percentile(values.numpy(), (1, 99), axis=2).astype(np.float32))
    low, high = ends[..., None, None]
    if config.dtype == "uint8" and config.channels in (1, 3):
        full_range = high.amax(dim=1, keepdim=True) >= _DARK
        low, high = torch.where(full_range, 0.0, low), torch.where(full_range, 1.0, high)
    span, flat = high - low, _FLAT * torch.maximum(low.abs(), high.abs())
    result = {}
    for name, values in selected.items():
        share = torch.where(span > flat, (values - low) / span.clamp(min=1e-30), 0.5)
        result[name] = np.asarray((share.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1))
    return result


def to_rgb(image: Shaped[Tensor, "c h w"], config: ModelConfig) -> Pixels:
    """Convert an image as a dataset returns it to uint8 RGB (h w 3), as `to_pixels` does."""
    scale = 1.0 if image.is_floating_point() else float(torch.iinfo(image.dtype).max)
    pixels = to_pixels({"image": image.float()[None] / scale}, config)["image"][0]
    return pixels.repeat(3, axis=2) if pixels.shape[2] == 1 else pixels


def hatch(h: int, w: int) -> Pixels:
    """Return the pattern for hidden patches (h w 1): gray with lighter diagonals, unlike any image."""
    rows, columns = np.indices((h, w))
    return np.where((rows + columns) % 4 == 0, 160, 120).astype(np.uint8)[..., None]


def class_colors(count: int) -> Pixels:
    """Return one color per class (count 3): hues by the golden ratio, in three tones."""
    tones = (0.85, 0.95), (0.55, 0.95), (0.9, 0.6)
    colors = [colorsys.hsv_to_rgb((0.6 + 0.618034 * i) % 1, *tones[i % 3]) for i in range(count)]
    return (np.asarray(colors) * 255).astype(np.uint8)


def overlay_mask(pixels: Pixels, mask: Integer[np.ndarray, "h w"], colors: Pixels) -> Pixels:
    """Paint the class of each pixel over a gray version of an image; pixels without a class keep their color."""
    gray = np.broadcast_to(pixels.mean(axis=2, keepdims=True), pixels.shape)
    known = mask < len(colors)
    painted = 0.45 * gray + 0.55 * colors[np.where(known, mask, 0)]
    return np.where(known[..., None], painted, pixels).astype(np.uint8)


def draw_segmentations(
    rows: Sequence[tuple[Pixels, Integer[np.ndarray, "h w"], Integer[np.ndarray, "h w"]]], classes: Sequence[str]
) -> Image.Image:
    """Draw a row (image, truth, prediction) per image, and a legend of the classes that occur."""
    colors = class_colors(len(classes))
    cells = [[pixels, *(overlay_mask(pixels, mask, colors) for mask in masks)] for pixels, *masks in rows]
    grid = image_grid([[_at_height(part) for part in row] for row in cells], ("image", "truth", "prediction"))
    counts = np.zeros(256, np.int64)
    for _, *masks in rows:
        for mask in masks:
            counts += np.bincount(mask.ravel(), minlength=256)[:256]
    used = [i for i in np.argsort(-counts[: len(classes)], kind="stable").tolist() if counts[i]]
    entries = [(classes[i], tuple(colors[i].tolist())) for i in used[:_MAX_LEGEND]]
    return image_grid([[grid], [_legend(entries, grid.width)]]) if entries else grid


def draw_detections(
    pixels: Pixels,
    truth: Float[np.ndarray, "k 4"],
    boxes: Float[np.ndarray, "n 4"],
    labels: Integer[np.ndarray, " n"],
    scores: Float[np.ndarray, " n"],
    masks: Sequence[Bool[np.ndarray, "h w"]],
    classes: Sequence[str],
) -> Image.Image:
    """Draw detections with a score of at least 0.5 in the colors of their classes, over the true boxes in white.

    The longer edge gets 320 pixels before lines and text are drawn.
    """
    colors = class_colors(len(classes))
    shown = np.flatnonzero(scores >= _MIN_SCORE)[::-1].tolist()  # the most certain on top
    tint = pixels.astype(np.float64)
    for i in shown if masks else ():
        tint[masks[i]] = colors[labels[i]]
    h, w = pixels.shape[:2]
    scale = _LONG_EDGE / max(h, w)
    image = Image.fromarray(((pixels + tint) / 2).astype(np.uint8))
    image = image.resize((max(1, round(w * scale)), max(1, round(h * scale))), Image.Resampling.BILINEAR)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for box in truth * scale:
        pen.rectangle(box.tolist(), outline="white", width=1)
    for i in shown:
        box, color = (boxes[i] * scale).tolist(), tuple(colors[labels[i]].tolist())
        pen.rectangle(box, outline=color, width=3)
        text = f"{label(classes[int(labels[i])])} {scores[i]:.2f}"
        left, top, right, bottom = pen.textbbox((0, 0), text, font)
        x = min(max(box[0], 0), max(image.width - (right - left) - 6, 0))
        y = min(max(box[1], 0), image.height - (bottom - top) - 6)
        pen.rectangle((x, y, x + right - left + 6, y + bottom - top + 6), fill=color)
        pen.text((x + 3 - left, y + 3 - top), text, "black" if sum(color) > 400 else "white", font)
    return image


def labeled_grid(columns: Mapping[str, Pixels], names: Sequence[str], min_side: int = 112) -> Image.Image:
    """Draw one row per image and one titled column per kind, with the name of the image below its row.

    Small images are enlarged by an integer factor to a shorter side of about `min_side` pixels.
    """
    factor = max(1, round(min_side / min(next(iter(columns.values())).shape[1:3])))
    enlarged = [pixels.repeat(factor, 1).repeat(factor, 2) for pixels in columns.values()]
    rows = [[to_image(pixels[i]) for pixels in enlarged] for i in range(len(names))]
    return image_grid(rows, list(columns), names, gap=4)


def image_grid(
    rows: Sequence[Sequence[Image.Image]], titles: Sequence[str] = (), captions: Sequence[str] = (), gap: int = 6
) -> Image.Image:
    """Paste images in rows and columns on white, with a title above each column and a caption below each row."""
    top, below = (_TEXT_HEIGHT if text else 0 for text in (titles, captions))
    widths = [max(row[i].width for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    heights = [max(image.height for image in row) + below for row in rows]
    size = sum(widths) + gap * (len(widths) - 1), top + sum(heights) + gap * (len(heights) - 1)
    page = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    xs, ys = (np.cumsum([0, *(side + gap for side in sides)]).tolist() for sides in (widths, heights))
    for x, title in zip(xs, titles, strict=False):
        pen.text((x + 2, 3), title, fill="black", font=font)
    for i, row in enumerate(rows):
        for x, image in zip(xs, row, strict=False):
            page.paste(image, (x, top + ys[i]))
        if captions:
            text = label(captions[i], max(12, page.width // 7))
            pen.text((2, top + ys[i] + heights[i] - below), text, fill="#666", font=font)
    return page


def heat_overlay(pixels: Pixels, maps: Float[Tensor, "b h w"]) -> Pixels:
    """Blend images (b h w 3) with a map each, as heat over its own range."""
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    heat = matplotlib.colormaps["inferno"](((maps - low) / (high - low).clamp(min=1e-12)).numpy())[..., :3]
    return np.asarray((0.35 * pixels + 0.65 * 255 * heat).round(), np.uint8)


def to_image(pixels: Pixels) -> Image.Image:
    """Return a PIL image of (h w 3) or (h w 1) pixels."""
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def _at_height(pixels: Pixels) -> Image.Image:
    """Scale an image to the height of a row, at most three times as wide."""
    h, w = pixels.shape[:2]
    size = min(3 * _ROW_HEIGHT, max(1, round(w * _ROW_HEIGHT / h))), _ROW_HEIGHT
    resample = Image.Resampling.NEAREST if h < _ROW_HEIGHT else Image.Resampling.BOX
    return Image.fromarray(pixels).resize(size, resample)


def _legend(entries: Sequence[tuple[str, tuple[int, ...]]], width: int) -> Image.Image:
    """Draw the names of colors in as many columns as fit into `width` pixels."""
    font, line = ImageFont.load_default(12), 20
    texts = [label(name) for name, _ in entries]
    cell = max(int(font.getlength(text)) for text in texts) + 30
    columns = max(1, width // cell)
    image = Image.new("RGB", (max(width, cell), -(-len(entries) // columns) * line), "white")
    pen = ImageDraw.Draw(image)
    for i, (text, (_, color)) in enumerate(zip(texts, entries, strict=True)):
        x, y = i % columns * cell, i // columns * line
        pen.rectangle((x + 2, y + 3, x + 16, y + 15), fill=color)
        pen.text((x + 22, y + 1), text, fill="black", font=font)
    return image
