"""Segmentation heads, their loss, and inference in sliding windows."""

from typing import Literal

import torch
from jaxtyping import Float, Int, Shaped
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from pixmim.evaluation.context import check_finite
from pixmim.evaluation.frozen_encoder import FrozenEncoder
from pixmim.evaluation.segmentation.dataset import IGNORE
from pixmim.models import features
from pixmim.models.convmae import ChannelNorm
from pixmim.models.feature_maps import maps, widths
from pixmim.training.precision import autocast
from pixmim.transforms.crops import flip_and_normalize, resize_to_cover

_POOLS = (1, 2, 3, 6)
_UNUSED = ("norm.", "fc_norm.", "head.")  # prefixes of parameters after the feature maps, which get no gradient
_WINDOWS = 8  # per forward pass
_CHUNK = 16  # classes interpolated at once, which bounds the memory of a large image with many classes


class Segmenter(nn.Module):
    """An encoder with a segmentation head: linear, or UPerNet (arXiv 1807.10221) as BEiT and MAE use it.

    "linear" is BatchNorm and a 1x1 convolution on the last map, after the encoder's final norm. UPerNet has `width`
    channels, its auxiliary head half of them, at most 256. A frozen encoder is not trained.
    """

    def __init__(
        self, encoder: nn.Module, head: Literal["linear", "uper"], classes: int, width: int = 512, frozen: bool = False
    ) -> None:
        super().__init__()
        self.encoder, self._frozen = encoder, frozen
        sizes = widths(encoder)
        self.neck: nn.ModuleList | None = None
        self.auxiliary: nn.Module | None = None
        if head == "linear":
            self.head: nn.Module = nn.Sequential(nn.BatchNorm2d(sizes[-1]), _classifier(sizes[-1], classes))
        else:
            self.neck, self.head = _build_neck(encoder), UPerHead(sizes, classes, width)
            half = min(width // 2, 256)
            self.auxiliary = nn.Sequential(_conv(sizes[2], half, 3), nn.Dropout2d(0.1), _classifier(half, classes))
        for name, parameter in encoder.named_parameters():
            if frozen or name.startswith(_UNUSED if head == "uper" else _UNUSED[1:]):
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> "Segmenter":
        super().train(mode)
        if self._frozen:  # or batch norms would change their statistics
            self.encoder.eval()
        return self

    def forward(self, images: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b classes _ _"]]:
        """Return class scores on a grid coarser than the pixels; in training those of the auxiliary head as well."""
        if self.neck is None or self.auxiliary is None:
            return [self.head(features(self.encoder, images).map)]
        scales = [step(x) for step, x in zip(self.neck, maps(self.encoder, images), strict=True)]
        return [self.head(scales), self.auxiliary(scales[2])] if self.training else [self.head(scales)]


def _build_neck(encoder: nn.Module) -> nn.ModuleList:
    """Build a module per map: scales of 4, 2, 1 and 1/2 for a ViT, norms for Swin and ConvNeXt, else identities."""
    sizes = widths(encoder)
    if isinstance(encoder, VisionTransformer | Beit):
        d = sizes[0]
        up = [nn.ConvTranspose2d(d, d, 2, 2) for _ in range(3)]
        quadruple = nn.Sequential(up[0], nn.BatchNorm2d(d), nn.GELU(), up[1])
        return nn.ModuleList([quadruple, up[2], nn.Identity(), nn.MaxPool2d(2, ceil_mode=True)])
    normed = isinstance(encoder, SwinTransformer | ConvNeXt)
    return nn.ModuleList(ChannelNorm(size) if normed else nn.Identity() for size in sizes)


class UPerHead(nn.Module):
    """UPerNet: pool the coarsest map at four scales, add it to the finer maps, and concatenate all.

    `sizes` are the channels of the four maps, finest first; `width` is that of the head.
    """

    def __init__(self, sizes: list[int], classes: int, width: int) -> None:
        super().__init__()
        self.pooled = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), _conv(sizes[-1], width, 1)) for side in _POOLS
        )
        self.coarsest = _conv(sizes[-1] + len(_POOLS) * width, width, 3)
        self.lateral = nn.ModuleList(_conv(size, width, 1) for size in sizes[:-1])
        self.smooth = nn.ModuleList(_conv(width, width, 3) for _ in sizes[:-1])
        self.joined = _conv(len(sizes) * width, width, 3)
        self.classify = nn.Sequential(nn.Dropout2d(0.1), _classifier(width, classes))

    def forward(self, scales: list[Tensor]) -> Float[Tensor, "b classes h w"]:
        """Return class scores on the grid of the finest map."""
        last = scales[-1]
        pyramid = [last, *(_resize(pool(last), last) for pool in self.pooled)]
        levels = [self.coarsest(torch.cat(pyramid, dim=1))]
        for lateral, x in zip(reversed(self.lateral), reversed(scales[:-1]), strict=True):
            y = lateral(x)
            levels.insert(0, y + _resize(levels[0], y))
        levels = [smooth(x) for smooth, x in zip(self.smooth, levels[:-1], strict=True)] + levels[-1:]
        return self.classify(self.joined(torch.cat([_resize(x, levels[0]) for x in levels], dim=1)))


