"""SimMIM (Xie et al., arXiv 2111.09886): a learnt token replaces hidden patches, a thin head predicts the pixels."""

from typing import Any, Literal

import torch
from jaxtyping import Float
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from pixmim.masking import Mask
from pixmim.models import swin, vit
from pixmim.models.base import MaskedModel
from pixmim.utils.patches import patchify

SimMIMEncoder = SwinTransformer | Beit | VisionTransformer
Head = Literal["linear", "mlp"]


class SimMIM(MaskedModel):
    """A timm Swin, Beit or plain ViT that sees all patches, the hidden ones as one learnt token.

    encoder  keeps the initialization of timm's Swin; a Beit or ViT gets SimMIM's: linear weights from a normal of
             deviation 0.02 cut at +-0.02, the last of each residual branch divided by sqrt(2 * layer)
    head     "linear": one 1x1 convolution; "mlp": two of them with a GELU between. It predicts the stride x stride
             pixels under each place of the encoder's final map (section 3.3)
    outputs  numbers for each value, last in their order: 1, or the bins of ColorBins

    `patch` is the patch of the encoder's embedding, 4 px for Swin: masks are drawn on that grid, in units of 32 px.
    Values in all: 89.874 million on Swin-B at 192 px with window 6, 199.881 on Swin-L, 86.257 on the BEiT-like ViT-B.
    """

    def __init__(self, encoder: SimMIMEncoder, head: Head = "linear", outputs: int = 1) -> None:
        super().__init__()
        self.encoder: SimMIMEncoder = encoder
        embed: Any = encoder.patch_embed
        self.patch = embed.patch_size[0]
        width, channels = int(encoder.num_features), int(embed.proj.in_channels)
        self.stride = self.patch * (2 ** (len(encoder.layers) - 1) if isinstance(encoder, SwinTransformer) else 1)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed.proj.out_channels))
        predict = nn.Conv2d(width, self.stride**2 * channels * outputs, 1)
        hidden = [nn.Conv2d(width, width, 1), nn.GELU()] if head == "mlp" else []
        self.head = nn.Sequential(*hidden, predict)
        if not isinstance(encoder, SwinTransformer):
            init_like_simmim(encoder)
        nn.init.trunc_normal_(self.mask_token, std=0.02, a=-0.02, b=0.02)

    def forward(self, images: Float[Tensor, "b c h w"], mask: Mask) -> Float[Tensor, "b n d"]:
        """Predict all patches of normalized images, d = p*p*c*outputs in (row, column, channel, output) order."""
        self.check_mask(images, mask)
        drive = swin.encode_replaced if isinstance(self.encoder, SwinTransformer) else vit.encode_replaced
        found = drive(self.encoder, images, mask.hidden, self.mask_token)  # type: ignore[arg-type]
        # PixelShuffle reads a place's values as (channel, output, row, column), SimMIM's layout; patchify gives ours.
        return patchify(F.pixel_shuffle(self.head(found), self.stride), self.patch)


@torch.no_grad()
def init_like_simmim(encoder: Beit | VisionTransformer) -> None:
    """SimMIM's initialization of a ViT's linear layers and tokens."""
    for layer in encoder.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02, a=-0.02, b=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    blocks: Any = encoder.blocks
    for number, block in enumerate(blocks, start=1):
        for last in (block.attn.proj, block.mlp.fc2):
            last.weight /= (2 * number) ** 0.5
    if encoder.cls_token is not None:
        nn.init.trunc_normal_(encoder.cls_token, std=0.02, a=-0.02, b=0.02)
