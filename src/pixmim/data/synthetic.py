"""Synthetic dataset: images of one shape each, drawn on the fly from (seed, index), endless and labeled.

Ten shapes, each filled with one of ten textures, before a background of another texture. Pose, scale, color, light and
aspect ratio vary. Shape and texture are independent, so an encoder's shape bias can be measured. Object and background
have similar colors and differ in texture, so only the outline identifies the shape.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from jaxtyping import Shaped

from pixmim.data.dataset import RGB, ImageDataset, ImageSpec
from pixmim.data.decode.channels import convert, stretch
from pixmim.data.uri import check_options, group_options
from pixmim.transforms.crops import Array
from pixmim.utils import rng
from pixmim.utils.errors import UserError
from pixmim.utils.validation import Choice, Integer

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "crescent", "heart", "arrow", "hourglass")
TEXTURES = ("plain", "stripes", "bars", "checks", "dots", "rings", "grain", "clouds", "waves", "mesh")

Grid = npt.NDArray[np.floating[Any]]
"""One value per pixel (h w)."""

_NUM_UNIFORMS = 40  # random numbers per sample; some are spare

_OPTIONS: dict[str, Integer | Choice] = {
    "count": Integer(1, 10**13),
    "seed": Integer(0, 10**13),
    "size": Integer(8, 4096),
    "texture": Choice(("any", "match", "conflict")),
}


@dataclass(frozen=True)
class Sample:
    """A drawn image with its annotations."""

    image: npt.NDArray[np.uint8]  # (h w 3)
    shape: int  # index into SHAPES
    texture: int  # of the object, index into TEXTURES
    mask: npt.NDArray[np.bool_]  # pixels of the object (h w)
    box: tuple[int, int, int, int]  # left, top, right and bottom of the mask in pixels, the last two exclusive


class SyntheticShapes(ImageDataset):
    """Dataset of drawn shapes, opened by `shapes:count=5000,seed=1,size=64,texture=conflict`.

    Args:
        count: Samples in one epoch. Any index can be drawn, also beyond it.
        seed: Seed of all images.
        size: Shorter side in pixels; the longer one is up to a third longer.
        texture: "any": independent of the shape; "match": the texture with the shape's index; "conflict": any other.
        image_spec: Channels and dtype that images are converted to.
    """

    def __init__(
        self,
        count: int = 20_000,
        seed: int = 0,
        size: int = 64,
        texture: Literal["any", "match", "conflict"] = "any",
        image_spec: ImageSpec = RGB,
    ) -> None:
        self.count, self.seed, self.size, self.texture = count, seed, size, texture
        spec = f"shapes:count={count},seed={seed},size={size},texture={texture}"
        super().__init__(spec, image_spec, classes=SHAPES)

    @staticmethod
    def from_spec(spec: str, image_spec: ImageSpec = RGB) -> "SyntheticShapes":
        """Parse `shapes:` and its comma-separated options. Raises UserError."""
        texts = group_options(filter(None, spec.removeprefix("shapes:").split(",")))
        check_options(spec, "shapes:", texts, list(_OPTIONS))
        options: dict[str, Any] = {}
        for name, (text,) in texts.items():
            options[name] = int(text) if re.fullmatch("[0-9]{1,14}", text) else text
            if not _OPTIONS[name].takes(options[name]):
                raise UserError(f"shapes:{name} must be {_OPTIONS[name]}, not '{text}'")
        return SyntheticShapes(**options, image_spec=image_spec)

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        return self._draw_labels(np.arange(self.count))[0]

    @property
    def texture_labels(self) -> npt.NDArray[np.int64]:
        """Texture of the object of each sample (n)."""
        return self._draw_labels(np.arange(self.count))[1]

    def __len__(self) -> int:
        return self.count

    def path_of(self, index: int) -> str:
        return f"{self.spec}#{index}"

    def read_array(self, index: int) -> Shaped[Array, "h w c"]:
        image, channels = self.sample(index).image, self.image_spec.channels
        if channels == 1:
            image = image.mean(axis=2, keepdims=True, dtype=np.float32).astype(np.uint8)
        elif channels != 3:  # repeat the colors, every second time as negatives
            repeats = [image if k % 2 == 0 else 255 - image for k in range(-(-channels // 3))]
            image = np.concatenate(repeats, 2)[..., :channels]
        return np.ascontiguousarray(convert(stretch(image, self.image_spec), self.image_spec))

    def sample(self, index: int) -> Sample:
        """Draw a sample."""
        shape, texture = (int(label[0]) for label in self._draw_labels(np.asarray([index])))
        u = rng.uniform(self.seed, "shapes", 1, [index], _NUM_UNIFORMS)[0].tolist()
        longer = self.size + int(u[0] * (self.size / 3 + 1))
        height, width = (self.size, longer) if u[1] < 0.5 else (longer, self.size)

        # Image coordinates: the origin is in the center, and the shorter side extends from -1 to 1.
        y = ((np.arange(height, dtype=np.float32) + 0.5) * 2 - height) / self.size
        x = ((np.arange(width, dtype=np.float32) + 0.5) * 2 - width) / self.size
        yy, xx = np.meshgrid(y, x, indexing="ij")

        # Object coordinates: translated, rotated, scaled and stretched.
        radius = 0.55 + 0.3 * u[2]
        margin = max(0.0, 1.0 - radius)
        cx, cy, angle = (2 * u[3] - 1) * margin, (2 * u[4] - 1) * margin, (2 * u[5] - 1) * 0.4
        stretch = np.exp((u[6] - 0.5) * 0.3)
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        dx, dy = xx - np.float32(cx), yy - np.float32(cy)
        ox = (dx * cos + dy * sin) / np.float32(radius * stretch)
        oy = (dy * cos - dx * sin) / np.float32(radius / stretch)
        # The level decreases by about one over the object's radius, so this is the covered fraction of an edge pixel.
        cover = np.clip(_level(SHAPES[shape], ox, oy) * np.float32(radius * self.size / 2) + 0.5, 0, 1)

        other = int(u[7] * (len(TEXTURES) - 1))
        background = other + (other >= texture)
        front_colors, back_colors = _colors(u[8:14]), _colors(u[14:20])
        middle = back_colors.mean(axis=0)
        back_colors = middle + (back_colors - middle) * 0.4
        front = _texture(texture, xx, yy, u[20:26])
        back = _texture(background, xx, yy, u[26:32])
        light = 1 + (xx * np.float32(u[32] - 0.5) + yy * np.float32(u[33] - 0.5)) * np.float32(0.4)
        tone = cover * front, (1 - cover) * back
        image = (
            (cover - tone[0])[..., None] * front_colors[0]
            + tone[0][..., None] * front_colors[1]
            + (1 - cover - tone[1])[..., None] * back_colors[0]
            + tone[1][..., None] * back_colors[1]
        ) * light[..., None]
        mask = cover > 0.5
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        return Sample(np.clip(image * 255, 0, 255).astype(np.uint8), shape, texture, mask, box)

    def _draw_labels(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return shape and texture of samples."""
        u = rng.uniform(self.seed, "shapes", 0, indices, 2)
        shape = (u[:, 0] * len(SHAPES)).astype(np.int64)
        if self.texture == "match":
            return shape, shape
        if self.texture == "conflict":
            return shape, (shape + 1 + (u[:, 1] * (len(TEXTURES) - 1)).astype(np.int64)) % len(TEXTURES)
        return shape, (u[:, 1] * len(TEXTURES)).astype(np.int64)


