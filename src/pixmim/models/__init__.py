"""Who predicts. One literal dict of builders; `create_model` is the only door."""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pixmim.errors import UserError, nearest
from pixmim.models import vit
from pixmim.models.base import Features, MaskedModel
from pixmim.models.mae import MAE


def _mae(
    backbone: str, decoder_dim: int = 512, decoder_depth: int = 8, decoder_heads: int = 16, **options: Any
) -> MaskedModel:
    if decoder_dim % decoder_heads or decoder_dim % 4:
        raise UserError(f"a decoder of width {decoder_dim} does not divide into {decoder_heads} heads (and by 4)")
    return MAE(vit.create_vit(backbone, **options), decoder_dim, decoder_depth, decoder_heads)


BUILDERS: dict[str, Callable[..., MaskedModel]] = {"mae": _mae}


def create_model(name: str, backbone: str = "vit_base_patch16_224", **options: Any) -> MaskedModel:
    """A model ready for pre-training: `model(images, mask) -> prediction (b n p*p*c)`, with the timm module `.encoder`.

    name      "mae"
    backbone  the name of a plain timm ViT
    options   decoder_dim, decoder_depth, decoder_heads; the others go to timm (img_size, in_chans, embed_dim ...)

    Weights are drawn from torch's global generator. Raises UserError for an unknown name, backbone or option.
    """
    if name not in BUILDERS:
        raise UserError(f"there is no model '{name}'{nearest(name, BUILDERS)} Known: {', '.join(BUILDERS)}")
    return BUILDERS[name](backbone, **options)


def features(encoder: nn.Module, images: Float[Tensor, "b c h w"], blocks: int = 1) -> Features:
    """What a finished encoder says of normalised images, from its last `blocks` blocks.

    Raises TypeError for a module that pixmim does not know as an encoder.
    """
    if isinstance(encoder, VisionTransformer):
        return vit.features(encoder, images, blocks)
    raise TypeError(f"{type(encoder).__name__} is no encoder that pixmim knows")
