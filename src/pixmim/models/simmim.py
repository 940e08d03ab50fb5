"""SimMIM (Xie et al., arXiv 2111.09886): a learned token replaces hidden patches, a light head predicts pixels."""

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from pixmim.masking import Mask
from pixmim.models import vit
from pixmim.models.base import MaskedModel, freeze_pooling
from pixmim.utils.patches import patchify

SimMIMEncoder = SwinTransformer | Beit | VisionTransformer
Head = Literal["linear", "mlp"]


class SimMIM(MaskedModel):
    """A timm Swin, Beit or plain ViT over all patches, hidden ones replaced after the patch embedding (section 3.2).

    `patch` is that of the patch embedding, 4 px for Swin: masks are sampled on this grid, in blocks of 32 px.
    Parameters: 89,874,104 with Swin-B at 192 px and window 6, 199,881,204 with Swin-L, 86,256,720 with the BEiT-like
    ViT-B.

    Args:
        encoder: A Swin keeps timm's initialization; a Beit or ViT gets SimMIM's (`init_like_simmim`).
        head: "linear": a 1x1 convolution to the stride x stride pixels of each token (section 3.3). "mlp": two, with a
            GELU between them.
        outputs: Numbers per value: 1, or the number of color bins.
    """

    any_size = False

    def __init__(self, encoder: SimMIMEncoder, head: Head = "linear", outputs: int = 1) -> None:
        super().__init__()
        self.encoder: SimMIMEncoder = encoder
        embed: Any = encoder.patch_embed
        self.patch = embed.patch_size[0]
        width, channels = int(encoder.num_features), int(embed.proj.in_channels)
        self.stride = self.patch * (2 ** (len(encoder.layers) - 1) if isinstance(encoder, SwinTransformer) else 1)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed.proj.out_channels))
        self.head = build_head(width, self.stride**2 * channels * outputs, head)
        freeze_pooling(encoder)
        limit = 2.0  # that of Swin's own initialization
        if not isinstance(encoder, SwinTransformer):
            init_like_simmim(encoder)
            limit = 0.02
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-limit, b=limit)

    def forward(self, images: Float[Tensor, "b c h w"], mask: Mask) -> Float[Tensor, "b n d"]:
        self.check_mask(images, mask)
        if isinstance(self.encoder, SwinTransformer):
            tokens = _encode_swin(self.encoder, images, mask.hidden, self.mask_token)
        else:
            tokens = vit.encode_replaced(self.encoder, images, mask.hidden, self.mask_token)
        # PixelShuffle reads values as (channel, output, row, column), SimMIM's layout.
        return patchify(F.pixel_shuffle(self.head(tokens), self.stride), self.patch)


def build_head(width: int, values: int, head: Head) -> nn.Sequential:
    """Build the head that predicts the values of each position of a map of this width."""
    return nn.Sequential(
        *([nn.Conv2d(width, width, 1), nn.GELU()] if head == "mlp" else []), nn.Conv2d(width, values, 1)
    )


def _encode_swin(
    encoder: SwinTransformer,
    images: Float[Tensor, "b c h w"],
    hidden: Bool[Tensor, "b n"],
    mask_token: Float[Tensor, "1 1 d"],
) -> Float[Tensor, "b width rows columns"]:
    """Return the final map. The token replaces patches after the norm of the patch embedding."""
    x = encoder.patch_embed(images)
    x = torch.where(hidden.view(*x.shape[:3], 1), mask_token.to(x.dtype).unsqueeze(1), x)
    return encoder.norm(encoder.layers(x)).permute(0, 3, 1, 2)


@torch.no_grad()
def init_like_simmim(encoder: Beit | VisionTransformer) -> None:
    """Initialize a ViT as SimMIM: weights normal with std 0.02, truncated at +-0.02, biases zero, residuals rescaled.

    The last layer of each residual branch in block i (from 1) is divided by sqrt(2 i), as in BEiT.
    """
    for layer in encoder.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(layer.weight, std=0.02, a=-0.02, b=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    blocks: Any = encoder.blocks
    for number, block in enumerate(blocks, start=1):
        for last in (block.attn.proj, block.mlp.fc2):
            last.weight /= (2 * number) ** 0.5
    if encoder.cls_token is not None:
        nn.init.trunc_normal_(encoder.cls_token, std=0.02, a=-0.02, b=0.02)
