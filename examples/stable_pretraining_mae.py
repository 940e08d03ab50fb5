"""PixMIM in stable-pretraining's MAE: its encoder, decoder and mask, with pixmim's crop and loss.

python examples/stable_pretraining_mae.py FOLDER_OF_CLASS_FOLDERS
"""

import sys

import timm
import torch
from plain_loop import load_steps
from stable_pretraining.methods import MAE

import pixmim


def train(folder: str, steps: int, size: int = 96, batch: int = 8) -> list[float]:
    """Train for some steps; return the loss of each."""
    vit = timm.create_model("vit_tiny_patch16_224", img_size=size, num_classes=0)
    model = MAE(vit, decoder_embed_dim=128, decoder_depth=2, decoder_num_heads=4)
    loss_fn = pixmim.ReconstructionLoss(pixmim.LowFrequency(radius="auto"))  # in place of output.loss
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    losses: list[float] = []
    for images in load_steps(folder, size, batch, steps):  # with pixmim.SimpleResizedCrop
        output = model(images)
        loss = loss_fn(output.predictions, images, pixmim.Mask.from_hidden(output.mask.bool())).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for number, value in enumerate(train(sys.argv[1], steps=20), start=1):
        print(f"step {number}: loss {value:.4f}")
