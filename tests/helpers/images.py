"""Small images in every format."""

import io

import numpy as np
from PIL import Image

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
SMOOTH = np.linspace(0, 255, 20 * 30, dtype=np.uint8).reshape(20, 30)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


JPEG, PNG = encoded(Image.fromarray(PIXELS), "JPEG"), encoded(Image.fromarray(PIXELS), "PNG")
