"""torchvision's Faster and Mask R-CNN with ViTDet's heads and training recipe (arXiv 2203.16527)."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from pixmim.data.sampler import BatchShard
from pixmim.evaluation.context import EvalContext, check_finite
from pixmim.evaluation.detection.backbone import build_pyramid
from pixmim.evaluation.detection.dataset import DetectionDataset
from pixmim.evaluation.detection.loader import DetectionBatch, DetectionLoader, Target
from pixmim.evaluation.frozen_encoder import FrozenEncoder, rebuild_at_size
from pixmim.evaluation.settings import DetectionSettings
from pixmim.models.convmae import ChannelNorm
from pixmim.models.layer_decay import layer_ids
from pixmim.training.find_batch_size import equal_parts
from pixmim.training.optim import SyncFreeOptimizer, layer_decay_param_groups
from pixmim.training.precision import Precision, autocast
from pixmim.training.trainer import Trainer
from pixmim.transforms.crops import flip_and_normalize
from pixmim.utils import rng
from pixmim.utils.initialization import seeded

_ENCODER = "backbone.module.encoder."
_POSITIONS = "backbone.module.windowed.positions."


class InPrecision(nn.Module):
    """Run a module in lower precision and return float32.

    torchvision decodes boxes in the dtype of its predictions, and bf16 has a resolution of 4 pixels at 1024.
    """

    def __init__(self, module: nn.Module, device: torch.device, precision: Precision) -> None:
        super().__init__()
        self.module, self._device, self._precision = module, device, precision

    def forward(self, x: Tensor) -> Any:
        with autocast(self._device, self._precision):
            y = self.module(x)
        return {name: m.float() for name, m in y.items()} if isinstance(y, dict) else y.float()


def build_detector(encoder: FrozenEncoder, settings: DetectionSettings, classes: int, masks: bool) -> FasterRCNN:
    """Build Mask R-CNN, or Faster R-CNN without masks, on the encoder; everything else is random by the seed.

    Anchors have sides of 8 strides of their map (32 to 512 pixels for patches of 16) and ratios 1:2, 1:1, 2:1. The RPN
    has 2 convolutions, the box head 4 and a linear layer, the mask head 4, with a LayerNorm after each convolution of
    the heads.
    """
    width, device, precision = settings.width, encoder.device, encoder.precision
    with seeded(settings.seed):
        module = rebuild_at_size(encoder, str(settings.size), drop_path_rate=settings.drop_path)
        pyramid = build_pyramid(module, width, settings.window, settings.global_blocks, settings.relative_positions)
        backbone = InPrecision(pyramid, device, precision)
        backbone.out_channels = width  # type: ignore[assignment]  # read by torchvision
        options: dict[str, Any] = {
            "rpn_anchor_generator": AnchorGenerator(tuple((8 * s,) for s in pyramid.strides), ((0.5, 1.0, 2.0),) * 5),
            "rpn_head": RPNHead(width, 3, conv_depth=2),
            "box_head": InPrecision(
                FastRCNNConvFCHead((width, 7, 7), [width] * 4, [4 * width], ChannelNorm), device, precision
            ),
            "box_predictor": FastRCNNPredictor(4 * width, classes + 1),
            "box_batch_size_per_image": settings.regions,
        }
        if not masks:
            return FasterRCNN(backbone, **options).to(device)
        mask_head = InPrecision(MaskRCNNHeads(width, [width] * 4, 1, ChannelNorm), device, precision)
        predictor = MaskRCNNPredictor(width, width, classes + 1)
        return MaskRCNN(backbone, mask_head=mask_head, mask_predictor=predictor, **options).to(device)


def detection_losses(model: FasterRCNN, images: Float[Tensor, "b c h w"], targets: list[Target]) -> dict[str, Tensor]:
    """Compute the losses of normalized images. Bypasses the model's own transform, which would resize them."""
    maps, image_list = model.backbone(images), _image_list(images)
    proposals, rpn_losses = model.rpn(image_list, maps, targets)
    _, roi_losses = model.roi_heads(maps, proposals, image_list.image_sizes, targets)
    return {**rpn_losses, **roi_losses}


