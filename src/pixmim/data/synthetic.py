"""The embedded data set: pictures of one object each, drawn on the fly from (seed, index), endless and labeled.

Ten shapes, each filled with any of ten textures, stand before a background of another texture. Pose, scale, color,
light and aspect ratio vary. Since shape and texture are drawn apart, a network's taste for one or the other shows.
Object and background differ by texture and color, so nothing but the outline tells one shape from another.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from jaxtyping import Shaped

from pixmim.data.dataset import RGB, ImageDataset, ImageSpec
from pixmim.data.decode.channels import convert
from pixmim.transforms.crops import Array
from pixmim.utils import rng
from pixmim.utils.errors import UserError, did_you_mean

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "crescent", "heart", "arrow", "hourglass")
TEXTURES = ("plain", "stripes", "bars", "checks", "dots", "rings", "grain", "clouds", "waves", "mesh")

Plane = npt.NDArray[np.floating[Any]]

_NUMBERS = 40  # uniform numbers a sample takes, with some to spare

_LIMITS = {"count": (1, 10**13), "seed": (0, 10**13), "size": (8, 4096)}


@dataclass(frozen=True)
class Sample:
    """One drawn picture and all that is known of it.

    image    uint8 (h w 3)
    shape    index into SHAPES
    texture  index into TEXTURES, of the object
    mask     bool (h w): the object's pixels
    box      (left, top, right, bottom) in pixels around the mask, right and bottom exclusive
    """

    image: npt.NDArray[np.uint8]
    shape: int
    texture: int
    mask: npt.NDArray[np.bool_]
    box: tuple[int, int, int, int]


class SyntheticShapes(ImageDataset):
    """The data set. `shapes:count=5000,seed=1,size=64,texture=conflict` spells its options.

    count    samples in one epoch (there are always more: any index can be drawn)
    seed     another seed, other pictures
    size     the shorter edge in pixels; the longer is up to a third longer
    texture  "any": independent of the shape; "match": the one with the shape's number; "conflict": any other
    """

    def __init__(
        self,
        count: int = 20_000,
        seed: int = 0,
        size: int = 64,
        texture: Literal["any", "match", "conflict"] = "any",
        form: ImageSpec = RGB,
    ) -> None:
        self.count, self.seed, self.size, self.texture = count, seed, size, texture
        spec = f"shapes:count={count},seed={seed},size={size},texture={texture}"
        super().__init__(spec, form, classes=SHAPES)

    @staticmethod
    def from_spec(spec: str, form: ImageSpec = RGB) -> "SyntheticShapes":
        """Read `shapes:` followed by comma-separated options. Raises UserError naming the option that is wrong."""
        known = "count", "seed", "size", "texture"
        options: dict[str, int | str] = {}
        for part in filter(None, spec.removeprefix("shapes:").split(",")):
            key, _, value = part.partition("=")
            if key not in known:
                raise UserError(f"shapes: has no option '{key}'{did_you_mean(key, known)} Known: {', '.join(known)}")
            if key == "texture":
                if value not in ("any", "match", "conflict"):
                    raise UserError(f"shapes:texture is any, match or conflict, not '{value}'")
                options[key] = value
            elif not re.fullmatch("[0-9]{1,14}", value) or not _LIMITS[key][0] <= int(value) <= _LIMITS[key][1]:
                raise UserError(f"shapes:{key} takes a whole number (count from 1, size from 8 to 4096), not '{value}'")
            else:
                options[key] = int(value)
        return SyntheticShapes(**options, form=form)  # type: ignore[arg-type]

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        return self._numbers(np.arange(self.count))[0]

    @property
    def texture_labels(self) -> npt.NDArray[np.int64]:
        """The object's texture for each sample (n)."""
        return self._numbers(np.arange(self.count))[1]

    def __len__(self) -> int:
        return self.count

    def path_of(self, index: int) -> str:
        return f"{self.spec}#{index}"

    def read_array(self, index: int) -> Shaped[Array, "h w c"]:
        image, count = self.sample(index).image, self.image_spec.channels
        if count == 1:
            image = image.mean(axis=2, keepdims=True, dtype=np.float32).astype(np.uint8)
        elif count != 3:  # the colors again and again, every second time as negatives
            image = np.concatenate([image if k % 2 == 0 else 255 - image for k in range(-(-count // 3))], 2)[
                ..., :count
            ]
        return np.ascontiguousarray(convert(image, self.image_spec))

    def sample(self, index: int) -> Sample:
        """Draw sample `index`."""
        shape, texture = (int(label[0]) for label in self._numbers(np.asarray([index])))
        u = rng.uniform(self.seed, "shapes", 1, [index], _NUMBERS)[0].tolist()
        longer = self.size + int(u[0] * (self.size / 3 + 1))
        height, width = (self.size, longer) if u[1] < 0.5 else (longer, self.size)

        # Coordinates in half short edges from the center: the shorter edge runs from -1 to 1.
        y = ((np.arange(height, dtype=np.float32) + 0.5) * 2 - height) / self.size
        x = ((np.arange(width, dtype=np.float32) + 0.5) * 2 - width) / self.size
        yy, xx = np.meshgrid(y, x, indexing="ij")

        # Object coordinates: moved, turned a little, scaled, and stretched a little.
        radius = 0.55 + 0.3 * u[2]
        free = max(0.0, 1.0 - radius)
        cx, cy, turn = (2 * u[3] - 1) * free, (2 * u[4] - 1) * free, (2 * u[5] - 1) * 0.4
        stretch = np.exp((u[6] - 0.5) * 0.3)
        cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        dx, dy = xx - np.float32(cx), yy - np.float32(cy)
        ox = (dx * cos + dy * sin) / np.float32(radius * stretch)
        oy = (dy * cos - dx * sin) / np.float32(radius / stretch)
        # The level falls by about one over the object's radius, so this is the share of each edge pixel it covers.
        cover = np.clip(_level(shape, ox, oy) * np.float32(radius * self.size / 2) + 0.5, 0, 1)

        other = int(u[7] * (len(TEXTURES) - 1))
        behind = other + (other >= texture)
        front_colors, back_colors = _colors(u[8:14]), _colors(u[14:20])
        middle = back_colors.mean(axis=0)
        back_colors = middle + (back_colors - middle) * 0.4
        front = _texture(texture, xx, yy, u[20:26])
        back = _texture(behind, xx, yy, u[26:32])
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

    def _numbers(self, indices: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Shape and texture of the samples `indices`."""
        u = rng.uniform(self.seed, "shapes", 0, indices, 2)
        shape = (u[:, 0] * len(SHAPES)).astype(np.int64)
        if self.texture == "match":
            return shape, shape
        if self.texture == "conflict":
            return shape, (shape + 1 + (u[:, 1] * (len(TEXTURES) - 1)).astype(np.int64)) % len(TEXTURES)
        return shape, (u[:, 1] * len(TEXTURES)).astype(np.int64)


def _level(shape: int, x: Plane, y: Plane) -> Plane:
    """A function of the object's own coordinates (y points down): positive inside, about a distance near the edge."""
    name = SHAPES[shape]
    if name == "square":
        return 0.8 - np.maximum(np.abs(x), np.abs(y))
    if name == "triangle":
        return np.minimum(0.7 - y, 0.5 * (y + 1) - 0.87 * np.abs(x) + 0.05)
    if name == "cross":
        ax, ay = np.abs(x), np.abs(y)
        return np.maximum(np.minimum(0.3 - ax, 0.95 - ay), np.minimum(0.3 - ay, 0.95 - ax))
    if name == "heart":
        v = 0.2 - y - 0.75 * np.sqrt(np.abs(x))
        return 0.5 * (0.95 - np.sqrt(x * x * 1.1 + v * v * 1.2))
    if name == "arrow":
        shaft = np.minimum(0.28 - np.abs(y), np.minimum(x + 0.95, 0.3 - x))
        head = np.minimum(x + 0.05, 0.7 * (0.95 - x - np.abs(y)))
        return np.maximum(shaft, head)
    if name == "hourglass":
        return np.minimum(0.9 - np.abs(y), 0.75 * (np.abs(y) * 0.9 + 0.1 - np.abs(x)))
    r = np.sqrt(x * x + y * y)
    if name == "circle":
        return 0.9 - r
    if name == "ring":
        return 0.25 - np.abs(r - 0.7)
    if name == "crescent":
        return np.minimum(0.95 - r, np.sqrt((x - 0.5) ** 2 + y * y) - 0.75)
    angle = np.arctan2(x, -y)  # star: five rays, one upwards
    return 0.6 * (0.68 + 0.28 * np.cos(5 * angle) - r)


def _texture(texture: int, x: Plane, y: Plane, u: list[float]) -> Plane:
    """The share of the second color, in [0, 1], at each place. u: six uniform numbers for scale, turn and phase."""
    name = TEXTURES[texture]
    turn, scale = u[0] * np.pi, 0.8 + 0.5 * u[1]
    cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    s, t = x * cos + y * sin, y * cos - x * sin
    if name == "plain":
        return 0.5 + 0.25 * s * np.float32(u[2])
    if name == "stripes":
        return 0.5 + 0.5 * np.sin(np.float32(22 * scale) * s + np.float32(6.28 * u[2]))
    if name == "bars":
        return (np.sin(np.float32(9 * scale) * s + np.float32(6.28 * u[2])) > 0).astype(np.float32)
    if name == "checks":
        f = np.float32(12 * scale)
        return (np.sin(f * s + np.float32(6.28 * u[2])) * np.sin(f * t) > 0).astype(np.float32)
    if name == "dots":
        f = np.float32(13 * scale)
        return (np.sin(f * s + np.float32(6.28 * u[2])) + np.sin(f * t) > 0.9).astype(np.float32)
    if name == "rings":
        return 0.5 + 0.5 * np.sin(
            np.float32(20 * scale) * np.hypot(x - np.float32(u[2] - 0.5), y - np.float32(u[3] - 0.5))
        )
    if name in ("grain", "clouds"):
        cells = 24 if name == "grain" else 6
        lattice = rng.uniform(int(u[2] * 2**32), "grain", 0, np.arange(cells), cells).astype(np.float32)
        i, j = (((p * 0.49 * scale / 0.8 * 0.6 + 0.5) * cells).astype(np.int64) % cells for p in (y, x))
        if name == "grain":
            return lattice[i, j]
        # Smooth noise: a few random waves are cheaper than interpolating the lattice, and as cloudy.
        waves = sum(
            np.sin(
                np.float32(3 + 5 * lattice[0, k]) * s + np.float32(6 * (lattice[1, k] - 0.5)) * t + 6.28 * lattice[2, k]
            )
            for k in range(3)
        )
        return 0.5 + waves / 6
    if name == "waves":
        return 0.5 + 0.5 * np.sin(np.float32(16 * scale) * s + 1.6 * np.sin(np.float32(9 * scale) * t))
    f = np.float32(14 * scale)  # mesh: thin lines both ways
    return (np.maximum(np.sin(f * s + np.float32(6.28 * u[2])), np.sin(f * t)) > 0.75).astype(np.float32)


def _colors(u: list[float]) -> npt.NDArray[np.float32]:
    """Two colors (2 3) in [0, 1] of clearly different brightness, in either order."""
    hues = np.asarray([u[:3], u[3:6]], np.float32)
    hues = hues / hues.max(axis=1, keepdims=True)
    dark, bright = 0.15 + 0.3 * u[0], 0.65 + 0.35 * u[5]
    values = (dark, bright) if u[1] < 0.5 else (bright, dark)
    return hues * np.asarray(values, np.float32)[:, None]