def _level(name: str, x: Grid, y: Grid) -> Grid:
    """Return a function of object coordinates (y points down): positive inside, about a distance at the edge."""
    ax, ay, r = np.abs(x), np.abs(y), np.sqrt(x * x + y * y)
    smaller, larger, v = np.minimum, np.maximum, 0.2 - y - 0.75 * np.sqrt(ax)
    levels: dict[str, Callable[[], Grid]] = {
        "circle": lambda: 0.9 - r,
        "square": lambda: 0.8 - larger(ax, ay),
        "triangle": lambda: smaller(0.7 - y, 0.5 * (y + 1) - 0.87 * ax + 0.05),
        "star": lambda: 0.6 * (0.68 + 0.28 * np.cos(5 * np.arctan2(x, -y)) - r),
        "cross": lambda: larger(smaller(0.3 - ax, 0.95 - ay), smaller(0.3 - ay, 0.95 - ax)),
        "ring": lambda: 0.25 - np.abs(r - 0.7),
        "crescent": lambda: smaller(0.95 - r, np.sqrt((x - 0.5) ** 2 + y * y) - 0.75),
        "heart": lambda: 0.5 * (0.95 - np.sqrt(x * x * 1.1 + v * v * 1.2)),
        "arrow": lambda: larger(
            smaller(0.28 - ay, smaller(x + 0.95, 0.3 - x)), smaller(x + 0.05, 0.7 * (0.95 - x - ay))
        ),
        "hourglass": lambda: smaller(0.9 - ay, 0.75 * (ay * 0.9 + 0.1 - ax)),
    }
    return levels[name]()