def _conv(channels: int, width: int, kernel: int) -> nn.Module:
    conv = nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())


def _classifier(channels: int, classes: int) -> nn.Module:
    conv = nn.Conv2d(channels, classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


def _resize(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear")


def segmentation_loss(
    scores: list[Float[Tensor, "b classes _ _"]], masks: Int[Tensor, "b h w"], auxiliary: float = 0.4
) -> Tensor:
    """Compute the cross-entropy per pixel, of the head plus `auxiliary` times that of the auxiliary head.

    Scores are interpolated to the pixels. As in MMSegmentation, ignored pixels add nothing but count in the mean: each
    labeled pixel has the same weight, and a crop without any gives zero.
    """
    total = masks.new_zeros((), dtype=torch.float32)
    for k, score in enumerate(scores):
        full = F.interpolate(score.float(), size=masks.shape[-2:], mode="bilinear")
        loss = F.cross_entropy(full, masks, ignore_index=IGNORE, reduction="sum") / masks.numel()
        total = total + (auxiliary if k else 1.0) * loss
    return total


@torch.no_grad()
def segment(
    model: nn.Module, encoder: FrozenEncoder, image: Shaped[Tensor, "c h w"], size: tuple[int, int]
) -> Int[Tensor, "h w"]:
    """Predict the class of each pixel of an image of any size, on the encoder's device.

    The image is resized to cover `size`, aspect kept. Windows of `size` (h, w) overlap by a third and their scores are
    averaged, then interpolated to the image's size. Raises UserError if scores are not finite.
    """
    resized = resize_to_cover(image, size, "bilinear").to(encoder.device)
    x = flip_and_normalize(resized[None], None, encoder.mean, encoder.std)
    (h, w), (height, width) = size, x.shape[-2:]
    corners = [(top, left) for top in window_starts(height, h) for left in window_starts(width, w)]
    total, count = None, x.new_zeros(height, width)
    for first in range(0, len(corners), _WINDOWS):
        chunk = corners[first : first + _WINDOWS]
        with autocast(encoder.device, encoder.precision):
            (scores,) = model(torch.cat([x[..., top : top + h, left : left + w] for top, left in chunk]))
        windows = F.interpolate(scores.float(), size=size, mode="bilinear")
        if total is None:
            total = windows.new_zeros(windows.shape[1], height, width)
        for (top, left), window in zip(chunk, windows, strict=True):
            total[:, top : top + h, left : left + w] += window
            count[top : top + h, left : left + w] += 1
    assert total is not None
    check_finite(total[None], "scores of the segmentation")
    return argmax_at_size(total / count, (image.shape[-2], image.shape[-1]))


def window_starts(length: int, window: int) -> list[int]:
    """Return the first pixel of each window along an axis: steps of two thirds of a window, the last at the end."""
    step = max(1, window * 2 // 3)
    return [*range(0, length - window, step), length - window]


def argmax_at_size(scores: Float[Tensor, "classes h w"], size: tuple[int, int]) -> Int[Tensor, "h2 w2"]:
    """Return the class of the largest score of each pixel after interpolation to `size`, in chunks of classes."""
    best = scores.new_full(size, -torch.inf)
    classes = torch.zeros(size, dtype=torch.int64, device=scores.device)
    for first in range(0, len(scores), _CHUNK):
        part = F.interpolate(scores[None, first : first + _CHUNK], size=size, mode="bilinear")[0]
        value, index = part.max(dim=0)
        classes = torch.where(value > best, index + first, classes)
        best = torch.maximum(value, best)
    return classes
