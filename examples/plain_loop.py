"""The parts of pixmim in a plain PyTorch loop of one's own.

python examples/plain_loop.py FOLDER
"""

import sys

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import pixmim


def train(folder: str, steps: int, size: int = 96, batch: int = 8) -> list[float]:
    """Train for some steps on a folder of class folders; gives the loss of each step."""
    model = pixmim.create_model("mae", "vit_tiny_patch16_224", img_size=size, decoder_dim=128, decoder_depth=2)
    objective = pixmim.ReconstructionLoss(pixmim.LowFrequency(radius="auto"))
    masker = pixmim.RandomMask(0.75)
    transform = v2.Compose([pixmim.SimpleResizedCrop(size), v2.RandomHorizontalFlip(), v2.ToImage(), SCALE, NORMALISE])
    loader = DataLoader(ImageFolder(folder, transform), batch_size=batch, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    losses: list[float] = []
    while len(losses) < steps:
        for images, _ in loader:
            mask = masker(len(images), (size // model.patch) ** 2)
            loss = objective(model(images, mask), images, mask).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) == steps:
                break
    return losses


SCALE = v2.ToDtype(torch.float32, scale=True)
NORMALISE = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

if __name__ == "__main__":
    for number, value in enumerate(train(sys.argv[1], steps=20), start=1):
        print(f"step {number}: loss {value:.4f}")
