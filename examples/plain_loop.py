"""The building blocks of pixmim in your own PyTorch loop.

python examples/plain_loop.py FOLDER_OF_CLASS_FOLDERS
"""

import sys
from collections.abc import Iterator
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import pixmim


def load_images(folder: str, size: int, batch: int) -> DataLoader[Any]:
    """Return batches of (images, labels), with PixMIM's crop as a transform of torchvision."""
    steps = [pixmim.SimpleResizedCrop(size), v2.RandomHorizontalFlip(), v2.ToImage()]
    normalize = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    transform = v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), normalize])
    images = ImageFolder(folder, transform)
    if len(images) < batch:  # the last batch is dropped if it is smaller: there would be none
        sys.exit(f"{folder} has {len(images)} images, and a batch needs {batch}")
    return DataLoader(images, batch_size=batch, shuffle=True, drop_last=True)


def load_steps(folder: str, size: int, batch: int, steps: int) -> Iterator[torch.Tensor]:
    """Yield the images of a number of batches, epoch after epoch."""
    epochs = repeat(load_images(folder, size, batch))
    return (images for images, _ in islice(chain.from_iterable(epochs), steps))


def train(folder: str, steps: int, size: int = 96, batch: int = 8) -> list[float]:
    """Train for some steps; return the loss of each."""
    model = pixmim.create_model("mae", "vit_tiny_patch16_224", img_size=size, decoder_dim=128, decoder_depth=2)
    loss_fn = pixmim.ReconstructionLoss(pixmim.LowFrequency(radius="auto"))
    random_mask = pixmim.RandomMask(0.75)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.05)
    losses: list[float] = []
    for images in load_steps(folder, size, batch, steps):
        mask = random_mask(len(images), (size // model.patch) ** 2)
        loss = loss_fn(model(images, mask), images, mask).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    for number, value in enumerate(train(sys.argv[1], steps=20), start=1):
        print(f"step {number}: loss {value:.4f}")
