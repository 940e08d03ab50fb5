"""PixMIM as a LightningModule.

python examples/lightning_module.py FOLDER_OF_CLASS_FOLDERS
"""

import sys
from typing import Any

import lightning
import torch
from plain_loop import load_images

import pixmim


class PixMIM(lightning.LightningModule):
    """MAE with PixMIM's target; the crop is in the transform of the images."""

    def __init__(self, size: int = 96, mask_ratio: float = 0.75) -> None:
        super().__init__()
        self.model = pixmim.create_model("mae", "vit_tiny_patch16_224", img_size=size, decoder_dim=128, decoder_depth=2)
        self.loss_fn = pixmim.ReconstructionLoss(pixmim.LowFrequency(radius="auto"))
        self.mask = pixmim.RandomMask(mask_ratio)
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Return the loss of a batch (images, labels); labels are ignored."""
        images, _ = batch
        mask = self.mask(len(images), (images.shape[-1] // self.model.patch) ** 2).to(images.device)
        loss = self.loss_fn(self.model(images, mask), images, mask).loss
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW, as MAE."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)


def train(folder: str, steps: int, size: int = 96, batch: int = 8) -> list[float]:
    """Train for some steps; return the loss of each."""
    module = PixMIM(size)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    lightning.Trainer(max_steps=steps, accelerator="auto", devices=1, **quiet).fit(
        module, load_images(folder, size, batch)
    )
    return module.losses


if __name__ == "__main__":
    for number, value in enumerate(train(sys.argv[1], steps=20), start=1):
        print(f"step {number}: loss {value:.4f}")
