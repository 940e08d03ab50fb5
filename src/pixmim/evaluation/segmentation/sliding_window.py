"""Sliding windows: a class for each pixel of a whole picture, from a network that takes crops of one size."""

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from pixmim.evaluation.frozen_encoder import FrozenEncoder
from pixmim.training.precision import autocast
from pixmim.transforms.crops import flip_and_normalize, resize_to_cover

_WINDOWS = 8  # computed at once
_CLASSES = 16  # brought to the pixels at once, so that a large picture with many classes does not fill the memory


@torch.no_grad()
def segment(
    model: nn.Module, encoder: FrozenEncoder, picture: Shaped[Tensor, "c h w"], size: tuple[int, int]
) -> Int[Tensor, "h w"]:
    """The class of each pixel of a picture of any size, on the encoder's device.

    The picture is resized until it just covers windows of `size` (h, w), aspect kept. Windows follow one another in
    steps of two thirds of their sides, and the last ones end with the picture; where they overlap, scores are averaged.
    Scores, and not classes, are brought back to the picture's size.

    model  a `Segmenter` in evaluation mode, made for images of `size`
    """
    small = resize_to_cover(picture, size, "bilinear").to(encoder.device)
    x = flip_and_normalize(small[None], None, encoder.mean, encoder.std)
    (h, w), (height, width) = size, x.shape[-2:]
    corners = [(top, left) for top in starts(height, h) for left in starts(width, w)]
    total, count = None, x.new_zeros(height, width)
    for first in range(0, len(corners), _WINDOWS):
        some = corners[first : first + _WINDOWS]
        with autocast(encoder.device, encoder.precision):
            (scores,) = model(torch.cat([x[..., top : top + h, left : left + w] for top, left in some]))
        large = F.interpolate(scores.float(), size=size, mode="bilinear")
        if total is None:
            total = large.new_zeros(large.shape[1], height, width)
        for (top, left), window in zip(some, large, strict=True):
            total[:, top : top + h, left : left + w] += window
            count[top : top + h, left : left + w] += 1
    assert total is not None
    return largest(total / count, (picture.shape[-2], picture.shape[-1]))


def starts(length: int, window: int) -> list[int]:
    """Where windows begin along an axis: in steps of two thirds of a window, the last one where the axis ends."""
    step = max(1, window * 2 // 3)
    return [*range(0, length - window, step), length - window]


def largest(scores: Float[Tensor, "classes h w"], size: tuple[int, int]) -> Int[Tensor, "h2 w2"]:
    """The class whose score, brought to `size` bilinearly, is the largest at each pixel; of equal ones the first."""
    best, answer = None, None
    for first in range(0, len(scores), _CLASSES):
        part = F.interpolate(scores[None, first : first + _CLASSES], size=size, mode="bilinear")[0]
        value, index = part.max(dim=0)
        if best is None or answer is None:
            best, answer = value, index
        else:
            answer = torch.where(value > best, index + first, answer)
            best = torch.maximum(value, best)
    assert answer is not None
    return answer
