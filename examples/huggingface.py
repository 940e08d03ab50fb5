"""PixMIM with Hugging Face's ViTMAEForPreTraining, its forward pass and its mask.

    python examples/huggingface.py FOLDER

The two ideas take four lines, marked below. They need nothing of the model but its prediction and its mask, so they
work with every version of transformers (since version 5 there is no `forward_loss` to replace).
"""

import sys
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms import v2
from transformers import ViTMAEConfig, ViTMAEForPreTraining

import pixmim
from pixmim.utils.patches import sincos_positions


def train(paths: list[Path], config: ViTMAEConfig, steps: int, batch: int = 8) -> list[float]:
    """Train for some steps; return the loss of each."""
    model = ViTMAEForPreTraining(config).train()
    fill_positions(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    crop = pixmim.SimpleResizedCrop(config.image_size)  # 1: keeps the object
    objective = pixmim.ReconstructionLoss(
        pixmim.LowFrequency(radius="auto")
    )  # 2: the low frequencies, normalized per patch
    ready = v2.Compose([v2.RGB(), crop, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), NORMALIZE])
    losses = []
    for step in range(steps):
        some = [paths[(step * batch + i) % len(paths)] for i in range(batch)]
        pixels = torch.stack([ready(Image.open(path)) for path in some])
        output = model(pixels)
        hidden = pixmim.Mask.from_hidden(output.mask.bool())  # 3
        loss = objective(output.logits, pixels, hidden).loss  # 4: instead of output.loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def fill_positions(model: ViTMAEForPreTraining) -> None:
    """Write MAE's fixed tables into a model made from a config: transformers 5.23 leaves them at zero there."""
    for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        side = round((table.shape[1] - 1) ** 0.5)
        table.data[0, 1:] = sincos_positions(table.shape[2], (side, side))


NORMALIZE = v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SMALL = ViTMAEConfig(
    image_size=96,
    hidden_size=192,
    num_hidden_layers=6,
    num_attention_heads=3,
    intermediate_size=768,
    decoder_hidden_size=128,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=4,
)

if __name__ == "__main__":
    kinds = (".jpg", ".jpeg", ".png")
    paths = sorted(path for path in Path(sys.argv[1]).expanduser().rglob("*") if path.suffix.lower() in kinds)
    if not paths:
        sys.exit(f"{sys.argv[1]} has no images")
    for number, value in enumerate(train(paths, SMALL, steps=20), start=1):
        print(f"step {number}: loss {value:.4f}")
