"""Heads that give each pixel a class: a linear one, and UPerNet (arXiv 1807.10221) as BEiT and MAE use it."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from timm.models.beit import Beit
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from pixmim.evaluation.segmentation.dataset import IGNORE
from pixmim.models import features
from pixmim.models.convmae import ChannelNorm
from pixmim.models.feature_maps import maps, widths

_POOLS = (1, 2, 3, 6)
_UNUSED = ("norm.", "fc_norm.", "head.")
"""How names begin of what comes after the maps, and so learns nothing through them."""


class Segmenter(nn.Module):
    """An encoder with a head. In training it gives scores of the head and, with "uper", of the auxiliary one.

    head    "linear": BatchNorm and a 1x1 convolution on the last map, after the encoder's final norm; "uper"
    width   channels of UPerNet
    frozen  leave the encoder as it is
    """

    def __init__(
        self, encoder: nn.Module, head: Literal["linear", "uper"], classes: int, width: int = 512, frozen: bool = False
    ) -> None:
        super().__init__()
        self.encoder = encoder
        sizes = widths(encoder)
        self.neck: nn.Module | None = None
        self.auxiliary: nn.Module | None = None
        if head == "linear":
            self.head: nn.Module = nn.Sequential(nn.BatchNorm2d(sizes[-1]), _classifier(sizes[-1], classes))
        else:
            self.neck, self.head = Neck(encoder), UPer(sizes, classes, width)
            self.auxiliary = nn.Sequential(
                _conv(sizes[2], width // 2, 3), nn.Dropout2d(0.1), _classifier(width // 2, classes)
            )
        for name, parameter in encoder.named_parameters():
            if frozen or name.startswith(_UNUSED if head == "uper" else _UNUSED[1:]):
                parameter.requires_grad_(False)

    def forward(self, images: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b classes _ _"]]:
        """Scores for each class on a grid coarser than the pixels, the head's first."""
        if self.neck is None or self.auxiliary is None:
            return [self.head(features(self.encoder, images).map)]
        scales = self.neck(maps(self.encoder, images))
        return [self.head(scales), self.auxiliary(scales[2])] if self.training else [self.head(scales)]


class Neck(nn.Module):
    """Four maps at four scales out of an encoder's four: a ViT's are brought to x4, x2, x1 and x1/2 of their grid.

    A Swin's maps have their scales, and get a norm each; ConvMAE's are left as they are.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        sizes = widths(encoder)
        if isinstance(encoder, VisionTransformer | Beit):
            d = sizes[0]
            up = [nn.ConvTranspose2d(d, d, 2, 2) for _ in range(3)]
            steps: list[nn.Module] = [
                nn.Sequential(up[0], nn.BatchNorm2d(d), nn.GELU(), up[1]),
                up[2],
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        elif hasattr(encoder, "layers"):
            steps = [ChannelNorm(size) for size in sizes]
        else:
            steps = [nn.Identity() for _ in sizes]
        self.steps = nn.ModuleList(steps)

    def forward(self, found: list[Tensor]) -> list[Tensor]:
        return [step(x) for step, x in zip(self.steps, found, strict=True)]


class UPer(nn.Module):
    """UPerNet: the coarsest map is pooled at four scales, then added to the finer ones; all are joined.

    sizes  channels of the four maps, from the finest on
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
        """Scores on the grid of the finest map."""
        last = scales[-1]
        wide = [last, *(_to(pool(last), last) for pool in self.pooled)]
        levels = [self.coarsest(torch.cat(wide, dim=1))]
        for lateral, x in zip(reversed(self.lateral), reversed(scales[:-1]), strict=True):
            y = lateral(x)
            levels.insert(0, y + _to(levels[0], y))
        levels = [smooth(x) for smooth, x in zip(self.smooth, levels[:-1], strict=True)] + levels[-1:]
        return self.classify(self.joined(torch.cat([_to(x, levels[0]) for x in levels], dim=1)))


def loss_of(
    scores: list[Float[Tensor, "b classes _ _"]], masks: Int[Tensor, "b h w"], auxiliary: float = 0.4
) -> Tensor:
    """Cross-entropy of the pixels, of the head and, times `auxiliary`, of the auxiliary head.

    Scores are brought to the pixels bilinearly. Ignored pixels add nothing, but count in the mean, as in
    MMSegmentation: each labeled pixel weighs the same, and a crop without any gives zero.
    """
    total = masks.new_zeros((), dtype=torch.float32)
    for k, s in enumerate(scores):
        large = F.interpolate(s.float(), size=masks.shape[-2:], mode="bilinear")
        found = F.cross_entropy(large, masks, ignore_index=IGNORE, reduction="sum") / masks.numel()
        total = total + (auxiliary if k else 1.0) * found
    return total


def _conv(channels: int, width: int, side: int) -> nn.Module:
    """Convolution, BatchNorm, ReLU; the size stays."""
    conv = nn.Conv2d(channels, width, side, padding=side // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())


def _classifier(channels: int, classes: int) -> nn.Module:
    conv = nn.Conv2d(channels, classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


def _to(x: Tensor, other: Tensor) -> Tensor:
    """A map on the grid of another one."""
    return F.interpolate(x, size=other.shape[-2:], mode="bilinear")
