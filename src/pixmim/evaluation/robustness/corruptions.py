"""The 15 corruptions of ImageNet-C (arXiv 1903.12261), each at five severities, for images in memory.

The constants are those published for 224 px images. At other sizes, lengths in pixels (radii, sigmas, displacements,
flake sizes) scale with the shorter edge, so the same image at another size is corrupted equally; strengths, shares and
qualities stay. (The authors' own constants for 64 px are milder in noise, JPEG and pixelation.)

Differences from the authors' code: frost is synthesized, because their photographs of frost may not be redistributed
(colors, brightness and contrast are measured in them); the defocus disk has an antialiased edge, so its radius need
not be an integer; elastic_transform interpolates once instead of twice; values are rounded instead of truncated; the
result is not compressed as JPEG. The PSNR on photographs is within 2 % for every corruption and severity
(docs/evaluate.md).
"""

import io
import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pixmim.evaluation.robustness.filters import crystals, enlarge, plasma, smear, smooth
from pixmim.utils import rng
from pixmim.utils.errors import UserError, did_you_mean

Pixels = Float[Tensor, "c h w"]  # An image in [0, 1]. Corruptions may return values outside this range.

Constants = tuple[float, ...]
Generator = np.random.Generator

Corruption = Callable[[Tensor, Constants, Generator, float], Pixels]
"""A function of an image, a severity's constants, a random generator, and the image size in units of 224 px."""

_LUMA = (0.299, 0.587, 0.114)

FROST_COLORS = (
    ((0.31, 0.58, 0.65), (0.093, 0.056, 0.053)),
    ((0.77, 0.79, 0.83), (0.077, 0.079, 0.082)),
    ((0.77, 0.79, 0.83), (0.076, 0.079, 0.082)),
    ((0.57, 0.63, 0.68), (0.102, 0.102, 0.107)),
    ((0.40, 0.44, 0.49), (0.139, 0.138, 0.135)),
)
"""RGB mean and standard deviation of the five photographs of frost used for ImageNet-C.

Measured in 300 random crops of 224 px per photograph. The second and third show the same pane of glass. The authors'
code never selects their sixth photograph.
"""


def gaussian_noise(x: Pixels, constants: Constants, generator: Generator, scale: float) -> Pixels:
    """Add normal noise. Constants: standard deviation."""
    return x + constants[0] * torch.from_numpy(generator.standard_normal(x.shape, np.float32))


def shot_noise(x: Pixels, constants: Constants, generator: Generator, scale: float) -> Pixels:
    """Replace values by Poisson counts. Constants: expected count of a white value."""
    return torch.from_numpy(generator.poisson(x.numpy() * constants[0]).astype(np.float32)) / constants[0]


def impulse_noise(x: Pixels, constants: Constants, generator: Generator, scale: float) -> Pixels:
    """Set values to 0 or 1 with equal probability. Constants: share of values that are replaced."""
    u = torch.from_numpy(generator.random(x.shape, np.float32))
    share = constants[0]
    return torch.where(u < share / 2, 0.0, torch.where(u < share, 1.0, x))


def defocus_blur(x: Pixels, constants: Constants, generator: Generator, scale: float) -> Pixels:
    """Convolve with a disk. Constants: radius of the disk and sigma of its edge, in pixels."""
    kernel = disk(constants[0] * scale, constants[1] * scale)
    reach = len(kernel) // 2
    padded = F.pad(x[:, None], (reach, reach, reach, reach), mode="reflect")
    return F.conv2d(padded, kernel[None, None])[:, 0]


def disk(radius: float, sigma: float) -> Float[Tensor, "k k"]:
    """Return a disk kernel that sums to 1. Edge pixels are weighted by the approximate share inside the disk."""
    reach = math.ceil(radius + 0.5 + 2 * sigma)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    kernel = torch.from_numpy(np.clip(radius + 0.5 - np.hypot(y, x), 0, 1).astype(np.float32))
    kernel = smooth(kernel[None], sigma, truncate=2.0)[0]
    return kernel / kernel.sum()


def glass_blur(x: Pixels, constants: Constants, generator: Generator, scale: float) -> Pixels:
    """Copy neighboring pixels over each other, between two Gaussian blurs. Constants: sigma, reach, rounds.

    The authors' loop visits pixels from the last to the first and intends to swap each with a neighbor. Its swap of two
    array views copies instead: each pixel takes its neighbor's current value, which the neighbor itself may have
    copied earlier in the same round. Following these chains by pointer doubling gives the same result without a loop.
    A fractional reach is rounded up or down at random for each pixel, which preserves its mean.
    """
    (sigma, reach, rounds), (h, w) = constants, x.shape[1:]
    reach *= scale
    border = math.ceil(reach)
    rows, columns = np.mgrid[border + 1 : h - border + 1, border + 1 : w - border + 1]
    identity = np.arange(h * w)
    origin = identity
    for _ in range(int(rounds)):
        limit = math.floor(reach) + (generator.random(rows.shape) < reach % 1)
        down, right = (np.floor(generator.random(rows.shape) * 2 * limit).astype(np.int64) - limit for _ in range(2))
        source = identity.copy()
        source[rows * w + columns] = (rows + down) * w + columns + right
        last = np.maximum(source, identity)  # a later pixel has already changed in this round
        while not np.array_equal(last, further := last[last]):
            last = further
        origin = origin[source[last]]
    blurred = smooth(x, sigma * scale).flatten(1)
    return smooth(blurred[:, torch.from_numpy(origin)].view_as(x), sigma * scale)


