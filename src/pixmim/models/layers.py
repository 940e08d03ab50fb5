"""Which layer of an encoder a parameter belongs to, for learning rates that fall from layer to layer."""

from typing import Any

from timm.models.swin_transformer import SwinTransformer
from torch import nn

from pixmim.models.convmae import ConvMAEEncoder


def layers(encoder: nn.Module) -> int:
    """The number of the last layer: that of the final norm and of all that stands on the encoder. The first is 0."""
    if isinstance(encoder, SwinTransformer):
        return sum(_depths(encoder)) + 1
    known: Any = encoder
    return len(known.blocks3 if isinstance(encoder, ConvMAEEncoder) else known.blocks) + 1


def layer_of(encoder: nn.Module, name: str) -> int:
    """The layer of the parameter `name` of the encoder's state_dict, as MAE, ConvMAE and SimMIM count them.

    0 is the patch embedding, positions and tokens, and with ConvMAE all before the third stage; then each block counts
    one, and what is left is the last. A Swin's downsampling counts to the block before it.
    """
    parts = name.split(".")
    if isinstance(encoder, SwinTransformer) and parts[0] == "layers":
        before = sum(_depths(encoder)[: int(parts[1])])
        return before + int(parts[3]) + 1 if parts[2] == "blocks" else before
    if parts[0] == ("blocks3" if isinstance(encoder, ConvMAEEncoder) else "blocks"):
        return int(parts[1]) + 1
    last = parts[0] in ("norm", "fc_norm", "head") or parts[0] == "rel_pos_bias"
    return layers(encoder) if last else 0


def _depths(encoder: nn.Module) -> list[int]:
    known: Any = encoder
    return [len(stage.blocks) for stage in known.layers]