@torch.no_grad()
def detect(model: FasterRCNN, images: Float[Tensor, "b c h w"]) -> list[dict[str, Tensor]]:
    """Detect at most 100 objects per normalized image, highest score first.

    Returns boxes (k 4) in pixels, labels (k) from 1, scores (k), and for Mask R-CNN masks (k 1 28 28), probabilities
    inside each box. Raises UserError if feature maps are not finite: nothing would be detected.
    """
    maps, image_list = model.backbone(images), _image_list(images)
    for each in maps.values():
        check_finite(each, "feature maps of the detector")
    proposals, _ = model.rpn(image_list, maps)
    detections, _ = model.roi_heads(maps, proposals, image_list.image_sizes)
    return list(detections)


def _image_list(images: Tensor) -> ImageList:
    h, w = images.shape[-2:]
    return ImageList(images, [(h, w)] * len(images))


def train_detector(
    context: EvalContext, settings: DetectionSettings, train: DetectionDataset, masks: bool
) -> FasterRCNN:
    """Fine-tune a detector; resumes an interrupted training bitwise."""
    encoder = context.encoder
    model = build_detector(encoder, settings, len(train.classes), masks).train()
    width = int(encoder.module.num_features)  # type: ignore[arg-type]
    parts = equal_parts(settings.batch_size, settings.accumulation_steps, encoder.device, (settings.size,) * 2, width)
    part = settings.batch_size // parts
    steps = settings.steps or max(1, round(settings.epochs * len(train.images) / settings.batch_size))
    groups = layer_decay_param_groups(model, parameter_layers(model), settings.layer_decay, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.999), fused=True)

    def open_loader(position: int) -> DetectionLoader:
        return DetectionLoader(
            train,
            BatchShard(part, position * part),
            skipped=context.skipped(train.images),
            size=settings.size,
            scale=settings.jitter,
            with_masks=masks,
            fill=encoder.mean.tolist(),
            seed=settings.seed,
            threads=settings.threads,
        )

    def compute_loss(batch: DetectionBatch, number: int) -> Tensor:
        # torchvision samples regions, and timm drops paths, with the global generator.
        torch.manual_seed(int(rng.bits(settings.seed, "detection", 0, [number], 1)[0, 0] >> np.uint64(1)))
        images = flip_and_normalize(batch.images.to(encoder.device), None, encoder.mean, encoder.std)
        targets = [{key: value.to(encoder.device) for key, value in target.items()} for target in batch.targets]
        return torch.stack(list(detection_losses(model, images, targets).values())).sum()

    trainer = Trainer(
        model,
        SyncFreeOptimizer(optimizer, None, scaling=encoder.precision == "fp16", device=encoder.device),
        lambda step: learning_rate(settings, step, steps),
        steps,
        context.work_dir("detection", settings, train.truth),
        images=len(train.images),
        batch_size=settings.batch_size,
        accumulation_steps=parts,
        console=context.console,
    )
    trainer.resume_and_fit(open_loader, compute_loss)
    return model


def learning_rate(settings: DetectionSettings, step: int, steps: int) -> float:
    """Return the rate of a step: linear warm-up from 0.001 of the peak, then a factor of 0.1 at each drop."""
    warmup = min(settings.warmup, steps // 5)
    if step < warmup:
        return settings.lr * (0.001 + 0.999 * step / warmup)
    return settings.lr * 0.1 ** sum(step >= share * steps for share in settings.drops)


def parameter_layers(model: FasterRCNN) -> dict[str, int]:
    """Return the layer of each parameter of a detector, for layer decay; everything above the encoder is topmost.

    Relative positions belong to the layer of their block.
    """
    ids = layer_ids(model.backbone.module.encoder)
    layers = dict.fromkeys((name for name, _ in model.named_parameters()), max(ids.values()))
    layers |= {_ENCODER + name: layer for name, layer in ids.items()}
    for name in layers:
        if name.startswith(_POSITIONS):
            layers[name] = int(name.removeprefix(_POSITIONS).split(".")[0]) + 1
    return layers