def motion_blur(x: Pixels, constants: Constants, generator: Generator, scale: float) -> Pixels:
    """Smear along a line at -45 to 45 degrees. Constants: half its length and sigma, in pixels."""
    return smear(x, constants[0] * scale, constants[1] * scale, generator.uniform(-45, 45))


def zoom_blur(x: Pixels, constants: Constants, generator: Generator, scale: float) -> Pixels:
    """Average the image and its enlargements. Constants: end of the range of factors, and its step from 1."""
    end, step = constants
    factors = np.arange(1, end, step).tolist()  # floating point includes the end at severity 1: 12 factors
    total = x.clone()
    for factor in factors:
        total += enlarge(x, factor)
    return total / (len(factors) + 1)


def snow(x: Pixels, constants: Constants, generator: Generator, scale: float) -> Pixels:
    """Whiten the image and add a layer of falling flakes twice, the second time rotated by 180 degrees.

    Constants: mean and deviation of the noise that flakes are thresholded from, flake size in pixels, threshold, half
    length and sigma of the motion blur in pixels, weight of the original image. Snow is made at 224 px and resized.
    """
    mean, deviation, flake, threshold, radius, sigma, weight = constants
    full = round(x.shape[1] / scale), round(x.shape[2] / scale)  # the same snow at any size
    noise = mean + deviation * torch.from_numpy(generator.standard_normal((1, *full), np.float32))
    # The outermost of the ceil(224 / flake) values in the middle move onto the border.
    layer = enlarge(noise, 223 / (math.ceil(224 / flake) - 1))
    layer = torch.where(layer < threshold, 0.0, layer).clamp(0, 1)
    layer = smear(layer, radius, sigma, generator.uniform(-135, -45))
    layer = F.interpolate(layer[None], x.shape[1:], mode="bilinear", antialias=True)[0]
    gray = x if len(x) == 1 else (x * torch.tensor(_LUMA).view(3, 1, 1)).sum(dim=0, keepdim=True)
    white = torch.maximum(x, gray * 1.5 + 0.5)
    return weight * x + (1 - weight) * white + layer + layer.flip(1, 2)


def frost(x: Pixels, constants: Constants, generator: Generator, scale: float) -> Pixels:
    """Add synthetic ice in the colors of one of five photographs. Constants: weights of the image and of the ice."""
    mean, deviation = torch.tensor(FROST_COLORS[generator.integers(len(FROST_COLORS))])
    if len(x) == 1:
        mean, deviation = (values @ torch.tensor(_LUMA) for values in (mean, deviation))
    ice = mean.view(-1, 1, 1) + deviation.view(-1, 1, 1) * crystals((x.shape[1], x.shape[2]), generator)
    return constants[0] * x + constants[1] * ice.clamp(0, 1)


def fog(x: Pixels, constants: Constants, generator: Generator, scale: float) -> Pixels:
    """Add plasma clouds and rescale to the image's maximum. Constants: strength, decay."""
    top = float(x.max())
    return (x + constants[0] * plasma((x.shape[1], x.shape[2]), constants[1], generator)) * top / (top + constants[0])


def brightness(x: Pixels, constants: Constants, generator: Generator, scale: float) -> Pixels:
    """Raise the value of HSV, the largest channel, and all channels in proportion. Constants: increase."""
    value = x.amax(dim=0, keepdim=True)
    raised = (value + constants[0]).clamp(0, 1)
    return torch.where(value > 0, x / value.clamp(min=1e-6) * raised, raised)


def contrast(x: Pixels, constants: Constants, generator: Generator, scale: float) -> Pixels:
    """Move values towards the mean of their channel. Constants: remaining contrast."""
    mean = x.mean(dim=(1, 2), keepdim=True)
    return (x - mean) * constants[0] + mean


