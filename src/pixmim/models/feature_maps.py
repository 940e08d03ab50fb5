"""Features and feature maps of trained encoders, for evaluation and for heads of dense prediction."""

from typing import Any, cast

import torch
from jaxtyping import Float
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pixmim.models.base import Features, unsupported_encoder
from pixmim.models.cnn import final_norm, is_cnn
from pixmim.models.convmae import ConvMAEEncoder


def features(encoder: nn.Module, images: Float[Tensor, "b c h w"], blocks: int = 1) -> Features:
    """Compute the features of normalized images.

    Args:
        encoder: A timm ViT, Beit, Swin or network of convolutions, or ConvMAE's encoder.
        images: Normalized images.
        blocks: Number of last blocks to return vectors of; a Swin or CNN has only those of its last block.

    Raises:
        UserError: If the encoder is not supported.
    """
    if isinstance(encoder, VisionTransformer | Beit):
        outputs: Any = encoder.forward_intermediates(
            images,
            indices=min(blocks, len(encoder.blocks)),
            return_prefix_tokens=True,
            norm=True,
            intermediates_only=True,
        )
        # timm returns pairs (map, prefix tokens), or maps alone if there are no prefix tokens.
        last: list[Tensor] = [output[0] if isinstance(output, tuple) else output for output in outputs]
        count = class_tokens(encoder)
        vectors = [
            o[1][:, :count].mean(dim=1) if count else tokens.mean(dim=(2, 3))
            for o, tokens in zip(outputs, last, strict=True)
        ]
        return Features(torch.stack(vectors, dim=1), last, "cls" if count else "pooled")
    if isinstance(encoder, SwinTransformer):
        final = encoder.forward_features(images).permute(0, 3, 1, 2)
        return Features(final.mean(dim=(2, 3))[:, None], [final])
    if isinstance(encoder, ConvMAEEncoder):
        _, second, tokens = encoder.stages(images)
        each = []
        for block in encoder.blocks3:
            tokens = block(tokens)
            each.append(tokens)
        each = [encoder.norm(tokens) for tokens in each[-blocks:]]
        maps = [_as_map(tokens, second) for tokens in each]
        return Features(torch.stack([one.mean(dim=(2, 3)) for one in maps], dim=1), maps)
    if is_cnn(encoder):
        network: Any = encoder
        output: Tensor = network.forward_features(images)
        # ConvNeXt pools before its norm; MobileNet has a layer of the classifier, which pre-training does not reach.
        is_plain = network.head_hidden_size == network.num_features
        vector = network.forward_head(output, pre_logits=True) if is_plain else output.mean(dim=(2, 3))
        return Features(vector[:, None], [final_norm(network)(output)])
    raise unsupported_encoder(encoder)


def class_tokens(encoder: VisionTransformer | Beit) -> int:
    """Return the number of class tokens, the first ones: 8 of Pixio, whose registers are class tokens too."""
    return int(getattr(encoder, "class_tokens", encoder.cls_token is not None))


def depth(encoder: nn.Module) -> int:
    """Return the number of blocks that `features` has features of. Raises UserError if the encoder is not supported."""
    if isinstance(encoder, VisionTransformer | Beit):
        return len(encoder.blocks)
    if isinstance(encoder, SwinTransformer) or is_cnn(encoder):
        return 1
    if isinstance(encoder, ConvMAEEncoder):
        return len(encoder.blocks3)
    raise unsupported_encoder(encoder)


def maps(encoder: nn.Module, images: Float[Tensor, "b c h w"]) -> list[Float[Tensor, "b _ _ _"]]:
    """Compute four feature maps of normalized images, early to late, before the final norm.

    - ViT, Beit: after 1/3, 1/2, 2/3 and all of the blocks, at the stride of the patches; blocks 3, 5, 7 and 11 of 12,
      as BEiT and MAE do, and 7, 11, 15 and 23 of 24.
    - Swin, ResNet and other networks of convolutions: of each stage, at strides 4 to 32.
    - ConvMAE: of each stage, at strides 4 to 16, and the last one max-pooled to stride 32.

    Raises:
        UserError: If the encoder is not supported.
    """
    if isinstance(encoder, VisionTransformer | Beit):
        count = len(encoder.blocks)
        indices = [max(0, depth - 1) for depth in (count // 3, count // 2, 2 * count // 3, count)]
        unique = sorted(set(indices))
        outputs: Any = encoder.forward_intermediates(images, indices=unique, intermediates_only=True)
        return [outputs[unique.index(index)] for index in indices]
    if isinstance(encoder, SwinTransformer) or is_cnn(encoder):
        stages: Any = cast(Any, encoder).forward_intermediates(images, intermediates_only=True)
        return list(stages)[-4:]  # without the stem of a ResNet
    if isinstance(encoder, ConvMAEEncoder):
        first, second, tokens = encoder.stages(images)
        third = _as_map(encoder.blocks3(tokens), second)
        return [first, second, third, nn.functional.max_pool2d(third, 2, ceil_mode=True)]
    raise unsupported_encoder(encoder)


def widths(encoder: nn.Module) -> list[int]:
    """Return the channels of the four maps. Raises UserError if the encoder is not supported."""
    if isinstance(encoder, VisionTransformer | Beit):
        return [encoder.embed_dim] * 4
    if isinstance(encoder, SwinTransformer) or is_cnn(encoder):
        return [stage["num_chs"] for stage in cast(Any, encoder).feature_info][-4:]
    if isinstance(encoder, ConvMAEEncoder):
        return [*encoder.embed_dim, encoder.embed_dim[2]]
    raise unsupported_encoder(encoder)


def _as_map(tokens: Float[Tensor, "b n d"], second: Float[Tensor, "b d2 h w"]) -> Float[Tensor, "b d rows columns"]:
    """Arrange the tokens of ConvMAE's last stage, which has half the rows and columns of the second one's map."""
    return tokens.transpose(1, 2).unflatten(2, (second.shape[2] // 2, second.shape[3] // 2))
