"""Small images in every format."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
SMOOTH = np.linspace(0, 255, 20 * 30, dtype=np.uint8).reshape(20, 30)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_pictures(root: Path) -> Path:
    """Write two classes with five JPEGs each, of several sizes, and return their folder."""
    generator = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (root / name).mkdir(parents=True)
        for i in range(5):
            pixels = generator.integers(0, 255, (40 + i, 56 - i, 3), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.jpg", quality=90)
    return root


JPEG, PNG = encoded(Image.fromarray(PIXELS), "JPEG"), encoded(Image.fromarray(PIXELS), "PNG")
