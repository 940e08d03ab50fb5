"""MAE from lightly's modules (1.6 or later), composed as in its documentation."""

from lightly.models import utils
from lightly.models.modules import MaskedVisionTransformerTIMM
from lightly.models.modules.masked_vision_transformer_decoder_timm import MaskedVisionTransformerDecoderTIMM
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class LightlyMAE(nn.Module):
    """Predict hidden patches, with the loss on normalized pixels. decoder: (width, depth, heads)."""

    def __init__(
        self, size: int, patch: int, width: int, depth: int, heads: int, decoder: tuple[int, int, int]
    ) -> None:
        super().__init__()
        thin, layers, thin_heads = decoder
        self.patch, self.tokens = patch, (size // patch) ** 2 + 1
        vit = VisionTransformer(size, patch, embed_dim=width, depth=depth, num_heads=heads, num_classes=0)
        self.encoder = MaskedVisionTransformerTIMM(vit)
        self.narrow = nn.Linear(width, thin)
        self.decoder = MaskedVisionTransformerDecoderTIMM(self.tokens - 1, thin, layers, thin_heads)
        self.predict = nn.Linear(thin, patch * patch * 3)

    def forward(self, images: Tensor) -> Tensor:
        b = len(images)
        keep, hidden = utils.random_token_mask((b, self.tokens), 0.75, device=images.device)
        visible = self.narrow(self.encoder.encode(images, idx_keep=keep))
        blank = self.decoder.mask_token.to(visible.dtype).expand(b, self.tokens, -1)
        full = self.decoder(utils.set_at_index(blank, keep, visible))
        prediction = self.predict(utils.get_at_index(full, hidden))
        target = utils.get_at_index(utils.patchify(images, self.patch), hidden - 1)  # the class token is 0
        return nn.functional.mse_loss(prediction.float(), utils.normalize_mean_var(target))
