"""What an encoder says of images at four depths, as maps: what a head for dense prediction starts from."""

from typing import Any

from jaxtyping import Float
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pixmim.models.base import unsupported_encoder
from pixmim.models.convmae import ConvMAEEncoder


def maps(encoder: nn.Module, images: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b _ _ _"]]:
    """Four maps of normalized images, from an early one to the last, before the encoder's final norm.

    ViT, Beit   after a third, a half, two thirds and all of the blocks, all at the stride of the patches: of 12 blocks
                numbers 3, 5, 7 and 11, as BEiT and MAE chose, and of 24 numbers 7, 11, 15 and 23
    Swin        each stage's, at strides 4 to 32
    ConvMAE     each stage's at strides 4 to 16, and the last one pooled to stride 32

    Raises UserError for a module that pixmim does not know as an encoder.
    """
    if isinstance(encoder, VisionTransformer | Beit):
        count = len(encoder.blocks)
        wanted = [max(0, depth - 1) for depth in (count // 3, count // 2, 2 * count // 3, count)]
        taken = sorted(set(wanted))
        found: Any = encoder.forward_intermediates(images, indices=taken, intermediates_only=True)
        return [found[taken.index(depth)] for depth in wanted]
    if isinstance(encoder, SwinTransformer):
        stages: Any = encoder.forward_intermediates(images, intermediates_only=True)
        return list(stages)
    if isinstance(encoder, ConvMAEEncoder):
        first, second, tokens = encoder.stages(images)
        third = encoder.blocks3(tokens).transpose(1, 2).unflatten(2, encoder.grid)
        return [first, second, third, nn.functional.max_pool2d(third, 2, ceil_mode=True)]
    raise unsupported_encoder(encoder)


def widths(encoder: nn.Module) -> list[int]:
    """Channels of the four maps. Raises UserError as `maps` does."""
    if isinstance(encoder, VisionTransformer | Beit):
        return [encoder.embed_dim] * 4
    if isinstance(encoder, SwinTransformer):
        return [stage["num_chs"] for stage in encoder.feature_info]
    if isinstance(encoder, ConvMAEEncoder):
        return [*encoder.embed_dim, encoder.embed_dim[2]]
    raise unsupported_encoder(encoder)
