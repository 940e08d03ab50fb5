"""torchvision's Faster and Mask R-CNN with ViTDet's heads, on an encoder's pyramid."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from pixmim.evaluation.detection.backbone import StageMaps, ViTMaps
from pixmim.models.convmae import ChannelNorm
from pixmim.training.precision import Precision, autocast

Targets = list[dict[str, Tensor]]


class InPrecision(nn.Module):
    """A module in lower precision whose results are float32.

    torchvision decodes boxes in the precision of its predictions, and bf16 counts in steps of 4 pixels at 1024.
    """

    def __init__(self, module: nn.Module, device: torch.device, precision: Precision) -> None:
        super().__init__()
        self.module, self._device, self._precision = module, device, precision

    def forward(self, x: Tensor) -> Any:
        with autocast(self._device, self._precision):
            y = self.module(x)
        return {name: m.float() for name, m in y.items()} if isinstance(y, dict) else y.float()


def build_detector(
    maps: ViTMaps | StageMaps, classes: int, masks: bool, regions: int, device: torch.device, precision: Precision
) -> FasterRCNN:
    """Mask R-CNN if there are masks to learn, or else Faster R-CNN, with everything but the encoder at random.

    Anchors have sides of 8 strides of their map and ratios 1:2, 1:1, 2:1 (32 to 512 pixels with patches of 16).
    Two convolutions propose; 4 and a linear layer classify, and 4 draw masks, with a LayerNorm after each of these 8.

    regions  of an image that the heads learn from in a step
    """
    width = maps.out_channels
    backbone = InPrecision(maps, device, precision)
    backbone.out_channels = width  # type: ignore[assignment]  # torchvision looks for it here
    options: dict[str, Any] = {
        "rpn_anchor_generator": AnchorGenerator(tuple((8 * s,) for s in maps.strides), ((0.5, 1.0, 2.0),) * 5),
        "rpn_head": RPNHead(width, 3, conv_depth=2),
        "box_head": InPrecision(
            FastRCNNConvFCHead((width, 7, 7), [width] * 4, [4 * width], ChannelNorm), device, precision
        ),
        "box_predictor": FastRCNNPredictor(4 * width, classes + 1),
        "box_batch_size_per_image": regions,
    }
    if not masks:
        return FasterRCNN(backbone, **options).to(device)
    head = InPrecision(MaskRCNNHeads(width, [width] * 4, 1, ChannelNorm), device, precision)
    predictor = MaskRCNNPredictor(width, width, classes + 1)
    return MaskRCNN(backbone, mask_head=head, mask_predictor=predictor, **options).to(device)


def losses(model: FasterRCNN, images: Float[Tensor, "b c h w"], targets: Targets) -> dict[str, Tensor]:
    """What a model in training loses on normalized images. Its parts are called one by one, so that nothing resizes."""
    maps, listed = model.backbone(images), _listed(images)
    proposals, of_proposals = model.rpn(listed, maps, targets)
    _, of_regions = model.roi_heads(maps, proposals, listed.image_sizes, targets)
    return {**of_proposals, **of_regions}


@torch.no_grad()
def detect(model: FasterRCNN, images: Float[Tensor, "b c h w"]) -> Targets:
    """What a model in evaluation finds in normalized images, at most 100 objects in each, the surest first.

    Of each image: boxes (k 4) in pixels, labels (k) from 1, scores (k), and masks (k 1 28 28), shares in each box.
    """
    maps, listed = model.backbone(images), _listed(images)
    proposals, _ = model.rpn(listed, maps)
    found, _ = model.roi_heads(maps, proposals, listed.image_sizes)
    return list(found)


def _listed(images: Tensor) -> ImageList:
    h, w = images.shape[-2:]
    return ImageList(images, [(h, w)] * len(images))
