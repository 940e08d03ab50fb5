"""Layer indices of an encoder's parameters, for layer-wise learning-rate decay."""

from typing import Any, cast

from timm.models import group_parameters
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pixmim.models.base import unsupported_encoder
from pixmim.models.cnn import is_cnn
from pixmim.models.convmae import ConvMAEEncoder

# Prefixes of the parameters of layer 0.
_VIT = ("patch_embed", "pos_embed", "cls_token", "reg_token", "norm_pre")
_CONVMAE = ("patch_embed", "pos_embed", "blocks1", "blocks2")


def layer_ids(encoder: nn.Module) -> dict[str, int]:
    """Return the layer of each parameter by name: 0 for the patch embedding, the last one for the head.

    - ViT (MAE), Beit (BEiT, SimMIM): block i is layer i + 1. Biases shared by all blocks belong to the head's layer.
    - Swin (SimMIM): blocks are counted over all stages. A downsampling belongs to the last block before it.
    - ConvMAE: both convolutional stages are layer 0, block i of the third stage is layer i + 1.
    - ConvNeXt: stages 0 and 1 are layers 1 and 2, three blocks of stage 2 a layer, as in its code and A2MIM's.
    - Other CNNs of timm: the stem is layer 0, stage i is layer i + 1, as timm groups them.

    Raises:
        UserError: If the encoder is not supported.
    """
    names = [name for name, _ in encoder.named_parameters()]
    if isinstance(encoder, ConvMAEEncoder):
        return {name: _vit_layer(name, _CONVMAE, "blocks3", len(encoder.blocks3)) for name in names}
    if isinstance(encoder, VisionTransformer | Beit):
        depth = len(cast(nn.Sequential, encoder.blocks))
        return {name: _vit_layer(name, _VIT, "blocks", depth) for name in names}
    if isinstance(encoder, SwinTransformer):
        stages: Any = encoder.layers
        depths = [len(stage.blocks) for stage in stages]
        return {name: _swin_layer(name, depths) for name in names}
    if isinstance(encoder, ConvNeXt):
        blocks = len(cast(Any, encoder.stages)[-2].blocks)
        return {name: _convnext_layer(name, 12 if blocks > 9 else 6) for name in names}
    if is_cnn(encoder):
        network: Any = encoder
        return dict(group_parameters(network, network.group_matcher(coarse=True), reverse=True))
    raise unsupported_encoder(encoder)


def not_decayed(encoder: nn.Module) -> tuple[str, ...]:
    """Return parts of the names of parameters without weight decay, in addition to norms, biases and single tokens.

    SimMIM lists Swin's relative position bias tables, but not its ViT's.
    """
    return ("relative_position_bias_table",) if isinstance(encoder, SwinTransformer) else ()


def _vit_layer(name: str, embedding: tuple[str, ...], blocks: str, depth: int) -> int:
    if name.startswith(embedding):
        return 0
    part, *rest = name.split(".")
    return int(rest[0]) + 1 if part == blocks else depth + 1


def _convnext_layer(name: str, last: int) -> int:
    if not name.startswith("stages"):
        return 0 if name.startswith("stem") else last + 1
    stage, part, block = name.split(".")[1:4]
    if stage == "2":
        return min(3 + int(block) // 3, last - 1) if part == "blocks" else 3
    return {"0": 1, "1": 2}.get(stage, last)


def _swin_layer(name: str, depths: list[int]) -> int:
    if name.startswith("patch_embed"):
        return 0
    if not name.startswith("layers."):
        return sum(depths) + 1
    _, stage, part, *rest = name.split(".")
    before = sum(depths[: int(stage)])
    return before + int(rest[0]) + 1 if part == "blocks" else before  # timm's stages start with their downsampling
