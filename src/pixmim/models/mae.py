"""MAE (He et al., arXiv 2111.06377): encode the visible patches, decode all of them with a small transformer."""

from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pixmim.masking import Mask
from pixmim.models.base import MaskedModel
from pixmim.models.decoder import Decoder
from pixmim.models.vit import encode_visible, fix_sincos_positions, init_like_mae, prefix_tokens


class MAE(MaskedModel):
    """A timm VisionTransformer with MAE's decoder; with other masks and a thinner decoder this is LSMAE, too.

    encoder  any plain timm ViT; its positions become MAE's fixed sin-cos table, and its weights are initialised anew
    decoder_dim, decoder_depth, decoder_heads  see `Decoder`

    With vit_base_patch16_224 and (512, 8, 16) this holds 111,907,840 values, as the official model does; LSMAE-base at
    448 px, with (384, 8, 12), holds 101.340 million.
    """

    def __init__(
        self, encoder: VisionTransformer, decoder_dim: int = 512, decoder_depth: int = 8, decoder_heads: int = 16
    ) -> None:
        super().__init__()
        self.encoder: VisionTransformer = encoder
        self.patch = encoder.patch_embed.patch_size[0]
        values = self.patch**2 * encoder.patch_embed.proj.in_channels
        grid, prefix = encoder.patch_embed.grid_size, encoder.num_prefix_tokens
        init_like_mae(encoder)
        fix_sincos_positions(encoder)
        for token in prefix_tokens(encoder):
            nn.init.normal_(token, std=0.02)
        self.decoder = Decoder(encoder.embed_dim, grid, values, prefix, decoder_dim, decoder_depth, decoder_heads)

    def forward(self, images: Float[Tensor, "b c h w"], mask: Mask) -> Float[Tensor, "b n d"]:
        """Predict all patches of normalised images, d = p*p*c in (row, column, channel) order."""
        return self.decoder(encode_visible(self.encoder, images, mask), mask)
