"""Pictures beside what is true of them and what was predicted, with a legend of the colours."""

import colorsys

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from pixmim.utils.console import label

Pixels = npt.NDArray[np.uint8]

_HEIGHT, _GAP, _STRIP, _LINE = 160, 6, 20, 20
_LEGEND = 24  # classes named at most, the largest first


def colours(count: int) -> Pixels:
    """A colour for each class (count 3): hues a golden section of the circle apart from blue on, in three tones."""
    tones = (0.85, 0.95), (0.55, 0.95), (0.9, 0.6)
    found = [colorsys.hsv_to_rgb((0.6 + 0.618034 * i) % 1, *tones[i % 3]) for i in range(count)]
    return (np.asarray(found) * 255).astype(np.uint8)


def overlay(picture: Pixels, mask: npt.NDArray[np.integer], palette: Pixels) -> Pixels:
    """A picture (h w 3) in grey under the colours of its classes (h w); what no class has stays as it is."""
    grey = np.broadcast_to(picture.mean(axis=2, keepdims=True), picture.shape)
    known = mask < len(palette)
    painted = 0.45 * grey + 0.55 * palette[np.where(known, mask, 0)]
    return np.where(known[..., None], painted, picture).astype(np.uint8)


def sheet(rows: list[tuple[Pixels, npt.NDArray[np.integer], npt.NDArray[np.integer]]], names: list[str]) -> Image.Image:
    """A row for each (picture, truth, prediction), under titles, and below them the names of the colours seen."""
    palette, font = colours(len(names)), ImageFont.load_default(12)
    drawn = [[_scaled(part) for part in (p, overlay(p, t, palette), overlay(p, q, palette))] for p, t, q in rows]
    counts = sum(np.bincount(m.ravel(), minlength=256)[: len(names)] for _, t, q in rows for m in (t, q))
    seen = [int(i) for i in np.argsort(-np.asarray(counts), kind="stable") if np.asarray(counts)[i]][:_LEGEND]
    width = max(part.width for row in drawn for part in row) + _GAP
    labels = {i: label(names[i]) for i in seen}
    cell = max((int(font.getlength(text)) for text in labels.values()), default=0) + 30
    across = max(1, 3 * width // cell)
    top = _STRIP + len(drawn) * (_HEIGHT + _GAP)
    paper = Image.new("RGB", (max(3 * width, cell), top + -(-len(seen) // across) * _LINE + _GAP), "white")
    pen = ImageDraw.Draw(paper)
    for j, title in enumerate(("image", "truth", "prediction")):
        pen.text((j * width + 2, 2), title, fill="black", font=font)
        for i, row in enumerate(drawn):
            paper.paste(row[j], (j * width, _STRIP + i * (_HEIGHT + _GAP)))
    for place, i in enumerate(seen):
        x, y = place % across * cell, top + place // across * _LINE
        pen.rectangle((x + 2, y + 3, x + 16, y + 15), fill=tuple(palette[i].tolist()))
        pen.text((x + 22, y + 1), labels[i], fill="black", font=font)
    return paper


def _scaled(picture: Pixels) -> Image.Image:
    """A picture at the height of a row, and at most three times as wide."""
    h, w = picture.shape[:2]
    size = min(3 * _HEIGHT, max(1, round(w * _HEIGHT / h))), _HEIGHT
    return Image.fromarray(picture).resize(size, Image.Resampling.NEAREST if h < _HEIGHT else Image.Resampling.BOX)