def _texture(texture: int, x: Grid, y: Grid, u: list[float]) -> Grid:
    """Return the fraction of the second color at each pixel, given six random numbers for scale, angle and phase."""
    name, scale, angle, phase = TEXTURES[texture], 0.8 + 0.5 * u[1], u[0] * np.pi, np.float32(6.28 * u[2])
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    s, t = x * cos + y * sin, y * cos - x * sin  # along and across the stripes
    frequencies = {"stripes": 22, "bars": 9, "checks": 12, "dots": 13, "rings": 20, "waves": 16, "mesh": 14}
    f = np.float32(frequencies.get(name, 0) * scale)
    textures: dict[str, Callable[[], Grid]] = {
        "plain": lambda: 0.5 + 0.25 * s * np.float32(u[2]),
        "stripes": lambda: 0.5 + 0.5 * np.sin(f * s + phase),
        "bars": lambda: (np.sin(f * s + phase) > 0).astype(np.float32),
        "checks": lambda: (np.sin(f * s + phase) * np.sin(f * t) > 0).astype(np.float32),
        "dots": lambda: (np.sin(f * s + phase) + np.sin(f * t) > 0.9).astype(np.float32),
        "mesh": lambda: (np.maximum(np.sin(f * s + phase), np.sin(f * t)) > 0.75).astype(np.float32),
        "rings": lambda: 0.5 + 0.5 * np.sin(f * np.hypot(x - np.float32(u[2] - 0.5), y - np.float32(u[3] - 0.5))),
        "waves": lambda: 0.5 + 0.5 * np.sin(f * s + 1.6 * np.sin(np.float32(9 * scale) * t)),
    }
    if name in textures:
        return textures[name]()
    cells = 24 if name == "grain" else 6
    lattice = rng.uniform(int(u[2] * 2**32), "grain", 0, np.arange(cells), cells).astype(np.float32)
    if name == "grain":
        i, j = (((p * 0.49 * scale / 0.8 * 0.6 + 0.5) * cells).astype(np.int64) % cells for p in (y, x))
        return lattice[i, j]
    waves: Any = sum(  # clouds: three random waves are cheaper than interpolating a lattice
        np.sin(np.float32(3 + 5 * a) * s + np.float32(6 * (b - 0.5)) * t + 6.28 * c) for a, b, c in lattice[:3, :3].T
    )
    return 0.5 + waves / 6


def _colors(u: list[float]) -> npt.NDArray[np.float32]:
    """Return two colors (2 3) in [0, 1] of clearly different brightness, in either order."""
    hues = np.asarray([u[:3], u[3:6]], np.float32)
    hues = hues / hues.max(axis=1, keepdims=True)
    dark, bright = 0.15 + 0.3 * u[0], 0.65 + 0.35 * u[5]
    values = (dark, bright) if u[1] < 0.5 else (bright, dark)
    return hues * np.asarray(values, np.float32)[:, None]