def elastic_transform(x: Pixels, constants: Constants, generator: Generator, scale: float) -> Pixels:
    """Warp by smooth noise and shear. Constants, in pixels: strength and sigma of the noise, shift of three corners.

    The displacement is noise in [-1, 1], smoothed and multiplied by the strength. Smoothed noise decreases with sigma
    in pixels, so the strength grows with the square of the scale to make the displacement grow with the scale.
    """
    (strength, sigma, corners), (h, w) = constants, x.shape[1:]
    noise = torch.from_numpy(generator.uniform(-1, 1, (2, h, w)).astype(np.float32))
    right, down = smooth(noise, sigma * scale, truncate=3.0) * strength * scale**2

    middle, third = np.array([w, h]) // 2, min(h, w) // 3
    fixed = middle + third * np.array([[1, 1], [1, -1], [-1, -1]])
    moved = fixed + generator.uniform(-corners * scale, corners * scale, (3, 2))
    # The affine map of (x, y, 1) that moves the three points.
    matrix = np.linalg.solve(np.c_[fixed, np.ones(3)], moved).T.astype(np.float32).tolist()

    y, z = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    y, z = y + down, z + right
    (a, b, c), (d, e, f) = matrix
    grid = torch.stack([(a * z + b * y + c) * 2 / (w - 1) - 1, (d * z + e * y + f) * 2 / (h - 1) - 1], dim=-1)
    return F.grid_sample(x[None], grid[None], mode="bilinear", padding_mode="reflection", align_corners=True)[0]


def pixelate(x: Pixels, constants: Constants, generator: Generator, scale: float) -> Pixels:
    """Downsample by area and repeat pixels. Constants: remaining share of pixels along each edge."""
    image = _to_image(x)
    small = max(1, int(image.width * constants[0])), max(1, int(image.height * constants[0]))
    return _to_tensor(image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BOX))


def jpeg_compression(x: Pixels, constants: Constants, generator: Generator, scale: float) -> Pixels:
    """Encode and decode as JPEG with chroma subsampling. Constants: quality."""
    buffer = io.BytesIO()
    _to_image(x).save(buffer, "JPEG", quality=int(constants[0]))
    with Image.open(buffer, formats=("JPEG",)) as image:
        return _to_tensor(image)


def _to_image(x: Tensor) -> Image.Image:
    pixels = (x * 255).round().to(torch.uint8)
    return Image.fromarray((pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).numpy())


def _to_tensor(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image, np.float32)) / 255
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


CORRUPTIONS: dict[str, tuple[Corruption, tuple[Constants, ...]]] = {
    "gaussian_noise": (gaussian_noise, ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,))),
    "shot_noise": (shot_noise, ((60,), (25,), (12,), (5,), (3,))),
    "impulse_noise": (impulse_noise, ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,))),
    "defocus_blur": (defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "glass_blur": (glass_blur, ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))),
    "motion_blur": (motion_blur, ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))),
    "zoom_blur": (zoom_blur, ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))),
    "snow": (
        snow,
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": (frost, ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))),
    "fog": (fog, ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))),
    "brightness": (brightness, ((0.1,), (0.2,), (0.3,), (0.4,), (0.5,))),
    "contrast": (contrast, ((0.4,), (0.3,), (0.2,), (0.1,), (0.05,))),
    "elastic_transform": (
        elastic_transform,
        (
            (244 * 2, 244 * 0.7, 244 * 0.1),
            (244 * 2, 244 * 0.08, 244 * 0.2),
            (244 * 0.05, 244 * 0.01, 244 * 0.02),
            (244 * 0.07, 244 * 0.01, 244 * 0.02),
            (244 * 0.12, 244 * 0.01, 244 * 0.02),
        ),
    ),
    "pixelate": (pixelate, ((0.6,), (0.5,), (0.4,), (0.3,), (0.25,))),
    "jpeg_compression": (jpeg_compression, ((25,), (18,), (15,), (10,), (7,))),
}
"""Functions and their constants at severities 1 to 5, in the order of the paper's tables."""

SEVERITIES = (1, 2, 3, 4, 5)

VERSION = 2  # raise when the same arguments give other pixels, so that a resumed evaluation does not mix two versions


def corrupt(
    image: UInt8[Tensor, "c h w"], name: str, severity: int, *, seed: int = 0, index: int = 0
) -> UInt8[Tensor, "c h w"]:
    """Corrupt an image of 1 or 3 channels at a severity of 1 to 5, as a pure function of the arguments.

    All severities of the image with an `index` in its dataset share their random numbers. Raises UserError if the
    corruption, the severity or the number of channels is not supported.
    """
    check_corruption(name)
    if severity not in SEVERITIES:
        raise UserError(f"a severity is 1, 2, 3, 4 or 5, not {severity}")
    if image.shape[0] not in (1, 3):  # gray light and frost have no meaning in other channels
        raise UserError(f"corruptions need images of 3 channels (color) or 1 (gray), not of {image.shape[0]}")
    function, constants = CORRUPTIONS[name]
    generator = np.random.Generator(np.random.Philox(key=rng.bits(seed, name, 0, [index], 2)[0]))
    scale = min(image.shape[-2:]) / 224
    x = function(image.float() / 255, constants[severity - 1], generator, scale)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def check_corruption(name: str) -> None:
    """Raise UserError for an unknown corruption."""
    if name not in CORRUPTIONS:
        known = ", ".join(CORRUPTIONS)
        raise UserError(f"there is no corruption '{name}'{did_you_mean(name, CORRUPTIONS)} Known: {known}")
