"""How deep each parameter of an encoder lies, for learning rates that fall from the head down to the pixels."""

from typing import Any, cast

from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from pixmim.models.base import unsupported_encoder
from pixmim.models.convmae import ConvMAEEncoder

_VIT = ("patch_embed", "pos_embed", "cls_token", "reg_token", "norm_pre")
_CONVMAE = ("patch_embed", "pos_embed", "blocks1", "blocks2")
"""How the names of layer 0 begin."""


def layer_ids(encoder: nn.Module) -> dict[str, int]:
    """The layer of each parameter by name: 0 for what embeds patches, then block by block, the head's the greatest.

    ViT (MAE's rule; BEiT's and SimMIM's for a Beit): block i is i + 1; a bias shared by all blocks counts as the head.
    Swin (SimMIM's): its blocks counted through all stages; a downsampling belongs to the last block before it.
    ConvMAE (its own): both stages of convolutions are 0, block i of the third i + 1.
    Raises UserError for a module that pixmim does not know as an encoder.
    """
    if isinstance(encoder, ConvMAEEncoder):
        return {n: _of_vit(n, _CONVMAE, "blocks3", len(encoder.blocks3)) for n, _ in encoder.named_parameters()}
    if isinstance(encoder, VisionTransformer | Beit):
        depth = len(cast(nn.Sequential, encoder.blocks))
        return {n: _of_vit(n, _VIT, "blocks", depth) for n, _ in encoder.named_parameters()}
    if isinstance(encoder, SwinTransformer):
        stages: Any = encoder.layers
        depths = [len(stage.blocks) for stage in stages]
        return {n: _of_swin(n, depths) for n, _ in encoder.named_parameters()}
    raise unsupported_encoder(encoder)


def not_decayed(encoder: nn.Module) -> tuple[str, ...]:
    """Return what weight decay leaves out besides norms, biases and single tokens, as parts of parameter names.

    SimMIM declares so for a Swin's tables of relative positions, and not for those of its ViT.
    """
    return ("relative_position_bias_table",) if isinstance(encoder, SwinTransformer) else ()


def _of_vit(name: str, first: tuple[str, ...], blocks: str, depth: int) -> int:
    if name.startswith(first):
        return 0
    part, *rest = name.split(".")
    return int(rest[0]) + 1 if part == blocks else depth + 1


def _of_swin(name: str, depths: list[int]) -> int:
    if name.startswith("patch_embed"):
        return 0
    if not name.startswith("layers."):
        return sum(depths) + 1
    _, stage, part, *rest = name.split(".")
    before = sum(depths[: int(stage)])
    return before + int(rest[0]) + 1 if part == "blocks" else before  # timm's stages begin with their downsampling
