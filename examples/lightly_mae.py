"""PixMIM in lightly's MAE: its encoder, decoder and mask, with pixmim's crop and loss.

python examples/lightly_mae.py FOLDER_OF_CLASS_FOLDERS
"""

import sys

import timm
import torch
from lightly.models import utils
from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
from plain_loop import load_steps
from torch import Tensor, nn

import pixmim


class LightlyMAE(nn.Module):
    """MAE of lightly's modules, as its documentation puts them together."""

    def __init__(self, size: int) -> None:
        super().__init__()
        vit = timm.create_model("vit_tiny_patch16_224", img_size=size)
        self.encoder = MaskedVisionTransformerTIMM(vit=vit)
        sizes = {"embed_dim": vit.embed_dim, "decoder_embed_dim": 128, "decoder_depth": 2, "decoder_num_heads": 4}
        self.decoder = MAEDecoderTIMM(num_patches=vit.patch_embed.num_patches, patch_size=16, **sizes)

    def forward(self, images: Tensor, ids_keep: Tensor) -> Tensor:
        """Predict all patches from those of `ids_keep`, which count the class token as 0."""
        seen = self.decoder.embed(self.encoder.encode(images, idx_keep=ids_keep))
        tokens = utils.repeat_token(self.decoder.mask_token, (len(images), self.encoder.sequence_length))
        tokens = utils.set_at_index(tokens, ids_keep, seen.type_as(tokens))
        return self.decoder.predict(self.decoder.decode(tokens))[:, 1:]


def train(folder: str, steps: int, size: int = 96, batch: int = 8) -> list[float]:
    """Train for some steps; return the loss of each."""
    model = LightlyMAE(size)
    loss_fn = pixmim.ReconstructionLoss(pixmim.LowFrequency(radius="auto"))  # in place of MSELoss on patches
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    losses: list[float] = []
    for images in load_steps(folder, size, batch, steps):  # with pixmim.SimpleResizedCrop
        ids_keep, ids_mask = utils.random_token_mask((len(images), model.encoder.sequence_length), 0.75)
        hidden = torch.zeros(len(images), model.encoder.sequence_length, dtype=torch.bool).scatter(1, ids_mask, True)
        mask = pixmim.Mask.from_hidden(hidden[:, 1:])  # without the class token
        loss = loss_fn(model(images, ids_keep), images, mask).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for number, value in enumerate(train(sys.argv[1], steps=20), start=1):
        print(f"step {number}: loss {value:.4f}")
